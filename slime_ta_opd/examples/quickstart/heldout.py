"""Frozen held-out contexts of the quick start: sampled once by the initial student, scored before and after every run."""

from __future__ import annotations

import shutil
from pathlib import Path

from ta_opd.fixed_context import bank as context_bank
from ta_opd.fixed_context.join import join_baseline
from ta_opd.fixed_context.sampling import SamplingConfig, read_prompts, sample_bank
from ta_opd.fixed_context.scoring import ScoringConfig, score_contexts
from ta_opd.fixed_context.tables import read_meta, read_table, write_table
from ta_opd.report.loading import FIXED_CONTEXT_FILE

SEED = 41717


def make_bank(path: Path, heldout: Path, student: Path, *, contexts: int, max_response_tokens: int) -> Path:
    """The context bank at `path`: one response of the initial student to each of the first `contexts` held-out prompts."""
    config = SamplingConfig(
        num_contexts=contexts, max_response_tokens=max_response_tokens, seed=SEED, device="cpu", dtype="float32", batch_tokens=1 << 20
    )
    bank, record = sample_bank(read_prompts(heldout), str(student), config)
    return context_bank.write_bank(path, bank, record)


def score(bank: Path, student: Path, teacher: Path, output: Path, *, topk: int, baseline: Path | None = None) -> Path:
    """Full-vocabulary scores of every position of the bank (fp32), joined with those of `baseline` where one is given."""
    config = ScoringConfig(topk=(topk,), student_device="cpu", teacher_device="cpu", dtype="float32", workspace_gib=0.25)
    contexts, parts = context_bank.load_contexts(bank), output.with_suffix(".parts")
    table, record = score_contexts(contexts, student, teacher, config, parts)
    shutil.rmtree(parts, ignore_errors=True)
    if baseline is not None:
        table = join_baseline(table, read_table(baseline), after_meta=record, before_meta=read_meta(baseline))
    return write_table(output, table, record)


def score_run(directory: Path, bank: Path, teacher: Path, baseline: Path, *, topk: int) -> Path:
    """Scores of the final student of a run, in the file where the report looks for them."""
    return score(bank, directory / "hf", teacher, directory / FIXED_CONTEXT_FILE, topk=topk, baseline=baseline)
