"""From a scored table to what a selector sees, so that the diagnostic asks the very code that would choose tokens in training.

Two sources of the quantities (all before training when `suffix` is "_base"):

- `full`: full-vocabulary entropy (over the logarithm of the vocabulary) and divergence, exact C on the student's top-K (paper, table 8).
- `online`: what the training loop would see, computed by `ta_opd.metrics` from the table's raw top-K lists.

Shape suffix: T tokens, samples one after another.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from ta_opd.errors import ConfigError, DataError
from ta_opd.fixed_context.support import RAW_TOPK, parse_lists
from ta_opd.metrics import METRIC_COLUMNS, token_metrics
from ta_opd.topk import PAD_ID, TopK

SOURCES = ("full", "online")
_FULL = {"H": "Hs_full", "KLf": "KLf_full", "KLr": "KLr_full", "C": "Cmass_true", "CBC": "CBC"}


@dataclass(frozen=True)
class SelectorInputs:
    """Arguments of `ta_opd.selection.select_tokens`, and `rows` [T]: the table row of each token. top-K is None when the table has none."""

    metrics: dict[str, np.ndarray]
    valid: np.ndarray
    response_lengths: np.ndarray
    rows: np.ndarray
    student: TopK | None
    teacher: TopK | None
    sampled_ids: np.ndarray
    notes: tuple[str, ...]

    def arguments(self) -> dict:
        return {"student": self.student, "teacher": self.teacher, "sampled_ids": self.sampled_ids}


def selector_inputs(
    table: pd.DataFrame, *, source: str = "online", support: str = "union_tail", suffix: str = "_base", usable: np.ndarray | None = None
) -> SelectorInputs:
    """Metrics of every row of `table`, ordered by sample_ordinal and tok_pos.

    usable [rows] bool: rows that may be kept (default all); rows with loss_mask 0 never may. support: the divergence of source `online`.
    Raises ConfigError on an unknown source, DataError when the table lacks what the source needs or repeats a position.
    """
    if source not in SOURCES:
        raise ConfigError(f"selector inputs: expected source {' or '.join(SOURCES)}, got {source!r}")
    for name in ("sample_ordinal", "tok_pos", "token_id"):
        if name not in table:
            raise DataError(f"selector inputs: the table has no column {name}")
    rows = np.lexsort((table["tok_pos"].to_numpy(), table["sample_ordinal"].to_numpy()))
    ordered = table.iloc[rows]
    samples = ordered["sample_ordinal"].to_numpy()
    if (ordered["tok_pos"].to_numpy()[1:] <= ordered["tok_pos"].to_numpy()[:-1])[samples[1:] == samples[:-1]].any():
        raise DataError("selector inputs: a position occurs twice; one row a (sample_ordinal, tok_pos) is expected")
    lengths = np.diff(np.flatnonzero(np.concatenate([[True], samples[1:] != samples[:-1], [True]])))
    valid = np.ones(len(table), bool) if usable is None else np.asarray(usable, bool)[rows]
    if "loss_mask" in ordered:
        valid = valid & (ordered["loss_mask"].fillna(1).to_numpy() != 0)
    student, teacher = (_topk(ordered, side, suffix) for side in ("student", "teacher"))
    notes = []
    if source == "online" and student is None:
        notes.append("the table has no raw top-K lists: selectors see the stored columns instead of the online ones")
    metrics = _metrics(ordered, lengths, source, support, suffix, student, teacher)
    return SelectorInputs(metrics, valid, lengths, rows, student, teacher, ordered["token_id"].to_numpy(), tuple(notes))


def _metrics(ordered, lengths, source, support, suffix, student, teacher) -> dict[str, np.ndarray]:
    def column(name, required=False):
        for candidate in (name + suffix,):
            if candidate in ordered:
                return ordered[candidate].to_numpy(float)
        if required:
            raise DataError(f"selector inputs of source {source!r} need the column {name + suffix}; score the bank before training too")
        return None

    if student is None:
        stored = {name: column(name) for name in METRIC_COLUMNS}
        metrics = {name: values for name, values in stored.items() if values is not None}
        if source == "full" or not {"Hs_topk_norm", "KLf_union", "Cmass"} <= set(metrics):
            metrics |= {name: column(full, True) for name, full in
                        (("Hs_topk_norm", "Hs_full"), ("KLf_union", "KLf_full"), ("Cmass", "Cmass_true"))}  # fmt: skip
            metrics["Hs_topk_norm"] = metrics["Hs_topk_norm"] / np.log(_vocabulary(ordered))
        return metrics
    shared = {
        "sampled_ids": ordered["token_id"].to_numpy(), "student_logprobs": column("student_logp_sampled"),
        "teacher_logprobs": column("teacher_logp_sampled"), "response_lengths": lengths,
    }  # fmt: skip
    if source == "full":
        exact = {key: column(name, key != "CBC") for key, name in _FULL.items()}
        exact = {key: values for key, values in exact.items() if values is not None}
        exact["vocab_size"] = _vocabulary(ordered, student, teacher)
        return token_metrics(student, teacher, support="exact", exact=exact, **shared)
    metrics = token_metrics(student, teacher, support=support, **shared)
    mass = column("Cmass_true")
    if mass is not None:
        known = np.isfinite(mass)
        metrics["Cmass_exact"] = known.astype(np.int8)
        metrics["Cmass_true"] = mass
        metrics["Cmass"] = np.where(known, mass, metrics["Cmass"])
    return metrics


def _vocabulary(ordered: pd.DataFrame, *sides: TopK) -> int:
    """Size of the vocabulary as far as the ids of the table show it: entropies are divided by its logarithm."""
    return max(2, 1 + max(int(ordered["token_id"].max()), *(int(side.ids.max(initial=0)) for side in sides), 0))


def _topk(ordered: pd.DataFrame, side: str, suffix: str) -> TopK | None:
    names = [f"{name}{suffix}" for name in RAW_TOPK if name.startswith(side)]
    if not all(name in ordered for name in names):
        return None
    ids, logps = (parse_lists(ordered[name], name) for name in names)
    if ids.shape != logps.shape:
        raise DataError(f"columns {names[0]} and {names[1]}: expected lists of equal lengths")
    if ids.shape[1] == 0:
        return None
    real = np.isfinite(ids) & np.isfinite(logps)
    return TopK(np.where(real, ids, PAD_ID).astype(np.int32), np.where(real, logps, -np.inf)).checked()
