"""Top-K arrays: what a server returned for each position, as two padded arrays instead of lists of lists.

Shape suffixes: T positions, K entries kept per position, N flat entries.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from operator import itemgetter

import numpy as np

from ta_opd.errors import DataError

PAD_ID = -1
_FIRST = itemgetter(0)
_SECOND = itemgetter(1)
REPLY_FIELD = {"student": "output_top_logprobs", "teacher": "input_top_logprobs"}


@dataclass(frozen=True)
class TopK:
    """The K best tokens of every position, best first as the server returned them.

    ids: [T, K] int32, padded with -1. logprobs: [T, K] float32 or float64 natural logs, padded with -inf. The real entries of a row
    come first and have different ids (`from_lists` sees to both; `checked()` does for arrays built by hand).
    Raises DataError when the two arrays do not match.
    """

    ids: np.ndarray
    logprobs: np.ndarray

    def __post_init__(self):
        if self.ids.ndim != 2 or self.ids.shape != self.logprobs.shape:
            raise DataError(
                f"top-k: expected ids and logprobs of one shape [T, K], got {self.ids.shape} and {self.logprobs.shape}"
            )
        if self.ids.dtype != np.int32 or self.logprobs.dtype not in (np.float32, np.float64):
            raise DataError(
                "top-k: expected int32 ids and float32 or float64 logprobs, "
                f"got {self.ids.dtype} and {self.logprobs.dtype}"
            )

    @property
    def T(self) -> int:
        return self.ids.shape[0]

    @property
    def K(self) -> int:
        return self.ids.shape[1]

    @property
    def dtype(self) -> np.dtype:
        return self.logprobs.dtype

    def __len__(self) -> int:
        return self.ids.shape[0]

    def __getitem__(self, rows) -> "TopK":
        """Rows by slice, index array or mask; a single integer gives a TopK of one row."""
        if isinstance(rows, (int, np.integer)):
            rows = slice(rows, rows + 1) if rows != -1 else slice(-1, None)
        return TopK(self.ids[rows], self.logprobs[rows])

    def mass(self) -> np.ndarray:
        """[T] total probability of the returned entries (not clamped)."""
        return np.exp(self.logprobs).sum(axis=1)

    def astype(self, dtype) -> "TopK":
        return TopK(self.ids, self.logprobs.astype(dtype, copy=False))

    @classmethod
    def empty(cls, T: int, K: int, dtype=np.float32) -> "TopK":
        """T positions for which nothing was returned."""
        return cls(np.full((T, K), PAD_ID, np.int32), np.full((T, K), -np.inf, dtype))

    @classmethod
    def concat(cls, parts: Sequence["TopK"]) -> "TopK":
        """Stack along positions. Raises DataError when the parts differ in K or there is none."""
        if not parts:
            raise DataError("top-k: nothing to concatenate; use TopK.empty(0, K)")
        if len({part.K for part in parts}) > 1:
            raise DataError(f"top-k: cannot concatenate parts of different K: {sorted({part.K for part in parts})}")
        if len(parts) == 1:
            return parts[0]
        return cls(np.concatenate([p.ids for p in parts]), np.concatenate([p.logprobs for p in parts]))

    @classmethod
    def from_lists(cls, entries: Sequence, K: int, *, dtype=np.float32) -> "TopK":
        """From one list per position of `[logprob, id, text]` triples, as SGLang returns them.

        A position may be None or empty and a list may be short or long. Entries that are None or empty and entries whose log-prob is
        not finite are dropped (those behind move up), then the first K are kept in their order. An id that occurs twice keeps its
        first place and its last log-prob, as a dictionary built from the list would. Raises DataError on entries of another form.
        """
        T = len(entries)
        if T == 0:
            return cls.empty(0, K, dtype)
        counts_T, logprobs_N, ids_N = _flatten(entries)
        ids_TK, logprobs_TK = _pad(counts_T, ids_N, logprobs_N, T, K, dtype)
        return _without_duplicates(ids_TK, logprobs_TK)

    @classmethod
    def from_reply(cls, meta_info: dict, side: str, K: int, length: int, *, dtype=np.float32) -> "TopK":
        """From a reply's `meta_info`: `output_top_logprobs` for side "student", `input_top_logprobs` for side "teacher".

        Takes the last `length` positions; SGLang's leading null (the first input position has no prediction) is dropped before.
        Raises DataError when the field is missing or has fewer than `length` positions.
        """
        if side not in REPLY_FIELD:
            raise DataError(f"side: expected 'student' or 'teacher', got {side!r}")
        field = REPLY_FIELD[side]
        return cls.from_lists(last_positions(meta_info.get(field), length, field), K, dtype=dtype)

    @classmethod
    def from_arrays(cls, ids_TK: np.ndarray, logprobs_TK: np.ndarray) -> "TopK":
        """From full rows of ids [T, K] >= 0 and finite log-probs [T, K]; takes the arrays over, and makes ids unique as `from_lists`."""
        return _without_duplicates(ids_TK, logprobs_TK)

    def checked(self) -> "TopK":
        """The same rows with every promise of the class kept: padding consistent and last, ids unique, log-probs finite."""
        real_TK = (self.ids >= 0) & np.isfinite(self.logprobs)
        counts_T = real_TK.sum(axis=1)
        ids_TK, logprobs_TK = _pad(
            counts_T, self.ids[real_TK], self.logprobs[real_TK], self.T, self.K, self.logprobs.dtype
        )
        return _without_duplicates(ids_TK, logprobs_TK)



class TopKParts:
    """The top-K of many responses, one after another, read like one `TopK` without a copy of everything.

    A slice copies only where it spans parts. `ids` and `logprobs` are stacked when somebody asks for the whole. Raises DataError when
    the parts differ in K or there is none.
    """

    def __init__(self, parts: Sequence[TopK]):
        if not parts:
            raise DataError("top-k: nothing to chain; use TopK.empty(0, K)")
        if len({part.K for part in parts}) > 1:
            raise DataError(f"top-k: cannot chain parts of different K: {sorted({part.K for part in parts})}")
        self.parts = list(parts)
        self.K = parts[0].K
        self._ends = np.cumsum([part.T for part in parts])
        self.T = int(self._ends[-1])

    @property
    def dtype(self) -> np.dtype:
        return np.result_type(*{part.dtype for part in self.parts})

    def __len__(self) -> int:
        return self.T

    def __getitem__(self, rows: slice) -> TopK:
        start, stop, step = rows.indices(self.T)
        if step != 1:
            raise DataError(f"top-k in parts: expected a slice of step 1, got {step}")
        first = int(np.searchsorted(self._ends, start, "right"))
        if start >= stop or first == len(self.parts):
            return self.parts[0][:0]
        pieces = []
        for part, end in zip(self.parts[first:], self._ends[first:].tolist(), strict=True):
            begin = end - part.T
            if begin >= stop:
                break
            pieces.append(part[max(start - begin, 0) : stop - begin])
        return TopK.concat(pieces)

    def astype(self, dtype) -> "TopKParts":
        return TopKParts([part.astype(dtype) for part in self.parts])

    @cached_property
    def ids(self) -> np.ndarray:
        """[T, K] int32, stacked."""
        return np.concatenate([part.ids for part in self.parts])

    @cached_property
    def logprobs(self) -> np.ndarray:
        """[T, K], stacked."""
        return np.concatenate([part.logprobs for part in self.parts])


def last_positions(entries, length: int, field: str) -> list:
    """The last `length` items of one per-position list of a reply, without its leading null. DataError when there are too few."""
    if length == 0:
        return []
    if entries is None:
        raise DataError(
            f"{field} is missing from the reply; ask for it with return_logprob=true and top_logprobs_num=K > 0"
        )
    entries = entries[1:] if len(entries) > 0 and entries[0] is None else entries
    if len(entries) < length:
        raise DataError(
            f"{field}: expected at least {length} positions (the response length), got {len(entries)}; "
            "was the reply cut, or was logprob_start_len too late?"
        )
    return entries[len(entries) - length :]


def sampled_logprobs(entries: Sequence, length: int, *, dtype=np.float32) -> np.ndarray:
    """[length] log-prob of each sampled token from `output_token_logprobs` or `input_token_logprobs`; NaN where null.

    Takes the last `length` entries. Raises DataError when there are fewer.
    """
    items = [entry if entry else (None,) for entry in last_positions(entries, length, "token_logprobs")]
    values = list(map(_FIRST, items))
    try:
        return np.fromiter(values, dtype, len(values))
    except TypeError:
        return np.array([np.nan if value is None else value for value in values], dtype)


def gathered_logprobs(entries: Sequence, ids_TK: np.ndarray, *, dtype=np.float32, absent_is_zero: bool = False) -> np.ndarray:
    """[T, K] log-probs at `ids_TK` from `input_token_ids_logprobs` (one list of triples per position), NaN where absent.

    Padded ids (-1) give NaN, except in a row with no real id whose position did carry an answer: that row gives -inf, so that
    "asked and nothing to add" differs from "not asked". absent_is_zero (the released reading of an answer): so does a row none of whose
    ids is in its answer. Raises DataError when the number of positions differs from T.
    """
    T, K = ids_TK.shape
    if len(entries) != T:
        raise DataError(f"input_token_ids_logprobs: expected {T} positions, got {len(entries)}")
    out_TK = np.full((T, K), np.nan, dtype)
    counts_T, logprobs_N, given_N = _flatten(entries)
    if given_N.size == 0:
        return out_TK
    rows_N = np.repeat(np.arange(T, dtype=np.int64), counts_T)
    keys_N = (rows_N << 32) | given_N
    order_N = np.argsort(keys_N, kind="stable")
    keys_N = keys_N[order_N]
    want_TK = (np.arange(T, dtype=np.int64)[:, None] << 32) | np.maximum(ids_TK, 0)
    # The last of equal ids, as a dictionary would hold it.
    place_TK = np.maximum(np.searchsorted(keys_N, want_TK, side="right") - 1, 0)
    found_TK = (keys_N[place_TK] == want_TK) & (ids_TK >= 0)
    out_TK[found_TK] = logprobs_N[order_N][place_TK[found_TK]]
    nothing_T = ~found_TK.any(axis=1) if absent_is_zero else (ids_TK < 0).all(axis=1)
    out_TK[(counts_T > 0) & nothing_T] = -np.inf
    return out_TK


def _flatten(entries: Sequence) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per-position lists of triples -> (count per position [T], logprobs [N] float64, ids [N] int64), only usable entries."""
    try:
        counts_T = np.fromiter(map(len, entries), np.int64, len(entries))
        flat = list(chain.from_iterable(entries))
        logprobs_N = np.fromiter(map(_FIRST, flat), np.float64, len(flat))
        ids_N = np.fromiter(map(_SECOND, flat), np.int64, len(flat))
    except (TypeError, IndexError, ValueError):
        return _flatten_carefully(entries)
    finite_N = np.isfinite(logprobs_N)
    if not finite_N.all():
        rows_N = np.repeat(np.arange(len(entries)), counts_T)
        counts_T = np.bincount(rows_N[finite_N], minlength=len(entries))
        logprobs_N, ids_N = logprobs_N[finite_N], ids_N[finite_N]
    return counts_T, logprobs_N, ids_N


def _flatten_carefully(entries: Sequence) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    counts, logprobs, ids = [], [], []
    for position, items in enumerate(entries):
        before = len(ids)
        for item in items or ():
            try:
                if not item or item[0] is None:
                    continue
                logprob, token = float(item[0]), int(item[1])
            except (TypeError, ValueError, IndexError) as error:
                raise DataError(
                    f"top-k position {position}: expected [logprob, token id, text], got {item!r}"
                ) from error
            if np.isfinite(logprob):
                logprobs.append(logprob)
                ids.append(token)
        counts.append(len(ids) - before)
    return np.array(counts, np.int64), np.array(logprobs, np.float64), np.array(ids, np.int64)


def _pad(counts_T, ids_N, logprobs_N, T: int, K: int, dtype) -> tuple[np.ndarray, np.ndarray]:
    """Flat entries to [T, K], the first K of each position, padded."""
    if ids_N.size and (ids_N.min() < 0 or ids_N.max() > np.iinfo(np.int32).max):
        raise DataError(f"top-k: token ids must be in [0, 2^31), got {ids_N.min()} to {ids_N.max()}")
    if ids_N.size == T * K and (counts_T == K).all():
        return ids_N.reshape(T, K).astype(np.int32), logprobs_N.reshape(T, K).astype(dtype)
    ids_TK = np.full((T, K), PAD_ID, np.int32)
    logprobs_TK = np.full((T, K), -np.inf, dtype)
    starts_T = np.cumsum(counts_T) - counts_T
    rows_N = np.repeat(np.arange(T), counts_T)
    columns_N = np.arange(ids_N.size) - np.repeat(starts_T, counts_T)
    keep_N = columns_N < K
    ids_TK[rows_N[keep_N], columns_N[keep_N]] = ids_N[keep_N]
    logprobs_TK[rows_N[keep_N], columns_N[keep_N]] = logprobs_N[keep_N]
    return ids_TK, logprobs_TK


def _without_duplicates(ids_TK: np.ndarray, logprobs_TK: np.ndarray) -> TopK:
    if ids_TK.size:
        sorted_TK = np.sort(ids_TK, axis=1)
        twice_T = ((sorted_TK[:, 1:] == sorted_TK[:, :-1]) & (sorted_TK[:, 1:] != PAD_ID)).any(axis=1)
        for row in np.flatnonzero(twice_T):
            real_K = ids_TK[row] >= 0
            # dict(): the first place of an id, its last value.
            unique = dict(zip(ids_TK[row][real_K].tolist(), logprobs_TK[row][real_K].tolist(), strict=True))
            ids_TK[row], logprobs_TK[row] = PAD_ID, -np.inf
            ids_TK[row, : len(unique)] = list(unique)
            logprobs_TK[row, : len(unique)] = list(unique.values())
    return TopK(ids_TK, logprobs_TK)
