"""The mask made by a plain Python loop, as a stock choice to compare with: give it to `--opd-selector-path`.

    --opd-selector-path benchmarks/gpu/stock_selector.py:entropy      (or dlearn_high, divergence, tip, ca_softor)

Metrics, scores and the ranking are those of benchmarks/selection_oracle.py, one float at a time. In the first rollout it also compares
its kept tokens with those of `ta_opd` under the same profile and writes one line to the file that STOCK_CHECK names.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from benchmarks import selection_oracle as oracle  # noqa: E402
from ta_opd.selection import select_tokens  # noqa: E402
from ta_opd.selectors.registry import Batch, Scored  # noqa: E402

COLUMN = {"dlearn_high": "Dlearn", "entropy": "H_norm", "divergence": "D_norm", "tip": "tip_score", "ca_softor": "ca_softor_score"}


def as_lists(topk) -> list:
    """[T] lists of [log-prob, id, text], as a reply in JSON has them."""
    pairs = zip(topk.logprobs.astype(np.float64).tolist(), topk.ids.tolist(), strict=True)
    return [[[logprob, token, None] for logprob, token in zip(*row, strict=True) if token >= 0] for row in pairs]


def loop_scores(batch: Batch, mask: str) -> Scored:
    """Ranking score [T] of the tokens that the loop keeps: they are the only candidates."""
    student, teacher, sampled_T = batch.topk()
    began, config = time.perf_counter(), batch.config
    sides, ends = [as_lists(student), as_lists(teacher)], np.cumsum(batch.response_lengths)
    spans = [slice(end - length, end) for end, length in zip(ends.tolist(), batch.response_lengths.tolist(), strict=True)]
    sampled = sampled_T.tolist()
    table = oracle.rows([(sides[0][s], sides[1][s], sampled[s]) for s in spans], student.K)
    valid = batch.valid.tolist()
    released = config.profile == "released"
    oracle.score(table, valid, population=config.population, softor=config.softor_source)
    kept = oracle.select(table, valid, COLUMN[mask], config.ratio, min_keep=config.min_keep, on_top=released,
                         top_up="ca_softor" if released else "own", float_ceil=released)  # fmt: skip
    seconds = time.perf_counter() - began
    keep_T = np.zeros(batch.valid.size, bool)
    keep_T[list(kept)] = True
    if batch.rollout_id == 0 and os.environ.get("STOCK_CHECK"):
        _check(batch, mask, keep_T, seconds)
    return Scored(keep_T.astype(np.float64), candidates=keep_T)


def _check(batch: Batch, mask: str, keep_T: np.ndarray, seconds: float) -> None:
    ours = select_tokens(dict(batch.columns), batch.valid, batch.response_lengths, replace(batch.config, mask=mask, selector_path=None),
                         rollout_id=batch.rollout_id, student=batch.student, teacher=batch.teacher, sampled_ids=batch.sampled_ids)  # fmt: skip
    line = {"mask": mask, "tokens": int(batch.valid.size), "kept_by_loop": int(keep_T.sum()), "kept_by_ta_opd": int(ours.keep.sum()),
            "kept_by_one_only": int((ours.keep != keep_T).sum()), "loop_seconds": seconds}  # fmt: skip
    Path(os.environ["STOCK_CHECK"]).write_text(json.dumps(line) + "\n")


def dlearn_high(batch: Batch) -> Scored:
    """Dlearn by the loop."""
    return loop_scores(batch, "dlearn_high")


def entropy(batch: Batch) -> Scored:
    """Student entropy by the loop."""
    return loop_scores(batch, "entropy")


def divergence(batch: Batch) -> Scored:
    """Forward KL by the loop."""
    return loop_scores(batch, "divergence")


def tip(batch: Batch) -> Scored:
    """Soft-OR of entropy and divergence by the loop."""
    return loop_scores(batch, "tip")


def ca_softor(batch: Batch) -> Scored:
    """Soft-OR of entropy and learnable divergence by the loop."""
    return loop_scores(batch, "ca_softor")
