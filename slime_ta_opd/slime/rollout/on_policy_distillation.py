"""Scoring of sampled responses by the teacher.

`reward_func` and `post_process_rewards` are the released entry points and work in a stock slime checkout with only the
ta-opd package installed. This tree scores through `score_sample`, with its own client. Shape suffixes: L response
positions, K top-k width.
"""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np

from ta_opd.slime_patch.hooks import post_process_rewards, reward_func
from ta_opd.slime_patch.teacher import exact_windows, limit_ids, merge_known
from ta_opd.topk import PAD_ID, TopK

__all__ = ["needs_exact", "post_process_rewards", "reward_func", "score_sample"]

# Ids that one batch request of windows may carry (each window repeats its prefix); more are sent as several requests.
_IDS_PER_REQUEST = 400_000


def needs_exact(args: Any) -> bool:
    """Whether the teacher is to be asked for its log-probs at every one of the student's top-K ids."""
    loss = getattr(args, "opd_loss_type", "") or ""
    by_loss = loss.startswith("topk") and getattr(args, "opd_topk_support", "teacher") == "student"
    return bool(getattr(args, "opd_exact_cmass", False)) or by_loss


async def score_sample(args: Any, sample: Any, client: Any) -> None:
    """Scores the response of `sample` with the teacher behind `client` and stores arrays on it; the reply is dropped.

    Sets teacher_log_probs (float32 [L]), with opd_topk_metrics_k > 0 teacher_topk, and where `needs_exact`
    teacher_at_student_ids (float32 [L, K], NaN where the teacher was not asked, -inf beyond its vocabulary). Raises
    ServiceError when no teacher answers within --teacher-timeout, DataError when it answers something else.
    """
    length, k = sample.response_length, args.opd_topk_metrics_k
    vocabulary = (getattr(args, "student_config", None) or {}).get("vocab_size")
    if length == 0:
        sample.teacher_log_probs = np.zeros(0, np.float32)
        sample.teacher_topk = TopK.empty(0, k) if k else None
        if k and needs_exact(args):
            sample.teacher_at_student_ids = np.zeros((0, k), np.float32)
        return
    reply = await client.score(sample.tokens, length, k, whole=getattr(args, "score_whole_sequence", False))
    teacher_topk = within_vocabulary(reply.topk, vocabulary) if k else None
    if k and needs_exact(args):
        known_LK = await _ask_missing(args, sample, teacher_topk, client, reply.url)
        sample.teacher_at_student_ids = known_LK.astype(np.float32, copy=False)
    # all at once, when nothing is waited for any more: a sample whose scoring was cut off is scored again from the start
    sample.teacher_log_probs, sample.teacher_topk = reply.log_probs, teacher_topk


def within_vocabulary(topk: TopK, size: int | None) -> TopK:
    """Without entries at or beyond `size`: a teacher's padded vocabulary may be larger than the student's."""
    if size is None or not len(topk) or int(topk.ids.max()) < size:
        return topk
    outside_LK = topk.ids >= size
    return TopK(
        np.where(outside_LK, PAD_ID, topk.ids).astype(np.int32), np.where(outside_LK, -np.inf, topk.logprobs).astype(np.float32)
    ).checked()


async def _ask_missing(args: Any, sample: Any, teacher_topk: TopK, client: Any, url: str) -> np.ndarray:
    """[L, K] teacher log-probs at the student's top-K ids: what the first reply does not hold comes from short windows over the
    prefix that it left in the teacher's cache."""
    student_LK, prompt = sample.student_topk.ids, sample.prompt_length
    # thousands of small steps for a long response: in a thread, so that other samples' requests go out meanwhile
    known_LK, missing_LK, windows = await asyncio.to_thread(_missing, args, student_LK, teacher_topk, getattr(client, "vocab_size", None))

    async def ask(part: list) -> None:
        asked = [(prompt + start, prompt + end, ids) for start, end, ids in part]
        answers = await client.score_windows(sample.tokens, asked, prefer=url)
        for (start, end, ids), answer_WN in zip(part, answers, strict=True):
            # ids are sorted (np.unique): the column of each student id, where it was asked at all
            block_WK = student_LK[start:end]
            column_WK = np.minimum(np.searchsorted(ids, block_WK), len(ids) - 1)
            take_WK = missing_LK[start:end] & (ids[column_WK] == block_WK)
            found_WK = np.take_along_axis(answer_WN, column_WK, axis=1)
            np.copyto(known_LK[start:end], found_WK, where=take_WK & ~np.isnan(found_WK))

    await asyncio.gather(*(ask(part) for part in _parts(windows, prompt)))
    return known_LK


def _missing(args: Any, student_LK: np.ndarray, teacher_topk: TopK, teacher_vocabulary: int | None) -> tuple[np.ndarray, np.ndarray, list]:
    """(known log-probs [L, K], NaN where unknown; bool [L, K], where one is missing; windows (begin, end, ids) to ask for)."""
    known_LK = merge_known(student_LK, teacher_topk)
    missing_LK = np.isnan(known_LK) & (student_LK != PAD_ID)
    if teacher_vocabulary is not None:
        beyond_LK = missing_LK & (student_LK >= teacher_vocabulary)
        known_LK[beyond_LK] = -np.inf
        missing_LK &= ~beyond_LK
    max_ids = getattr(args, "opd_exact_cmass_max_union", 4096)
    overflow = getattr(args, "opd_exact_cmass_overflow", "fallback")
    window = getattr(args, "opd_exact_cmass_window", None)
    cut = ((b, e, limit_ids(ids, max_ids, overflow)) for b, e, ids in exact_windows(student_LK, ~missing_LK, max_ids=max_ids, window=window))
    return known_LK, missing_LK, [(begin, end, ids) for begin, end, ids in cut if ids is not None]


def _parts(windows: list, prompt: int) -> list[list]:
    """Windows in runs of at most _IDS_PER_REQUEST ids in all."""
    parts, size = [], 0
    for window in windows:
        cost = prompt + window[1]
        if not parts or size + cost > _IDS_PER_REQUEST:
            parts.append([])
            size = 0
        parts[-1].append(window)
        size += cost
    return parts
