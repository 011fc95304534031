"""Picking the best tokens: ties, per-response winners, per-response budgets, and the reservation that gives every response a voice.

Shape suffixes: T tokens of the batch (responses one after another, so rows ascend with the position), N responses, C some row numbers.
"""

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

ROUNDINGS = ("ceil", "floor", "float_ceil")


def exact_ceil(count: int, ratio: float) -> int:
    """ceil(count * ratio) for the number that was meant by a float: 100 * 0.07 gives 7, and 9 * (5/9) gives 5.

    A float stands for every number within half a step of it; the smallest of them counts.
    """
    return math.ceil(count * (Fraction(ratio) - Fraction(math.ulp(ratio)) / 2))


def exact_floor(count: int, ratio: float) -> int:
    """floor(count * ratio) in the same sense: 100 * 0.29 gives 29."""
    return math.floor(count * (Fraction(ratio) + Fraction(math.ulp(ratio)) / 2))


def token_budget(count: int, ratio: float, rounding: str) -> int:
    """How many of `count` valid tokens to keep, at least 1 (0 of 0). `float_ceil` is the released one: 100 * 0.07 gives 8 there."""
    if count == 0:
        return 0
    ratio = float(ratio)
    if rounding == "float_ceil":
        return max(1, math.ceil(count * ratio))
    return max(1, exact_floor(count, ratio) if rounding == "floor" else exact_ceil(count, ratio))


def budget_share(budget: int, share: float, rounding: str) -> int:
    """`share` in [0, 1] of a budget to the nearest token, a half up: of 5 tokens 0.5 is 3. `float_ceil`: to even, as released (2)."""
    share = float(share)
    if rounding == "float_ceil":
        return min(max(round(budget * share), 0), budget)
    return min(math.floor(budget * (Fraction(share) + Fraction(math.ulp(share)) / 2) + Fraction(1, 2)), budget)


def response_budgets(counts_N: np.ndarray, ratio: float, rounding: str) -> np.ndarray:
    """[N] token budgets of single responses."""
    different, where_N = np.unique(counts_N, return_inverse=True)
    return np.array([token_budget(int(c), ratio, rounding) for c in different], np.int64)[where_N]


@dataclass(frozen=True)
class Rows:
    """Where the tokens of a batch are: sample, tok_pos [T] int32, response_lengths [N]."""

    sample: np.ndarray
    tok_pos: np.ndarray
    response_lengths: np.ndarray

    @classmethod
    def of(cls, response_lengths) -> "Rows":
        lengths_N = np.asarray(response_lengths, np.int64)
        sample_T = np.repeat(np.arange(lengths_N.size, dtype=np.int32), lengths_N)
        starts_N = np.cumsum(lengths_N) - lengths_N
        tok_pos_T = np.arange(sample_T.size, dtype=np.int32)
        tok_pos_T -= np.repeat(starts_N.astype(np.int32), lengths_N)
        return cls(sample_T, tok_pos_T, lengths_N)

    def place(self) -> np.ndarray:
        """[T] float64: tok_pos / max(length - 1, 1), from 0 for a response's first token to 1 for its last."""
        return self.tok_pos / np.repeat(np.maximum(self.response_lengths - 1, 1), self.response_lengths)

    def spans(self) -> list[slice]:
        """The rows of every response that has any."""
        ends = np.cumsum(self.response_lengths).tolist()
        return [slice(e - n, e) for e, n in zip(ends, self.response_lengths.tolist(), strict=True) if n > 0]

    def count(self, mask_T: np.ndarray) -> np.ndarray:
        """[N] how many rows of each response are in the mask."""
        running = np.concatenate([[0], np.cumsum(mask_T, dtype=np.int64)])
        ends_N = np.cumsum(self.response_lengths)
        return running[ends_N] - running[ends_N - self.response_lengths]


@dataclass(frozen=True)
class Order:
    """A ranking: larger score first; ties: smaller position in the response (larger with `late_first`), then the earlier row."""

    score: np.ndarray
    rows: Rows
    late_first: bool = False

    def best(self, rows_C: np.ndarray, count: int) -> np.ndarray:
        """The `count` best of `rows_C` (ascending row numbers), in no particular order."""
        if count >= rows_C.size:
            return rows_C
        if count <= 0:
            return rows_C[:0]
        score_C = self.score[rows_C]
        threshold = np.partition(score_C, rows_C.size - count)[rows_C.size - count]
        above_C = rows_C[score_C > threshold]
        tied_C = rows_C[score_C == threshold]
        missing = count - above_C.size
        if missing < tied_C.size:
            place_C = self.rows.tok_pos[tied_C]
            tied_C = tied_C[np.argsort(-place_C if self.late_first else place_C, kind="stable")[:missing]]
        return np.concatenate([above_C, tied_C])

    def best_of_each(self, free_T: np.ndarray) -> np.ndarray:
        """The best free row of every response that has one, ascending."""
        spans_N = self.rows.response_lengths > 0
        if not spans_N.any():
            return np.zeros(0, np.int64)
        lengths_N = self.rows.response_lengths[spans_N]
        masked_T = np.where(free_T, self.score, -np.inf)
        top_N = np.maximum.reduceat(masked_T, np.cumsum(lengths_N) - lengths_N)
        hits_C = np.flatnonzero((masked_T == np.repeat(top_N, lengths_N)) & free_T)
        owner_C = self.rows.sample[hits_C]
        edge = np.flatnonzero(owner_C[1:] != owner_C[:-1])
        if hits_C.size == 0:
            return hits_C
        return hits_C[np.append(edge, hits_C.size - 1)] if self.late_first else hits_C[np.insert(edge + 1, 0, 0)]

    def best_per_response(self, rows_C: np.ndarray, counts_N: np.ndarray) -> np.ndarray:
        """The `counts_N[i]` best of `rows_C` in every response i."""
        place_C = self.rows.tok_pos[rows_C]
        sample_C = self.rows.sample[rows_C]
        by = np.lexsort((-place_C if self.late_first else place_C, -self.score[rows_C], sample_C))
        sorted_sample_C = sample_C[by]
        first_N = np.searchsorted(sorted_sample_C, np.arange(counts_N.size))
        rank_C = np.arange(by.size) - first_N[sorted_sample_C]
        return rows_C[by[rank_C < counts_N[sorted_sample_C]]]


def reserve(by: Order, preferred_T, allowed_T, min_keep: int, room: int | np.ndarray) -> np.ndarray:
    """[T] mask of the best `min_keep` tokens of every response, preferred ones first, at most `room` in all (or per response, [N]).

    When the room is too small, every response's best comes before any response's second, preferred ones before others, better scores
    before worse: so more room only ever adds tokens.
    """
    reserved_T = np.zeros(allowed_T.size, bool)
    per_response = not np.isscalar(room)
    for turn in range(min_keep):
        left_N = room > turn if per_response else None
        winners_C = by.best_of_each(preferred_T & ~reserved_T)
        unheard_T = allowed_T & ~reserved_T
        heard_N = np.zeros(by.rows.response_lengths.size, bool)
        heard_N[by.rows.sample[winners_C]] = True
        unheard_T &= ~heard_N[by.rows.sample]
        others_C = by.best_of_each(unheard_T)
        if per_response:
            winners_C = winners_C[left_N[by.rows.sample[winners_C]]]
            others_C = others_C[left_N[by.rows.sample[others_C]]]
        else:
            winners_C = by.best(winners_C, room)
            others_C = by.best(others_C, room - winners_C.size)
            room -= winners_C.size + others_C.size
        if winners_C.size + others_C.size == 0:
            break
        reserved_T[winners_C] = True
        reserved_T[others_C] = True
    return reserved_T


def top_up(by: Order, keep_T, allowed_T, min_keep: int) -> np.ndarray:
    """[T] mask of the tokens to add so that every response has `min_keep` kept ones (or all of its allowed ones)."""
    added_T = np.zeros(keep_T.size, bool)
    for _ in range(min_keep):
        short_N = by.rows.count(keep_T | added_T) < min_keep
        if not short_N.any():
            break
        winners_C = by.best_of_each(allowed_T & ~keep_T & ~added_T & short_N[by.rows.sample])
        if winners_C.size == 0:
            break
        added_T[winners_C] = True
    return added_T
