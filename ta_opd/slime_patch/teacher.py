"""Scoring a response with a teacher behind a SGLang server: what to ask, in which windows, and how to put it together.

The pure parts (`score_payload`, `exact_windows`, `merge_known`) serve this project's own client as well; `score_sample` is a
plain aiohttp client for a stock slime checkout.

Shape suffixes: T or L response positions, K entries of the student's top-k.
"""

import asyncio
import weakref
from collections.abc import Sequence
from typing import Any

import aiohttp
import numpy as np

from ta_opd.errors import ConfigError, DataError, ServiceError
from ta_opd.slime_patch.options import reply_dtype
from ta_opd.token_bank import jsonio
from ta_opd.topk import PAD_ID, TopK, gathered_logprobs, last_positions, sampled_logprobs

try:
    from ta_opd.reply import read_reply
except ImportError:  # needs orjson, which the port may not have
    read_reply = None

WINDOW = 16
_RETRIED = (408, 429, 500, 502, 503, 504)
_gates: "weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore]" = weakref.WeakKeyDictionary()


def score_payload(
    tokens: Sequence[int], length: int, top_k: int, *, token_ids: Sequence[int] | None = None, whole: bool = False
) -> dict[str, Any]:
    """Body of a /generate request that scores the last `length` of `tokens` and samples nothing.

    Asks for the log-prob of each of these tokens, for the `top_k` best ids at each, and for the log-probs of `token_ids` at each.
    The prompt is not scored (`whole`: it is, for servers that expand the input, so that positions are only known from the end).
    """
    payload = {
        "input_ids": list(tokens),
        "sampling_params": {"temperature": 0, "max_new_tokens": 0, "skip_special_tokens": False},
        "return_logprob": True,
        "logprob_start_len": 0 if whole else max(len(tokens) - length - 1, 0),
        "return_text_in_logprobs": False,
    }
    if top_k > 0:
        payload["top_logprobs_num"] = top_k
    if token_ids is not None:
        payload["token_ids_logprob"] = [int(token) for token in token_ids]
    return payload


def merge_known(student_ids_TK: np.ndarray, teacher: TopK) -> np.ndarray:
    """[T, K] teacher log-probs at the student's ids as far as the teacher's own top-k has them, NaN elsewhere."""
    out_TK = np.full(student_ids_TK.shape, np.nan, teacher.logprobs.dtype)
    for column in range(teacher.K):  # K small passes of [T, K], never a [T, K, K] array
        hit_TK = (student_ids_TK == teacher.ids[:, column, None]) & (student_ids_TK != PAD_ID)
        out_TK = np.where(hit_TK, teacher.logprobs[:, column, None], out_TK)
    return out_TK


def exact_windows(
    student_ids_TK: np.ndarray, known_TK: np.ndarray | None = None, *, max_ids: int, window: int | None = None
) -> list[tuple[int, int, np.ndarray]]:
    """Response windows to score again, each with the few ids that are still missing in it: [(start, end, ids)].

    A stock server answers every requested id at every scored position, so one request for the union of a whole response costs
    T x union numbers; over short windows of a cached prefix it is little. student_ids_TK: -1 where padded. known_TK: bool,
    already answered. max_ids: most ids of one request; a window with more is halved until it fits. A single position with more
    comes back with all its ids: the caller decides. Positions without missing ids fall in no window.
    """
    if window is None:
        window = WINDOW
    missing_TK = student_ids_TK != PAD_ID
    if known_TK is not None:
        missing_TK = missing_TK & ~known_TK
    windows: list[tuple[int, int, np.ndarray]] = []
    for start in range(0, len(student_ids_TK), window):
        _cut(student_ids_TK, missing_TK, start, min(start + window, len(student_ids_TK)), max_ids, windows)
    return windows


def _cut(ids_TK, missing_TK, start: int, end: int, max_ids: int, windows: list) -> None:
    rows = np.flatnonzero(missing_TK[start:end].any(axis=1))
    if not rows.size:
        return
    start, end = start + int(rows[0]), start + int(rows[-1]) + 1
    union = np.unique(ids_TK[start:end][missing_TK[start:end]])
    if union.size <= max_ids or end - start == 1:
        windows.append((start, end, union))
        return
    middle = (start + end) // 2
    _cut(ids_TK, missing_TK, start, middle, max_ids, windows)
    _cut(ids_TK, missing_TK, middle, end, max_ids, windows)


def limit_ids(ids: np.ndarray, max_ids: int, overflow: str) -> np.ndarray | None:
    """What to ask where one position alone misses more than `max_ids` ids: None (fallback), the first ones (truncate), or
    ConfigError (error)."""
    if ids.size <= max_ids:
        return ids
    if overflow == "error":
        raise ConfigError(
            f"one position needs {ids.size} ids, more than opd_exact_cmass_max_union {max_ids}; raise it, or choose "
            "opd_exact_cmass_overflow fallback or truncate"
        )
    return ids[:max_ids] if overflow == "truncate" else None


async def score_sample(options: Any, sample: Any, url: str, images: list | None = None) -> None:
    """Score one sample on the teacher at `url` and store arrays on it; nothing of the reply is kept.

    Sets teacher_log_probs [L] float64, and with opd_topk_metrics_k > 0 teacher_topk, with opd_exact_cmass
    teacher_at_student_ids [L, K] (needs the student's TopK in `student_topk`). options: `options.resolve(args)`.
    Raises ServiceError when the teacher does not answer, DataError when it answers something else.
    """
    length, k, tokens = sample.response_length, options.opd_topk_metrics_k, list(sample.tokens)
    if length == 0:
        sample.teacher_log_probs = np.zeros(0)
        return
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=options.request_timeout)) as session:
        payload = score_payload(tokens, length, k, whole=bool(images))
        if images:
            payload["image_data"] = images
        content = await _post(options, session, url, payload)
        meta_info, topk = _read(content, url, k, length, reply_dtype(options))
        del content
        sample.teacher_log_probs = reply_logprobs(meta_info, length)
        if k == 0:
            return
        if topk is None:
            topk = TopK.from_reply(meta_info, "teacher", k, length, dtype=reply_dtype(options))
        sample.teacher_topk = topk
        if options.opd_exact_cmass:
            known_LK = merge_known(sample.student_topk.ids, sample.teacher_topk)
            if not images:  # with images the server's positions are only known from the end
                await _ask_missing(options, session, url, tokens, length, sample.student_topk.ids, known_LK)
            sample.teacher_at_student_ids = known_LK


async def _ask_missing(options, session, url, tokens, length, student_ids_LK, known_LK) -> None:
    """Fill `known_LK` with what the teacher answers window by window."""
    max_ids, prompt = options.opd_exact_cmass_max_union, len(tokens) - length

    async def ask(start: int, end: int, ids: np.ndarray) -> None:
        payload = score_payload(tokens[: prompt + end], end - start, 0, token_ids=ids)
        meta_info = _meta_info(_parse(await _post(options, session, url, payload), url), url)
        entries = last_positions(meta_info.get("input_token_ids_logprobs"), end - start, "input_token_ids_logprobs")
        answer = gathered_logprobs(entries, student_ids_LK[start:end], dtype=known_LK.dtype)
        block = known_LK[start:end]
        np.copyto(block, answer, where=np.isnan(block) & ~np.isnan(answer))

    asked = []
    for start, end, ids in exact_windows(
        student_ids_LK, ~np.isnan(known_LK), max_ids=max_ids, window=options.opd_exact_cmass_window
    ):
        ids = limit_ids(ids, max_ids, options.opd_exact_cmass_overflow)
        if ids is not None:
            asked.append(ask(start, end, ids))
    await asyncio.gather(*asked)


def reply_logprobs(meta_info: dict, length: int) -> np.ndarray:
    """[length] teacher log-probs of the response tokens, float64, of a reply. Raises DataError where one is missing."""
    entries = meta_info.get("input_token_logprobs")
    if length == 0:
        return np.zeros(0)
    if entries is None:
        raise DataError("input_token_logprobs is missing from the teacher's reply; ask with return_logprob=true")
    values_L = sampled_logprobs(entries, length, dtype=np.float64)
    if np.isnan(values_L).any():
        raise DataError(
            f"the teacher's reply has no log-prob at response position {int(np.isnan(values_L).argmax())} of {length}; "
            "was logprob_start_len too late?"
        )
    return values_L


def _meta_info(reply: Any, url: str) -> dict:
    meta_info = reply.get("meta_info") if isinstance(reply, dict) else None
    if not isinstance(meta_info, dict):
        raise DataError(f"{url}: expected a /generate reply with meta_info, got {str(reply)[:200]!r}")
    return meta_info


def _read(content: bytes, url: str, k: int, length: int, dtype: type) -> tuple[dict, TopK | None]:
    """meta_info of a reply, and its top-k where the fast reader takes it (then meta_info lacks the lists)."""
    if k > 0 and read_reply is not None:
        try:
            reply, topk = read_reply(content, "teacher", k, length, dtype=dtype)
            return _meta_info(reply, url), topk
        except (DataError, KeyError, TypeError):
            pass  # not as expected: the general way reads it, or says what is wrong
    return _meta_info(_parse(content, url), url), None


def _gate(options: Any) -> asyncio.Semaphore:
    loop = asyncio.get_running_loop()
    if loop not in _gates:
        _gates[loop] = asyncio.Semaphore(max(int(options.teacher_concurrency), 1))
    return _gates[loop]


async def _post(options: Any, session: aiohttp.ClientSession, url: str, payload: dict) -> bytes:
    """The reply's bytes; failures of the network and of a busy server are tried again with growing pauses."""
    body, problem = jsonio.dumps(payload), ""
    for attempt in range(int(options.request_retries) + 1):
        if attempt:
            await asyncio.sleep(min(0.5 * 2 ** (attempt - 1), 30.0))
        try:
            async with _gate(options), session.post(url, data=body, headers={"Content-Type": "application/json"}) as response:
                content = await response.read()
            if response.status < 400:
                return content
            problem = f"HTTP {response.status}: {content[:300].decode(errors='replace')}"
            if response.status not in _RETRIED:
                break
        except (aiohttp.ClientError, TimeoutError) as error:
            problem = f"{type(error).__name__}: {error}"
    raise ServiceError(f"teacher {url}: no answer after {attempt + 1} requests; the last said: {problem}. Is the server up?")


def _parse(content: bytes, url: str) -> Any:
    try:
        return jsonio.loads(content)
    except ValueError as error:
        raise DataError(f"{url}: the reply is not JSON ({error})") from error
