"""TA-OPD in a stock slime checkout without touching a file, through slime's own hooks:

    --custom-generate-function-path     ta_opd.slime_patch.hooks.generate
    --custom-rm-path                    ta_opd.slime_patch.hooks.reward_func
    --custom-reward-post-process-path   ta_opd.slime_patch.hooks.post_process_rewards
    --custom-rollout-log-function-path  ta_opd.slime_patch.hooks.log_rollout      (names the true rollout id)
    --custom-config-path                a YAML file with the opd_* options

slime itself is imported only inside the functions that need it. docs/porting.md shows a complete command line.
"""

import asyncio
import copy
import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np

from ta_opd.errors import ConfigError, DataError
from ta_opd.slime_patch.options import check_training, reply_dtype, resolve
from ta_opd.slime_patch.scored import STUDENT_KEY
from ta_opd.slime_patch.slime.rollout import tip_compat as packaged_tip_compat
from ta_opd.slime_patch.teacher import reply_logprobs, score_sample
from ta_opd.topk import TopK

__all__ = ["close_token_banks", "generate", "log_rollout", "post_process_rewards", "reward_func"]

EVALUATION_KEY = "ta_opd_evaluation"  # sample.metadata: this response is for evaluation, not for the teacher
_ADDED = ("student_topk", "teacher_topk", "teacher_at_student_ids")


async def generate(args: Any, sample: Any, sampling_params: dict[str, Any], evaluation: bool = False) -> Any:
    """Sample one response as slime's own `generate`, and ask for the student's top-k along with it.

    The top-k arrives as `sample.student_topk`; a response that is continued (partial rollout) appends to it. Evaluation
    responses go through slime's `generate` unchanged. Raises ConfigError for image prompts (see docs/porting.md).
    """
    from slime.rollout import sglang_rollout as stock

    options = resolve(args)
    if evaluation:
        sample.metadata = {**(sample.metadata or {}), EVALUATION_KEY: True}
    if evaluation or options.opd_topk_metrics_k == 0:
        return await stock.generate(args, sample, sampling_params)
    return await _generate_with_topk(args, sample, dict(sampling_params), options, stock)


async def _generate_with_topk(args: Any, sample: Any, sampling_params: dict[str, Any], options: Any, stock: Any) -> Any:
    from slime.utils.http_utils import post

    if any(value is not None for value in (getattr(sample, "multimodal_inputs", None) or {}).values()):
        raise ConfigError("ta_opd.slime_patch.hooks.generate samples text prompts; for images see docs/porting.md")
    k, dtype, before = options.opd_topk_metrics_k, reply_dtype(options), sample.response_length
    sampling_params["max_new_tokens"] -= before
    if sampling_params["max_new_tokens"] <= 0:
        sample.status = type(sample).Status.TRUNCATED
        return sample
    if not sample.tokens:
        if not isinstance(sample.prompt, str):
            raise DataError(f"sample {sample.index}: expected a prompt string, got {type(sample.prompt).__name__}; "
                            "pass --apply-chat-template for chat messages")  # fmt: skip
        sample.tokens = list(stock.GenerateState(args).tokenizer.encode(sample.prompt, add_special_tokens=False))
    payload = {
        "input_ids": list(sample.tokens),
        "sampling_params": sampling_params,
        "return_logprob": True,
        "top_logprobs_num": k,
        "return_text_in_logprobs": False,
    }
    if getattr(args, "use_rollout_routing_replay", False):
        payload["return_routed_experts"] = True
    headers = {}
    if getattr(sample, "session_id", None) and getattr(args, "router_policy", None) == "consistent_hashing":
        headers = {"headers": {"X-SMG-Routing-Key": sample.session_id}}
    output = await post(f"http://{args.sglang_router_ip}:{args.sglang_router_port}/generate", payload, **headers)
    meta_info = output["meta_info"]
    sampled = meta_info.get("output_token_logprobs") or []
    _append(args, sample, [item[1] for item in sampled], [item[0] for item in sampled], output)
    new = TopK.from_reply(meta_info, "student", k, len(sampled), dtype=dtype)
    old = getattr(sample, "student_topk", None)
    sample.student_topk = TopK.concat([old if old is not None else TopK.empty(before, k, dtype), new])
    return sample


def _append(args: Any, sample: Any, tokens: list[int], log_probs: list[float], output: dict) -> None:
    meta_info, text = output["meta_info"], output.get("text", "")
    if hasattr(sample, "append_response_tokens"):
        sample.append_response_tokens(args, tokens=tokens, log_probs=log_probs, trainable=True, meta_info=meta_info, text=text)
        return
    sample.rollout_log_probs = [*(sample.rollout_log_probs or [0.0] * sample.response_length), *log_probs]
    sample.tokens = [*sample.tokens, *tokens]
    sample.response_length += len(tokens)
    sample.response += text
    if sample.loss_mask is not None:
        sample.loss_mask = [*sample.loss_mask, *([1] * len(tokens))]
    sample.update_from_meta_info(args, meta_info)


async def reward_func(args: Any, sample: Any, **kwargs: Any) -> Any:
    """Score a sample (or a list of them, for `--group-rm`) on the teacher at `args.rm_url`; the reward is 0.0.

    The teacher's reply becomes arrays on the sample at once (teacher_log_probs, teacher_topk, teacher_at_student_ids); only
    the response is scored. Distillation has no scalar reward, and a float, unlike a reply, is what slime's own reward
    statistics expect. Evaluation responses (marked by `generate`) get slime's reward of `--rm-type` instead.
    Raises ServiceError when the teacher does not answer after retries, DataError when it answers something else.
    """
    if isinstance(sample, (list, tuple)):
        return list(await asyncio.gather(*(reward_func(args, one, **kwargs) for one in sample)))
    if (getattr(sample, "metadata", None) or {}).get(EVALUATION_KEY):
        return await _evaluation_reward(args, sample, **kwargs)
    options = resolve(args)
    if options.opd_topk_metrics_k > 0 and getattr(sample, "student_topk", None) is None:
        stored = (sample.metadata or {}).get(STUDENT_KEY)
        if stored is not None:  # a checkout whose own generate was extended, as the released code's
            sample.student_topk = TopK.from_lists(stored, options.opd_topk_metrics_k, dtype=reply_dtype(options))
            sample.metadata.pop(STUDENT_KEY)
        elif options.opd_exact_cmass and sample.response_length:
            raise DataError(f"sample {getattr(sample, 'index', None)} has no student top-k, which opd_exact_cmass needs; "
                            "pass --custom-generate-function-path ta_opd.slime_patch.hooks.generate")  # fmt: skip
    try:
        await score_sample(options, sample, _teacher_url(args, sample), _images(sample))
    except DataError as error:
        raise DataError(f"sample {getattr(sample, 'index', None)}: {error}") from error
    return 0.0


def _teacher_url(args: Any, sample: Any) -> str:
    urls = getattr(args, "rm_url", None)
    if not urls:
        raise ConfigError("rm_url: expected the /generate URL of the teacher (--rm-url), got nothing")
    return urls if isinstance(urls, str) else urls[(getattr(sample, "index", None) or 0) % len(urls)]


def _images(sample: Any) -> list | None:
    images = (getattr(sample, "multimodal_inputs", None) or {}).get("images")
    if not images:
        return None
    from slime.utils.processing_utils import encode_image_for_rollout_engine

    return [encode_image_for_rollout_engine(image) for image in images]


async def _evaluation_reward(args: Any, sample: Any, **kwargs: Any) -> Any:
    from slime.rollout.rm_hub import async_rm

    plain = copy.copy(args)
    plain.custom_rm_path = None
    if not (getattr(plain, "rm_type", None) or sample.metadata.get("rm_type")):
        raise ConfigError("evaluation needs an answer check: pass --rm-type (math, f1, ...), or drop --eval-interval")
    return await async_rm(plain, sample, **kwargs)


def tip_compat() -> ModuleType:
    """The adapter in use: slime/rollout/tip_compat.py where it was copied into the checkout, else the one of this package."""
    try:
        return importlib.import_module("slime.rollout.tip_compat")
    except ModuleNotFoundError as error:
        if error.name not in ("slime", "slime.rollout", "slime.rollout.tip_compat"):
            raise
        return packaged_tip_compat


def close_token_banks() -> None:
    """Write everything that is queued for token banks; returns when it is on disk. At the end of the process this is done anyway."""
    tip_compat().close_token_banks()


def post_process_rewards(args: Any, samples: Sequence[Any], **kwargs: Any) -> tuple[list[float], list[float]]:
    """Measure, select and export the rollout batch; returns two lists of 0.0 (raw and processed rewards).

    Sets `sample.teacher_log_probs` (float32 tensor [L]) and, through `tip_compat().process_tip_compat_metrics`, the mask.
    Takes samples scored by `reward_func` as well as samples whose reward is the teacher's whole reply. Replies and top-k
    arrays are dropped afterwards. Raises ConfigError, DataError.
    """
    import torch

    check_training(args)
    if samples and isinstance(samples[0], (list, tuple)):
        samples = [sample for group in samples for sample in group]
    replies, log_probs = [], []
    for sample in samples:
        reply = sample.reward
        if isinstance(reply, dict) and "meta_info" in reply:
            values = reply_logprobs(reply["meta_info"], sample.response_length)
        else:
            values = getattr(sample, "teacher_log_probs", None)
            if values is None:
                raise DataError(f"sample {getattr(sample, 'index', None)} was not scored by the teacher: reward is {reply!r:.80}; "
                                "pass --custom-rm-path ta_opd.slime_patch.hooks.reward_func")  # fmt: skip
        replies.append(reply)
        log_probs.append(np.asarray(values, np.float64))
    tip_compat().process_tip_compat_metrics(args, samples, log_probs, replies)
    for sample, values in zip(samples, log_probs, strict=True):
        sample.teacher_log_probs = torch.from_numpy(values.astype(np.float32))
        sample.reward = 0.0
        (getattr(sample, "metadata", None) or {}).pop(STUDENT_KEY, None)
        for name in _ADDED:
            sample.__dict__.pop(name, None)
    return [0.0] * len(samples), [0.0] * len(samples)


def log_rollout(rollout_id: int, args: Any, samples: Any, rollout_extra_metrics: Any, rollout_time: float) -> bool:
    """Hand the true rollout id to `post_process_rewards`; returns False, so that slime logs as usual."""
    args.rollout_id = int(rollout_id)
    return False
