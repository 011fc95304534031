"""What goes to SGLang's /generate and what comes back: payloads as plain dicts, replies as arrays.

Shape suffixes: L response positions, K top-k width.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from slime.backends.sglang_utils import topk_rows
from ta_opd.errors import DataError
from ta_opd.reply import collector_paused, loads, read_reply
from ta_opd.slime_patch import teacher
from ta_opd.topk import TopK, gathered_logprobs, sampled_logprobs

# SGLang's fields for top-K as arrays: of scored prompts on any server, of sampled tokens on ours (server_topk.py).
_PACKED = {"return_flat_raw_top_logprobs": True, "return_flat_raw_top_logprobs_b64": True}
_PACKED_KEY = f'"{topk_rows.FIELD}":["'.encode()


@dataclass
class GenerateReply:
    """log_probs: float32 [L] of the sampled ids, at the sampling temperature. topk: student's top-K at every position.

    cached_tokens: ids of the prompt whose keys and values the server had already.
    """

    output_ids: list[int]
    log_probs: np.ndarray
    topk: TopK | None
    finish_reason: str
    weight_version: str
    text: str
    reply_bytes: int
    parse_seconds: float = 0.0
    url: str = ""
    cached_tokens: int = 0


@dataclass
class ScoreReply:
    """log_probs: float32 [L] of the response ids, at temperature 1. topk: the scorer's top-K. gathered: [L, n] at token_ids."""

    log_probs: np.ndarray
    topk: TopK | None
    gathered: np.ndarray | None
    weight_version: str
    reply_bytes: int
    parse_seconds: float = 0.0
    url: str = ""


def generate_payload(input_ids: Sequence[int], sampling_params: dict, top_k: int = 0, log_probs: bool = True) -> dict:
    payload = {"input_ids": list(input_ids), "sampling_params": sampling_params, "return_logprob": log_probs}
    if top_k > 0:
        payload |= {"top_logprobs_num": top_k, "return_text_in_logprobs": False, **_PACKED}
    return payload


def score_payload(
    input_ids: Sequence[int], response_length: int, top_k: int = 0, token_ids: Sequence[int] | None = None, whole: bool = False
) -> dict:
    """Scores the last `response_length` of `input_ids` and nothing before (`whole`: everything, for comparison).

    The top-K comes as base64 arrays where the server can.

    logprob_start_len is the last prompt token: the server answers null for the position it starts at, so the first value
    that counts is that of the first response token. DataError without a prompt token before the response.
    """
    if len(input_ids) <= response_length:
        raise DataError(
            f"scoring: expected a prompt of at least one token before the response, got {len(input_ids)} tokens of which "
            f"{response_length} are the response"
        )
    if token_ids is not None and not len(token_ids):
        token_ids = None
    payload = teacher.score_payload(input_ids, response_length, top_k, token_ids=token_ids, whole=whole)
    if top_k > 0:
        payload |= _PACKED
    return payload


def windows_payload(input_ids: Sequence[int], windows: Sequence[tuple[int, int, Sequence[int]]]) -> dict:
    """One batch request: for each (begin, end, ids), positions begin..end of the whole sequence scored at `ids`.

    Each is a request for input_ids[:end] whose prefix is in the server's cache.
    """
    tokens = list(input_ids)
    return {
        "input_ids": [tokens[:end] for _, end, _ in windows],
        "sampling_params": {"temperature": 0, "max_new_tokens": 0, "skip_special_tokens": False},
        "return_logprob": True,
        "logprob_start_len": [begin - 1 for begin, _, _ in windows],
        "return_text_in_logprobs": False,
        "token_ids_logprob": [[int(i) for i in ids] for _, _, ids in windows],
    }


def _meta(reply) -> dict:
    meta = reply.get("meta_info") if isinstance(reply, dict) else None
    if not isinstance(meta, dict):
        raise DataError(f"reply without meta_info: {str(reply)[:120]!r}")
    return meta


def _finish(meta: dict) -> str:
    reason = meta.get("finish_reason")
    return reason.get("type", "") if isinstance(reason, dict) else str(reason)


def parse_generate(raw: bytes, top_k: int = 0, log_probs: bool = True) -> GenerateReply:
    """DataError where ids, log-probs and top-k do not have one length. The top-K comes packed from our servers, as lists from others."""
    if top_k > 0 and _PACKED_KEY in raw:
        reply = loads(raw)
        topk = topk_rows.unpack_rows(_meta(reply).get(topk_rows.FIELD, []), top_k)
    elif top_k > 0:
        try:
            reply, topk = read_reply(raw, "student", top_k, _count_ids(raw))
        except (KeyError, TypeError) as error:
            raise DataError(f"generate: malformed reply ({type(error).__name__}: {error})") from error
    else:
        reply, topk = loads(raw), None
    meta = _meta(reply)
    ids = reply.get("output_ids")
    if ids is None:
        raise DataError("generate: the reply holds no output_ids")
    if topk is not None and len(topk) != len(ids):
        raise DataError(f"generate: expected the top-k of {len(ids)} tokens, got {len(topk)}")
    values = np.empty(0, np.float32)
    if log_probs:
        entries = meta.get("output_token_logprobs")
        if entries is None or len(entries) != len(ids):
            got = "none" if entries is None else len(entries)
            raise DataError(f"generate: expected {len(ids)} log-probs, one a sampled token, got {got}")
        values = sampled_logprobs(entries, len(ids))
        if not np.isfinite(values).all():
            raise DataError(f"generate: {int((~np.isfinite(values)).sum())} of {len(ids)} log-probs are not finite")
    return GenerateReply(
        ids, values, topk, _finish(meta), str(meta.get("weight_version", "")), reply.get("text") or "", len(raw),
        cached_tokens=int(meta.get("cached_tokens") or 0),
    )  # fmt: skip


def not_sampled(top_k: int = 0) -> GenerateReply:
    """The reply to a request that was taken back before a server had it."""
    return GenerateReply([], np.empty(0, np.float32), TopK.empty(0, top_k) if top_k else None, "abort", "", "", 0)


def _count_ids(raw: bytes) -> int:
    """Number of output_ids, from the text."""
    begin = raw.find(b'"output_ids":[')
    end = raw.find(b"]", begin)
    if begin < 0 or end < 0:
        raise DataError("generate: the reply holds no output_ids")
    ids = raw[begin + len(b'"output_ids":[') : end].strip()
    return ids.count(b",") + 1 if ids else 0


def parse_score(raw: bytes, response_length: int, top_k: int = 0, token_ids: Sequence[int] | None = None) -> ScoreReply:
    """DataError where fewer than `response_length` positions came back or a log-prob is missing."""
    meta = _meta(loads(raw))
    if _finish(meta) == "abort":
        raise DataError("score: the server aborted the request")
    if meta.get("input_token_logprobs") is None:
        raise DataError("score: the reply holds no input_token_logprobs; does the server return log-probs at all?")
    values = sampled_logprobs(meta["input_token_logprobs"], response_length)
    if np.isnan(values).any():
        raise DataError(f"score: {int(np.isnan(values).sum())} of {response_length} log-probs are missing")
    topk = score_topk(meta, top_k, response_length) if top_k > 0 else None
    gathered = _gathered(meta, response_length, token_ids) if token_ids is not None and len(token_ids) else None
    return ScoreReply(values, topk, gathered, str(meta.get("weight_version", "")), len(raw))


def parse_windows(raw: bytes, windows: Sequence[tuple[int, int, Sequence[int]]]) -> list[np.ndarray]:
    """float32 [end - begin, len(ids)] for each window, in the order of `ids`."""
    replies = loads(raw)
    if not isinstance(replies, list) or len(replies) != len(windows):
        got = len(replies) if isinstance(replies, list) else 1
        raise DataError(f"score: expected {len(windows)} windows back, got {got}")
    out = []
    for reply, (begin, end, ids) in zip(replies, windows, strict=True):
        meta = _meta(reply)
        if _finish(meta) == "abort":
            raise DataError("score: the server aborted a window")
        out.append(_gathered(meta, end - begin, ids))
    return out


def score_topk(meta: dict, top_k: int, length: int) -> TopK:
    """The scorer's top-K from either form of reply: base64 arrays, or lists of [log-prob, id, text]."""
    if "input_top_logprobs_val_flat_b64" not in meta:
        return TopK.from_reply(meta, "teacher", top_k, length)
    try:
        rows, width = meta["input_top_logprobs_shape"]
        logprobs = np.frombuffer(base64.b64decode(meta["input_top_logprobs_val_flat_b64"]), np.float32).reshape(rows, width)
        ids = np.frombuffer(base64.b64decode(meta["input_top_logprobs_idx_flat_b64"]), np.int32).reshape(rows, width)
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(f"score: the packed top-k of the reply is damaged ({error})") from error
    if rows < length:
        raise DataError(f"score: expected the top-k of {length} positions, got {rows}")
    if rows > length:  # a copy: a part of the reply must not keep all of it
        ids, logprobs = ids[rows - length :].copy(), logprobs[rows - length :].copy()
    topk = TopK(ids, logprobs)
    if width != top_k or not np.isfinite(topk.logprobs).all():
        return _width(topk.checked(), top_k)
    return topk


def _width(topk: TopK, top_k: int) -> TopK:
    if topk.K >= top_k:
        return TopK(topk.ids[:, :top_k].copy(), topk.logprobs[:, :top_k].copy())
    wide = TopK.empty(topk.T, top_k, topk.logprobs.dtype)
    wide.ids[:, : topk.K], wide.logprobs[:, : topk.K] = topk.ids, topk.logprobs
    return wide


def _gathered(meta: dict, length: int, token_ids: Sequence[int]) -> np.ndarray:
    entries = meta.get("input_token_ids_logprobs")
    if entries is None:
        raise DataError("score: the reply holds no input_token_ids_logprobs")
    if len(entries) < length:
        raise DataError(f"score: expected log-probs of asked ids at {length} positions, got {len(entries)}")
    entries = entries[len(entries) - length :]
    try:  # the usual case: every position answers all ids in the order they were asked
        with collector_paused():
            flat = np.array([[entry[0] for entry in position] for position in entries], np.float32).reshape(length, -1)
        if flat.shape[1] == len(token_ids) and [entry[1] for entry in entries[0]] == list(token_ids):
            return flat
    except (TypeError, ValueError, IndexError):
        pass
    ids_LN = np.broadcast_to(np.asarray(token_ids, np.int32), (length, len(token_ids)))
    return gathered_logprobs(entries, ids_LN)
