"""THE manifest of per-token fields between the rollout and the trainer: one line a field.

A line says where a value comes from, its dtype and shape, what pads it, and whether context parallelism slices it.
Collecting from samples, checking lengths, splitting over data-parallel ranks and packing all read this table; adding a
field is adding a line. Shapes: P prompt length, L response length, K top-k width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from slime.utils.types import Sample
from ta_opd.errors import DataError


@dataclass(frozen=True)
class Field:
    name: str
    dtype: np.dtype
    shape: str  # "PL", "L" or "LK"
    pad: float
    read: Callable[[Sample], np.ndarray | None]
    row: str | None = None  # its name in losses.types.Rows
    cp_sliced: bool = True
    required: bool = False


def _part(attribute: str, part: str) -> Callable[[Sample], np.ndarray | None]:
    def read(sample: Sample) -> np.ndarray | None:
        value = getattr(sample, attribute)
        return None if value is None else getattr(value, part)

    return read


def _weights(sample: Sample) -> np.ndarray:
    valid = sample.valid_mask().astype(np.float32)
    return valid if sample.opd_weights is None else valid * sample.opd_weights


_I, _F = np.dtype(np.int32), np.dtype(np.float32)
FIELDS: tuple[Field, ...] = (
    Field("tokens", _I, "PL", 0, lambda s: np.asarray(s.tokens), required=True),
    Field("loss_masks", _F, "L", 0, lambda s: s.valid_mask(), required=True),
    Field("opd_weights", _F, "L", 0, _weights, row="weight_R", required=True),
    Field("rollout_log_probs", _F, "L", 0, lambda s: s.rollout_log_probs, row="student_logp_old_R"),
    Field("teacher_log_probs", _F, "L", 0, lambda s: s.teacher_log_probs, row="teacher_logp_R"),
    Field("teacher_topk_ids", _I, "LK", -1, _part("teacher_topk", "ids"), row="teacher_ids_RK"),
    Field("teacher_topk_logprobs", _F, "LK", -np.inf, _part("teacher_topk", "logprobs"), row="teacher_logps_RK"),
    Field("student_topk_ids", _I, "LK", -1, _part("student_topk", "ids"), row="student_ids_RK"),
    Field("student_topk_logprobs", _F, "LK", -np.inf, _part("student_topk", "logprobs")),
    Field("teacher_at_student_ids", _F, "LK", np.nan, lambda s: s.teacher_at_student_ids, row="teacher_at_student_RK"),
)
FIELD_NAMES = tuple(f.name for f in FIELDS)
# Always shipped where the rollout has them: the trainer logs its distance to both.
LOGGED = ("rollout_log_probs", "teacher_log_probs")
PER_SAMPLE = ("response_lengths", "sample_indices", "rewards", "truncated")


def collect(samples: Sequence[Sample], names: Sequence[str] | None = None) -> dict[str, list]:
    """Samples -> {field: one array a sample}; `names` restricts the optional fields to those a loss needs.

    Raises DataError where an array's length is not the sample's, or where only some samples carry a field.
    """
    data: dict[str, list] = {
        "response_lengths": [s.response_length for s in samples],
        "sample_indices": [-1 if s.index is None else s.index for s in samples],
        "rewards": [float(s.reward) if isinstance(s.reward, (int, float)) else 0.0 for s in samples],
        "truncated": [s.truncated for s in samples],
    }
    for f in FIELDS:
        if names is not None and not f.required and f.name not in names:
            continue
        values = [f.read(s) for s in samples]
        known = [v for v, s in zip(values, samples, strict=True) if v is not None and s.response_length > 0]
        if not known and not f.required:
            continue
        if f.shape != "PL":  # a response without a token has every field
            nothing = np.zeros((0, *np.shape(known[0])[1:]) if known else 0, f.dtype)
            values = [nothing if v is None and s.response_length == 0 else v for v, s in zip(values, samples, strict=True)]
        present = sum(v is not None for v in values)
        if present != len(values):
            missing = next(s.index for s, v in zip(samples, values, strict=True) if v is None)
            raise DataError(
                f"field {f.name}: {present} of {len(values)} samples carry it (first without: sample {missing}); "
                "expected all or none. A reply was probably lost; look at the rollout log."
            )
        arrays = [np.asarray(v, dtype=f.dtype) for v in values]
        for sample, array in zip(samples, arrays, strict=True):
            expected = len(sample.tokens) if f.shape == "PL" else sample.response_length
            if len(array) != expected:
                raise DataError(f"field {f.name} of sample {sample.index}: expected {expected} rows, got {len(array)}")
        data[f.name] = arrays
    return data


def take(data: dict, indices: Sequence[int]) -> dict:
    """The given samples of `data`, in that order; entries that are not per-sample lists are kept as they are."""
    per_sample = set(FIELD_NAMES) | set(PER_SAMPLE)
    return {k: [v[i] for i in indices] if k in per_sample else v for k, v in data.items()}


def for_rows(row_fields: Iterable[str]) -> list[str]:
    """Names of the fields to ship for a loss that needs these `Rows` fields."""
    wanted = set(row_fields)
    return [f.name for f in FIELDS if f.required or f.row in wanted or f.name in LOGGED]
