"""From the bytes of a server's reply to arrays: the top-k lists never become Python objects where they are regular.

A reply holds K triples a token, `[logprob, id, null]`. As Python lists they cost about 100 ns a triple, and ten times that while the
garbage collector follows the new lists around. Here the two big fields are cut out of the text; one pass finds the commas, whose distances
show whether every position has K triples, and Arrow reads the numbers where they stand. The small rest goes through orjson. Irregular
lists (short, null, with text, not finite) take the general way, `TopK.from_reply`.

Shape suffixes: T positions, K entries, N = T x K.
"""

import gc
from contextlib import contextmanager

import numpy as np
import orjson

from ta_opd.errors import DataError
from ta_opd.topk import REPLY_FIELD, TopK

try:
    import pyarrow as pa
except ImportError:
    pa = None

_LARGEST_OFFSET = np.iinfo(np.int32).max


@contextmanager
def collector_paused():
    """No cyclic garbage collection inside: many fresh containers and not one cycle would make it run for nothing."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def loads(raw: bytes) -> dict:
    """A whole reply as Python objects. Raises DataError when it is no JSON."""
    with collector_paused():
        try:
            return orjson.loads(raw)
        except orjson.JSONDecodeError as error:
            raise DataError(f"the server's reply is no JSON ({error}): {raw[:200]!r}") from error


def read_reply(raw: bytes, side: str, K: int, length: int, *, dtype=np.float32) -> tuple[dict, TopK]:
    """(reply, top-k of its last `length` positions) from the bytes of one /generate reply.

    In the returned reply the top-k field may be replaced by null. side: "student" reads `output_top_logprobs`, "teacher"
    `input_top_logprobs`. The TopK equals `TopK.from_reply` of the parsed reply, on which it falls back. Raises DataError as that does.
    """
    if side not in REPLY_FIELD:
        raise DataError(f"side: expected 'student' or 'teacher', got {side!r}")
    cut = _cut_field(raw, REPLY_FIELD[side].encode()) if pa is not None and K > 0 and length > 0 else None
    if cut is not None:
        start, end = cut
        topk = _regular_topk(raw, start, end, K, length, dtype)
        if topk is not None:
            return loads(raw[:start] + b"null" + raw[end:]), topk
    with collector_paused():
        reply = loads(raw)
        return reply, TopK.from_reply(reply["meta_info"], side, K, length, dtype=dtype)


def _cut_field(raw: bytes, field: bytes) -> tuple[int, int] | None:
    """Where the value of a top-k field starts and ends, or None when it does not look regular."""
    key = b'"' + field + b'":'
    at = raw.find(key)
    start = at + len(key)
    if at < 0 or not raw.startswith(b"{") or not raw.startswith((b"[[[", b"[null,[["), start):
        return None
    next_name = raw.find(b'"', start)
    end = raw.rfind(b"]]]", start, next_name if next_name >= 0 else len(raw))
    return (start, end + 3) if end >= 0 else None


def _regular_topk(raw: bytes, start: int, end: int, K: int, length: int, dtype) -> TopK | None:
    """TopK of `[[[logprob,id,null],...],...]` in raw[start:end] if every position has K such triples, else None."""
    if len(raw) > _LARGEST_OFFSET:
        return None
    # From the "[[" of the first position; the end of the text stands for the comma behind the last triple.
    first = start + 6 if raw.startswith(b"[null,", start) else start + 1
    text = np.frombuffer(raw, np.uint8, end - first, first)
    commas = np.append(np.flatnonzero(text == ord(",")), end - first)
    if commas.size % (3 * K) or commas.size // (3 * K) < length:
        return None
    # Behind the log-prob, behind the id, behind the triple.
    after_logprob_N, after_id_N, after_N = (commas[place::3] for place in range(3))
    # What lies between the last two: ",null]" inside a position, ",null]]" where one ends, ",null]]]" at the end of all.
    widths_TK = (after_N - after_id_N).reshape(-1, K)
    regular = (widths_TK[:, :-1] == 6).all() and (widths_TK[:-1, -1] == 7).all() and widths_TK[-1, -1] == 8
    starts_N = np.empty_like(after_N)
    starts_N[0] = 2
    np.add(after_N[:-1], 2, out=starts_N[1:])
    starts_N[K::K] += 1
    if not regular or (starts_N > after_logprob_N).any():
        return None
    rows = slice(starts_N.size - length * K, None)
    try:
        logprobs = _numbers(raw, starts_N[rows] + first, after_logprob_N[rows] + first, pa.float64())
        ids = _numbers(raw, after_logprob_N[rows] + (first + 1), after_id_N[rows] + first, pa.int32())
    except pa.ArrowInvalid:
        return None
    if not np.isfinite(logprobs).all() or ids.min() < 0:
        return None
    # astype copies: Arrow's own arrays are read-only, and hold twice what is wanted.
    return TopK.from_arrays(ids.astype(np.int32).reshape(length, K), logprobs.astype(dtype).reshape(length, K))


def _numbers(raw: bytes, starts_N: np.ndarray, ends_N: np.ndarray, kind) -> np.ndarray:
    """[N] numbers of Arrow type `kind` written in raw[start:end] each, in order and without overlap. ArrowInvalid where one is none.

    To Arrow it is one column of 2N strings that follow one another in the text: every second one is a number, those between are null.
    """
    N = starts_N.size
    offsets = np.empty(2 * N + 1, np.int32)
    offsets[:-1:2], offsets[1::2], offsets[-1] = starts_N, ends_N, ends_N[-1]
    buffers = [pa.py_buffer(b"\x55" * (N // 4 + 1)), pa.py_buffer(offsets), pa.py_buffer(raw)]
    numbers = pa.Array.from_buffers(pa.string(), 2 * N, buffers, N).cast(kind)
    return np.frombuffer(numbers.buffers()[1], kind.to_pandas_dtype(), 2 * N)[::2]
