"""One position's top-K as one short text: what a server of ours puts into a reply in the place of K triples.

A row is the K ids (int32) and then the K log-probs (float32), both little-endian, padded with zeros to a multiple of three bytes, in
base64: every row of one K has the same number of characters, and rows may be joined and decoded at once.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence

import numpy as np

from ta_opd.errors import DataError
from ta_opd.topk import TopK

FIELD = "output_top_logprobs_rows"  # of meta_info: one text a sampled token


def row_bytes(K: int) -> int:
    return (8 * K + 2) // 3 * 3


def pack_rows(ids_TK: np.ndarray, logprobs_TK: np.ndarray) -> list[str]:
    """[T, K] ids and log-probs -> T texts."""
    T, K = ids_TK.shape
    rows = np.zeros((T, row_bytes(K)), np.uint8)
    rows[:, : 4 * K] = np.ascontiguousarray(ids_TK, "<i4").view(np.uint8)
    rows[:, 4 * K : 8 * K] = np.ascontiguousarray(logprobs_TK, "<f4").view(np.uint8)
    text, width = base64.b64encode(rows).decode("ascii"), row_bytes(K) // 3 * 4
    return [text[i : i + width] for i in range(0, len(text), width)]


def unpack_rows(rows: Sequence[str], K: int) -> TopK:
    """T texts -> top-K of T positions. DataError where one is not a row of K entries."""
    width = row_bytes(K) // 3 * 4
    try:
        raw = base64.b64decode("".join(rows), validate=True)
    except (TypeError, ValueError, binascii.Error) as error:
        raise DataError(f"generate: the packed top-k of the reply is damaged ({error})") from error
    if len(raw) != len(rows) * row_bytes(K) or any(len(row) != width for row in rows):
        raise DataError(f"generate: expected rows of {width} characters (K = {K}), got {sorted({len(row) for row in rows})[:4]}")
    bytes_TB = np.frombuffer(raw, np.uint8).reshape(len(rows), row_bytes(K))
    ids = np.ascontiguousarray(bytes_TB[:, : 4 * K]).view("<i4")
    return TopK(ids, np.ascontiguousarray(bytes_TB[:, 4 * K : 8 * K]).view("<f4"))
