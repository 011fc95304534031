"""From the bytes of a server's reply to arrays: the top-k lists never become Python objects where they are regular.

A reply holds K triples a token, `[logprob, id, null]`. As Python lists they cost about 100 ns a triple, and ten times that while the
garbage collector follows the new lists around. Here the two big fields are cut out of the text, turned into lines by one pass over the
bytes and read by Arrow's CSV parser; the small rest goes through orjson. Irregular lists (short, null, with text, not finite) take the
general way, `TopK.from_reply`.

Shape suffixes: T positions, K entries.
"""

import gc
from contextlib import contextmanager

import numpy as np
import orjson

from ta_opd.errors import DataError
from ta_opd.topk import REPLY_FIELD, TopK

try:
    import pyarrow as pa
    import pyarrow.csv as pa_csv
except ImportError:
    pa = None

_LINES = bytes.maketrans(b":]", b",\n")
_NEWLINE = 10


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
    """TopK of `[[[logprob,id,null],...],...]` in raw[start:end] if every position has K unnamed entries, else None."""
    # From the ":" before it, or from the "," behind a leading null. "[" goes, "]" ends a line, "null" becomes nothing: lines of
    # ",logprob,id,", an empty line after each position and one more at the end.
    first = start + 5 if raw.startswith(b"[null,", start) else start - 1
    lines = raw[first:end].translate(_LINES, b"[ nul")
    ends = np.flatnonzero(np.frombuffer(lines, np.uint8) == _NEWLINE)[:-1]
    if ends.size % (K + 1) or ends.size // (K + 1) < length:
        return None
    ends_TK = ends.reshape(-1, K + 1)
    if (ends_TK[:, -1] != ends_TK[:, -2] + 1).any():
        return None
    skip = ends_TK.shape[0] - length
    if skip:
        lines = lines[ends_TK[skip - 1, -1] + 1 :]
    try:
        table = pa_csv.read_csv(
            pa.BufferReader(lines),
            read_options=pa_csv.ReadOptions(column_names=["", "logprob", "id", "text"], use_threads=False),
            convert_options=pa_csv.ConvertOptions(
                column_types={"logprob": pa.float64(), "id": pa.int32(), "text": pa.null()},
                include_columns=["logprob", "id"],
                null_values=[""],
            ),
        )
    except pa.ArrowInvalid:
        return None
    # Fewer lines than that: an empty line stood elsewhere too, so some positions were short.
    if table.num_rows != length * K or table["logprob"].null_count or table["id"].null_count:
        return None
    logprobs = table["logprob"].to_numpy()
    ids = table["id"].to_numpy()
    if not np.isfinite(logprobs).all() or ids.min() < 0:
        return None
    # astype copies: Arrow's own arrays are read-only.
    return TopK.from_arrays(ids.reshape(length, K).astype(np.int32), logprobs.reshape(length, K).astype(dtype))
