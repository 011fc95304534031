"""Cluster bootstrap on group sums: whole prompts are drawn with replacement, and a mean is a ratio of two sums over groups.

A draw of groups is a vector of multiplicities, so all draws of all statistics are two matrix products; nothing is copied per draw.
The order of random numbers is that of `default_rng(seed).choice(G, size=G, replace=True)` called once a draw.

Shape suffixes: N rows, G groups, B draws, M statistics.
"""

from dataclasses import dataclass
from zlib import crc32

import numpy as np
import pandas as pd

from ta_opd.errors import DataError

LEVELS = (0.025, 0.975)


@dataclass(frozen=True)
class Interval:
    """A point estimate with its 95 % percentile interval; NaN bounds when fewer than two groups exist. `draws` [B] may hold NaN."""

    estimate: float
    low: float
    high: float
    num_groups: int
    draws: np.ndarray

    @property
    def excludes_zero(self) -> bool:
        return bool(np.isfinite(self.low) and (self.low > 0 or self.high < 0))

    def as_dict(self, prefix: str = "") -> dict:
        return {f"{prefix}estimate": self.estimate, f"{prefix}ci_low": self.low, f"{prefix}ci_high": self.high}


def named_rng(seed: int, *names) -> np.random.Generator:
    """A generator that depends on the seed and on names only, the same in every process (Python's hash() of text is not)."""
    return np.random.default_rng([int(seed), *(crc32(str(name).encode()) for name in names)])


def group_codes(groups) -> tuple[np.ndarray, np.ndarray]:
    """(codes [N] in 0..G-1, labels [G] sorted). By hashing: sorting the names of a million rows would take seconds a call."""
    codes_N, labels_G = pd.factorize(groups if isinstance(groups, pd.Series) else np.asarray(groups), sort=True, use_na_sentinel=False)
    return codes_N, np.asarray(labels_G)


def multiplicities(num_groups: int, num_draws: int, rng: np.random.Generator) -> np.ndarray:
    """[B, G] float64: how often each group was drawn in each draw of G groups with replacement. DataError when there is no group."""
    if num_groups < 1 or num_draws < 1:
        raise DataError(f"bootstrap: expected at least one group and one draw, got {num_groups} and {num_draws}")
    drawn_BG = rng.choice(num_groups, size=(num_draws, num_groups), replace=True)
    flat = (drawn_BG + np.arange(num_draws)[:, None] * num_groups).ravel()
    return np.bincount(flat, minlength=num_draws * num_groups).reshape(num_draws, num_groups).astype(float)


def group_sums(codes_N: np.ndarray, values_N: np.ndarray, num_groups: int) -> np.ndarray:
    """[G] sum of the values of each group."""
    return np.bincount(codes_N, weights=values_N, minlength=num_groups)


def interval(estimate: float, draws_B: np.ndarray, num_groups: int) -> Interval:
    """Percentile interval of the finite draws; NaN bounds with fewer than two groups or no finite draw."""
    finite = draws_B[np.isfinite(draws_B)]
    if num_groups < 2 or finite.size == 0:
        return Interval(float(estimate), float("nan"), float("nan"), num_groups, draws_B)
    low, high = np.quantile(finite, LEVELS)
    return Interval(float(estimate), float(low), float(high), num_groups, draws_B)


def mean_interval(values_N, groups, num_draws: int, rng: np.random.Generator) -> Interval:
    """The mean of `values_N` with its cluster interval, over the groups that occur in `groups`."""
    values_N = np.asarray(values_N, float)
    if values_N.size == 0:
        return Interval(float("nan"), float("nan"), float("nan"), 0, np.array([]))
    codes_N, labels_G = group_codes(groups)
    weights_BG = multiplicities(len(labels_G), num_draws, rng)
    draws_B = _ratio(weights_BG, group_sums(codes_N, values_N, len(labels_G)), np.bincount(codes_N))
    return interval(values_N.mean(), draws_B, len(labels_G))


def difference_interval(
    values_N, high_N, low_N, groups, num_draws: int, rng: np.random.Generator, *, only_members: bool = False
) -> Interval:
    """mean(values where high) - mean(values where low), with its cluster interval.

    Groups are those of all N rows, or with `only_members` those that hold at least one high or low row. NaN when a side is empty.
    """
    values_N, high_N, low_N = np.asarray(values_N, float), np.asarray(high_N, bool), np.asarray(low_N, bool)
    if only_members:
        member_N = high_N | low_N
        values_N, high_N, low_N, groups = (
            values_N[member_N],
            high_N[member_N],
            low_N[member_N],
            np.asarray(groups)[member_N],
        )
    if not high_N.any() or not low_N.any():
        return Interval(float("nan"), float("nan"), float("nan"), len(np.unique(np.asarray(groups))), np.array([]))
    codes_N, labels_G = group_codes(groups)
    G = len(labels_G)
    weights_BG = multiplicities(G, num_draws, rng)
    sides = [
        _ratio(weights_BG, group_sums(codes_N, values_N * side_N, G), group_sums(codes_N, side_N, G))
        for side_N in (high_N, low_N)
    ]
    return interval(values_N[high_N].mean() - values_N[low_N].mean(), sides[0] - sides[1], G)


def ratio_draws(weights_BG: np.ndarray, sums_GM: np.ndarray, counts_GM: np.ndarray) -> np.ndarray:
    """[B, M]: for each draw and statistic, (sum over drawn groups of sums) / (the same of counts); NaN where no row was drawn."""
    return _ratio(weights_BG, sums_GM, counts_GM)


def _ratio(weights_BG, sums, counts) -> np.ndarray:
    total, count = weights_BG @ sums, weights_BG @ np.asarray(counts, float)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(count > 0, total / count, np.nan)
