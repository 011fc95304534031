#!/usr/bin/env python
"""Merge token-bank files into one table: csv, jsonl or parquet by the suffix of --output.

python tools/merge_token_bank.py RUN/token_bank --output RUN/token_bank/merged.parquet --drop-raw-topk
"""

import argparse
import sys

from ta_opd.errors import TaOpdError
from ta_opd.token_bank import merge_banks


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="bank directories, glob patterns or files")
    parser.add_argument("--output", required=True, help="file to write (.parquet, .csv or .jsonl)")
    parser.add_argument("--drop-raw-topk", action="store_true", help="leave out the four raw top-k columns")
    parser.add_argument("--no-source-cols", action="store_true", help="do not add source_file and source_dir")
    args = parser.parse_args(argv)
    try:
        report = merge_banks(args.inputs, args.output, drop_raw_topk=args.drop_raw_topk, source_columns=not args.no_source_cols)
    except TaOpdError as error:
        print(f"merge_token_bank: {error}", file=sys.stderr)
        return 1
    print(f"files: {report.files}")
    print(f"rows: {report.rows}")
    print(f"cols: {report.columns}")
    print(f"saved: {report.output}")
    print(f"valid_tokens: {report.valid_tokens}  keep_ratio: {report.keep_ratio:.6f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
