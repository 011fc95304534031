"""The token bank: one table a rollout with what was measured, scored and kept for every response token.

`TokenBankWriter` writes it (parquet, csv or jsonl), `read_bank` reads it (also banks of the released code),
`merge_banks` joins many files into one, however large. `COLUMNS` names the 63 columns in order with their types.
"""

from ta_opd.token_bank.columns import COLUMNS, QUADRANTS, SCHEMA_VERSION, build_table
from ta_opd.token_bank.merge import MergeReport, merge_banks
from ta_opd.token_bank.reader import bank_files, read_bank, read_table
from ta_opd.token_bank.writer import TokenBankWriter

__all__ = [
    "COLUMNS", "QUADRANTS", "SCHEMA_VERSION", "MergeReport", "TokenBankWriter",
    "bank_files", "build_table", "merge_banks", "read_bank", "read_table",
]  # fmt: skip
