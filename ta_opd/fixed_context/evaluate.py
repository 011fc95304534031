"""One scoring run from command-line values to a finished file: models or servers, baseline join, record."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from ta_opd.errors import ConfigError
from ta_opd.fixed_context.bank import load_contexts
from ta_opd.fixed_context.join import join_baseline
from ta_opd.fixed_context.scoring import ScoringConfig, score_contexts
from ta_opd.fixed_context.server_scoring import ServerScoringConfig, score_contexts_on_servers
from ta_opd.fixed_context.tables import read_meta, read_table, write_table


def evaluate_bank(
    bank, student: str, teacher: str, output, *, config: ScoringConfig, baseline=None, max_samples: int | None = None,
    max_response_tokens: int | None = None, concurrency: int = 16, log: Callable[[str], None] = print,
) -> pd.DataFrame:  # fmt: skip
    """Scores `bank` and writes the table to `output`; with `baseline` (a table of the same bank before training) its columns are joined as
    `*_base` and gains added. student and teacher: HF model directories, or both addresses of running SGLang servers.

    Parts are kept in `<output>.parts` until the table is written, so a repeated call goes on. Raises ConfigError when only one side is a server; DataError and ServiceError as the parts do.
    """
    output = Path(output)
    contexts = load_contexts(bank, max_samples=max_samples, max_response_tokens=max_response_tokens)
    before = before_meta = None
    if baseline is not None:
        before, before_meta = read_table(baseline), read_meta(baseline)
    work = output.with_name(output.stem + ".parts")
    served = [side.startswith(("http://", "https://")) for side in (student, teacher)]
    if any(served) and not all(served):
        raise ConfigError("expected two models or two servers, got one of each; serve both, or score both as HF models")
    if all(served):
        options = ServerScoringConfig(topk=config.topk, concurrency=concurrency, contexts_per_part=config.contexts_per_part, raw_topk=config.raw_topk)
        table, record = score_contexts_on_servers(contexts, student, teacher, options, work, log=log)
    else:
        table, record = score_contexts(contexts, student, teacher, config, work, log=log)
    if before is not None:
        table = join_baseline(table, before, after_meta=record, before_meta=before_meta)
    write_table(output, table, record)
    shutil.rmtree(work, ignore_errors=True)
    log(f"{len(table)} positions of {record['contexts']} contexts in {sum(record['seconds'].values()):.1f} s {record['seconds']} -> {output}")
    return table
