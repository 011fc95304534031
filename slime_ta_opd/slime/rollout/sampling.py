"""One response from the student: what is asked of the server, and how a reply becomes part of a Sample."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np

from slime.utils.types import Sample
from ta_opd.errors import ServiceError
from ta_opd.topk import TopK

_EMPTY_ABORTS = 50
_ids: list[int] = []


def shared_ids(ids: Sequence[int]) -> list[int]:
    """The same ids as objects that all samples share: 8 bytes a token instead of 36."""
    if len(ids):
        _ids.extend(range(len(_ids), max(ids) + 1))
    return [_ids[i] for i in ids]


def sampling_params(args: Any, evaluation: bool = False) -> dict[str, Any]:
    """Sampling parameters of training or evaluation, without the length, which depends on the prompt."""
    if evaluation:
        params = {"temperature": args.eval_temperature, "top_p": args.eval_top_p, "top_k": args.eval_top_k}
    else:
        params = {"temperature": args.rollout_temperature, "top_p": args.rollout_top_p, "top_k": args.rollout_top_k}
    params |= {"skip_special_tokens": False, "spaces_between_special_tokens": False}
    if getattr(args, "rollout_stop", None):
        params |= {"stop": args.rollout_stop, "no_stop_trim": True}
    if getattr(args, "rollout_stop_token_ids", None):
        params["stop_token_ids"] = args.rollout_stop_token_ids
    return params


def sampling_seed(seed: int, index: int, evaluation: bool) -> int:
    """A 31-bit seed of its own for every response of a run, the same in every run of that seed."""
    text = f"{seed}/{'eval' if evaluation else 'train'}/{index}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "little") & 0x7FFFFFFF


def room_for(args: Any, sample: Sample, max_response_len: int) -> int:
    """Tokens that may still be sampled within the response and the context length."""
    room = max_response_len - sample.response_length
    context = getattr(args, "rollout_max_context_len", None)
    return min(room, context - len(sample.tokens)) if context else room


async def sample_response(
    args: Any, sample: Sample, client: Any, params: dict, *, top_k: int, max_response_len: int, evaluation: bool, stopping
) -> None:
    """Samples until the response is complete, going on where it stands (a partial one, or an aborted request).

    `stopping()` true: an aborted response is left as it is, with status ABORTED.
    """
    params = {**params, "sampling_seed": sampling_seed(args.rollout_seed, sample.index or 0, evaluation)}
    prompt = hash(tuple(sample.tokens[: sample.prompt_length]))
    empty = 0
    while sample.status in (Sample.Status.PENDING, Sample.Status.ABORTED) and not stopping():
        room = room_for(args, sample, max_response_len)
        if room <= 0:
            sample.status = Sample.Status.TRUNCATED
            return
        reply = await client.generate(sample.tokens, {**params, "max_new_tokens": room}, top_k, log_probs=not evaluation, key=prompt)
        append_reply(sample, reply, top_k)
        if sample.status is Sample.Status.ABORTED and not stopping():
            empty = 0 if reply.output_ids else empty + 1
            if empty > _EMPTY_ABORTS:
                raise ServiceError(f"student at {reply.url} ended the request {empty} times without a token; is it paused?")
            await asyncio.sleep(0.1)


def append_reply(sample: Sample, reply: Any, top_k: int) -> None:
    """Adds the sampled tokens and their arrays to `sample` and sets its status."""
    before, new = sample.response_length, len(reply.output_ids)
    sample.tokens = list(sample.tokens) + shared_ids(reply.output_ids)  # a sum has no room to spare
    sample.response_length = before + new
    if len(reply.log_probs) == new:
        parts = [] if sample.rollout_log_probs is None else [sample.rollout_log_probs]
        sample.rollout_log_probs = np.concatenate([*parts, reply.log_probs])
    if top_k:
        old = [] if sample.student_topk is None else [sample.student_topk]
        sample.student_topk = TopK.concat([*old, reply.topk])
    if sample.loss_mask is not None:
        sample.loss_mask = [*sample.loss_mask, *([1] * new)]
    versions = sample.weight_versions
    if versions and versions[-1][0] == reply.weight_version:
        versions[-1][1] += new
    elif new:
        versions.append([reply.weight_version, new])
    finish = {"stop": Sample.Status.COMPLETED, "length": Sample.Status.TRUNCATED, "abort": Sample.Status.ABORTED}
    sample.status = finish.get(reply.finish_reason, Sample.Status.COMPLETED)


async def call_custom(function: Any, args: Any, sample: Sample, params: dict, client: Any, evaluation: bool) -> None:
    """A user's generate function, slime's signature (args, sample, sampling_params); client and evaluation if it takes them."""
    accepted = inspect.signature(function).parameters
    extra = {name: value for name, value in (("client", client), ("evaluation", evaluation)) if name in accepted}
    result = await function(args, sample, params, **extra)
    if isinstance(result, Sample) and result is not sample:
        sample.__dict__.update(result.__dict__)


def without_tokens(sample: Sample, top_k: int, log_probs: bool) -> None:
    """Empty arrays for a response of no token (of a user's generate function, say), so that it has every field that others have."""
    sample.rollout_log_probs = np.empty(0, np.float32) if log_probs else None
    sample.student_topk = TopK.empty(0, top_k) if top_k else None


def restart(sample: Sample) -> Sample:
    """The sample as its bare prompt again."""
    sample.tokens = sample.tokens[: sample.prompt_length]
    sample.response, sample.response_length, sample.status = "", 0, Sample.Status.PENDING
    sample.loss_mask = sample.rollout_log_probs = sample.student_topk = None
    sample.teacher_log_probs = sample.teacher_topk = sample.teacher_at_student_ids = None
    sample.weight_versions = []
    sample.metadata.pop("stale_tokens", None)
    return sample
