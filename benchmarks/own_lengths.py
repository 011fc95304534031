"""Rollouts whose responses end one after another, for the services benchmark and its stand-ins, and what a kept rollout holds."""

from __future__ import annotations

import gc
import sys

import numpy as np
import psutil

from slime.rollout.sampling import append_reply, shared_ids
from slime.utils import memory


def own_length(index: int, longest: int) -> int:
    """Between a half of `longest` and all of it: responses of a real rollout do not all end at one moment."""
    return int(np.random.default_rng([7, index]).integers(longest // 2, longest + 1))


def own_params(index: int, length: int) -> dict:
    return {"temperature": 1.0, "max_new_tokens": length, "ignore_eos": True, "sampling_seed": index}


async def sample_of_own_length(args, sample, sampling_params, client):
    params = own_params(sample.index, own_length(sample.index, args.rollout_max_response_len))
    append_reply(sample, await client.generate(sample.tokens, params, args.opd_topk_metrics_k), args.opd_topk_metrics_k)
    return sample


class PreparedIds:
    """Hands out prepared ids in the place of a tokenizer."""

    chat_template = None

    def __init__(self, prompts):
        self.prompts = prompts

    def __call__(self, texts, add_special_tokens=False):
        return {"input_ids": self.prompts[: len(texts)]}


def resident() -> int:
    """Bytes of this process in memory, without what the allocator keeps for later."""
    gc.collect()
    memory.return_unused()
    return psutil.Process().memory_info().rss


def take_metrics(samples) -> int:
    """Takes the metric columns off, as selection does right after a rollout; the bytes they held."""
    size = 0
    for sample in samples:
        size += sum(values.nbytes for values in (sample.token_metrics or {}).values())
        sample.token_metrics = None
    memory.return_unused()
    return size


def held_bytes(samples) -> int:
    """Bytes that the samples' per-token data hold: arrays, token lists (of numbers that all rollouts share), texts."""
    size, shared = 0, {id(t) for t in shared_ids(range(max(max(s.tokens) for s in samples) + 1))}
    for sample in samples:
        size += sys.getsizeof(sample.tokens) + sys.getsizeof(sample.response)
        size += sum(sys.getsizeof(t) for t in sample.tokens if id(t) not in shared)
        for array in (sample.rollout_log_probs, sample.teacher_log_probs, sample.teacher_at_student_ids):
            size += 0 if array is None else array.nbytes
        for topk in (sample.student_topk, sample.teacher_topk):
            size += 0 if topk is None else topk.ids.nbytes + topk.logprobs.nbytes
    return size
