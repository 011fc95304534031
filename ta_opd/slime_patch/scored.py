"""Scored samples of slime as arrays: those of this tree have them, those of a stock checkout carry lists and replies. No maths here.

Shape suffixes: T response tokens of several samples one after another, L of one sample, K entries of a top-k.
"""

import logging
import re
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from ta_opd.errors import DataError
from ta_opd.selection import SelectionConfig
from ta_opd.slime_patch.options import reply_dtype, selects
from ta_opd.topk import TopK, TopKParts, gathered_logprobs, last_positions

logger = logging.getLogger(__name__)
STUDENT_KEY = "student_top_logprobs"  # sample.metadata: the student's top-k, one list a position
said: set[str] = set()


@dataclass
class Scored:
    """One sample with response tokens as arrays. ordinal: its place in the batch."""

    sample: Any
    ordinal: int
    student: TopK
    teacher: TopK
    teacher_at_student: np.ndarray | None
    valid_L: np.ndarray
    student_logprobs_L: np.ndarray | None
    teacher_logprobs_L: np.ndarray | None

    @property
    def length(self) -> int:
        return self.sample.response_length


class Stacked(NamedTuple):
    """What all positions of some samples have, one sample after another."""

    student: TopKParts
    teacher: TopKParts
    token_ids_T: np.ndarray


def from_arrays(options: SimpleNamespace, sample: Any, ordinal: int) -> Scored:
    student, teacher = sample.student_topk, sample.teacher_topk
    for side, topk in (("student", student), ("teacher", teacher)):
        if topk is None:
            if selects(SelectionConfig.from_args(options)):
                raise DataError(
                    f"{name_of(sample, ordinal)} has no {side} top-k, which opd_budget_mask {options.opd_budget_mask} needs; "
                    f"set opd_topk_metrics_k >= 1 (now {options.opd_topk_metrics_k})"
                )
        elif topk.T != sample.response_length:
            raise DataError(f"{name_of(sample, ordinal)}: {side} top-k has {topk.T} positions, expected {sample.response_length}")
    k = next((topk.K for topk in (student, teacher) if topk is not None), max(options.opd_topk_metrics_k, 1))
    empty = TopK.empty(sample.response_length, k)
    known = getattr(sample, "teacher_at_student_ids", None)
    return Scored(
        sample, ordinal, student if student is not None else empty, teacher if teacher is not None else empty,
        known, _valid(sample, ordinal),
        _vector(sample.rollout_log_probs, sample, ordinal, "rollout_log_probs"),
        _vector(sample.teacher_log_probs, sample, ordinal, "teacher_log_probs"),
    )  # fmt: skip


def from_reply(options: SimpleNamespace, sample: Any, ordinal: int, log_probs: Any, reply: Any, required: bool) -> Scored:
    student = getattr(sample, "student_topk", None)
    if student is None:
        student = _student_from_metadata(options, sample, ordinal, required)
    teacher = getattr(sample, "teacher_topk", None)
    known = getattr(sample, "teacher_at_student_ids", None)
    if teacher is None:
        teacher, known = _teacher_from_reply(options, sample, ordinal, reply, student, required)
    return Scored(
        sample, ordinal, student, teacher, known, _valid(sample, ordinal),
        _vector(getattr(sample, "rollout_log_probs", None), sample, ordinal, "rollout_log_probs"),
        _vector(log_probs, sample, ordinal, "teacher_log_probs"),
    )  # fmt: skip


def _student_from_metadata(options: SimpleNamespace, sample: Any, ordinal: int, required: bool) -> TopK:
    length, k = sample.response_length, max(options.opd_topk_metrics_k, 1)
    metadata = getattr(sample, "metadata", None) or {}
    stored = metadata.get(STUDENT_KEY)
    if stored is None or len(stored) != length:
        got = "nothing" if stored is None else f"{len(stored)} positions"
        message = f'{name_of(sample, ordinal)}: expected metadata["{STUDENT_KEY}"] with {length} positions, got {got}'
        if required:
            raise DataError(
                f"{message}; ask the student server for top_logprobs_num={options.opd_topk_metrics_k} with each request"
            )
        say(f"{message}; its metrics are those of empty lists")
        return TopK.empty(length, k, reply_dtype(options))
    if not isinstance(stored, TopK):
        stored = metadata[STUDENT_KEY] = TopK.from_lists(stored, k, dtype=reply_dtype(options))
    return stored


def _teacher_from_reply(
    options: SimpleNamespace, sample: Any, ordinal: int, reply: Any, student: TopK, required: bool
) -> tuple[TopK, np.ndarray | None]:
    length, k = sample.response_length, max(options.opd_topk_metrics_k, 1)
    meta_info = reply.get("meta_info") if isinstance(reply, dict) else None
    try:
        if not isinstance(meta_info, dict):
            raise DataError(f"expected the teacher's reply with meta_info, got {type(reply).__name__}")
        teacher = TopK.from_reply(meta_info, "teacher", k, length, dtype=reply_dtype(options))
        asked = meta_info.get("input_token_ids_logprobs") if options.opd_exact_cmass else None
        if not asked or not any(asked):
            return teacher, None
        entries = last_positions(asked, length, "input_token_ids_logprobs")
        released = options.opd_profile == "released"
        return teacher, gathered_logprobs(entries, student.ids, dtype=reply_dtype(options), absent_is_zero=released)
    except DataError as error:
        if required:
            raise DataError(f"{name_of(sample, ordinal)}: {error}") from error
        say(f"{name_of(sample, ordinal)}: {error}; its teacher metrics are those of empty lists")
        return TopK.empty(length, k, reply_dtype(options)), None


def _valid(sample: Any, ordinal: int) -> np.ndarray:
    if sample.loss_mask is None:
        return np.ones(sample.response_length, bool)
    if len(sample.loss_mask) != sample.response_length:
        raise DataError(
            f"{name_of(sample, ordinal)}: loss_mask has {len(sample.loss_mask)} entries, expected {sample.response_length}"
        )
    return np.asarray(sample.loss_mask).astype(bool)


def _vector(values: Any, sample: Any, ordinal: int, what: str) -> np.ndarray | None:
    if values is None:
        return None
    values_L = np.asarray(values)
    if values_L.shape != (sample.response_length,):
        raise DataError(f"{name_of(sample, ordinal)}: {what} has shape {values_L.shape}, expected ({sample.response_length},)")
    if values_L.dtype == object:  # None among the numbers
        values_L = np.array([np.nan if value is None else value for value in values], np.float64)
    return values_L


def stack(options: SimpleNamespace, scored: list[Scored]) -> Stacked:
    """Raises DataError where top-k differ in K or known ids in shape."""
    k = scored[0].student.K
    for s in scored:
        if s.student.K != k or s.teacher.K != k:
            raise DataError(
                f"{name_of(s.sample, s.ordinal)}: top-k of {s.student.K} (student) and {s.teacher.K} (teacher), expected {k} "
                "as in the first sample"
            )
        if s.teacher_at_student is not None and s.teacher_at_student.shape != s.student.ids.shape:
            raise DataError(
                f"{name_of(s.sample, s.ordinal)}: teacher_at_student_ids has shape {s.teacher_at_student.shape}, "
                f"expected {s.student.ids.shape}"
            )
    student, teacher = TopKParts([s.student for s in scored]), TopKParts([s.teacher for s in scored])
    if options.opd_profile == "released":  # its numbers are float64; those of servers are float32
        student, teacher = student.astype(np.float64), teacher.astype(np.float64)
    return Stacked(student, teacher, np.concatenate([np.asarray(s.sample.tokens[-s.length :], np.int32) for s in scored]))


def known_at_student_ids(scored: list[Scored]) -> np.ndarray | None:
    """Teacher log-probs at the student's ids [T, K], NaN where unknown; None where no sample has any."""
    if all(s.teacher_at_student is None for s in scored):
        return None
    unknown = (np.full(s.student.ids.shape, np.nan, np.float32) for s in scored)
    return np.concatenate([s.teacher_at_student if s.teacher_at_student is not None else u for s, u in zip(scored, unknown, strict=True)])


def join(scored: list[Scored], name: str) -> np.ndarray | None:
    """Attribute `name` of all samples, [T]; NaN where a sample has none, None where no sample has any."""
    values = [getattr(s, name) for s in scored]
    if all(v is None for v in values):
        return None
    return np.concatenate([np.full(s.length, np.nan) if v is None else v for s, v in zip(scored, values, strict=True)])


def name_of(sample: Any, ordinal: int) -> str:
    return f"sample {ordinal} (index {getattr(sample, 'index', None)})"


def say(message: str) -> None:
    """Warn once: messages that differ only in their numbers count as the same."""
    key = re.sub(r"\d+", "#", message)
    if key not in said:
        said.add(key)
        logger.warning("%s", message)
