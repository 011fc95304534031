"""Means with intervals: prompts are drawn with replacement, and seeds too where an arm has several.

All arms share one draw of prompts (and, with equal seed labels, of seeds), so differences between arms are paired.
Shape suffixes: S seeds, G prompts, B draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy import stats

from ta_opd.fixed_context.bootstrap import LEVELS, multiplicities, named_rng
from ta_opd.report.loading import Run, eval_at, per_prompt

DRAWS = 2000
NAN = float("nan")


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % percentile interval (NaN bounds when nothing can be drawn). draws [B] are kept for differences."""

    value: float
    low: float
    high: float
    draws: np.ndarray
    prompts: int
    seeds: int

    @property
    def known(self) -> bool:
        return bool(np.isfinite(self.value))


UNKNOWN = Estimate(NAN, NAN, NAN, np.zeros(0), 0, 0)


@dataclass(frozen=True)
class ClusterTable:
    """Sums and counts of a quantity by seed and prompt, [S, G]; labels name the prompts."""

    sums_SG: np.ndarray
    counts_SG: np.ndarray
    labels: tuple

    @property
    def point(self) -> float:
        total = self.counts_SG.sum()
        return float(self.sums_SG.sum() / total) if total else NAN


def cluster_table(series: Sequence[pd.DataFrame]) -> ClusterTable | None:
    """One table from a frame a seed with columns `sum` and `count`, indexed by prompt; prompts that a seed lacks count 0."""
    series = [frame for frame in series if frame is not None and len(frame)]
    if not series:
        return None
    labels = sorted(set().union(*(frame.index for frame in series)), key=str)
    aligned = [frame.reindex(labels, fill_value=0.0) for frame in series]
    return ClusterTable(
        np.stack([f["sum"].to_numpy(float) for f in aligned]), np.stack([f["count"].to_numpy(float) for f in aligned]), tuple(labels)
    )


class Resampler:
    """Draws that are shared by everything a report compares. Weights for the same prompts or seeds are drawn once."""

    def __init__(self, draws: int = DRAWS, seed: int = 20260515):
        self.draws, self.seed = draws, seed
        self._weights: dict[tuple, np.ndarray] = {}

    def weights(self, kind: str, labels: tuple) -> np.ndarray:
        """[B, len(labels)] multiplicities."""
        key = (kind, labels)
        if key not in self._weights:
            rng = named_rng(self.seed, kind, len(labels))
            self._weights[key] = multiplicities(len(labels), self.draws, rng)
        return self._weights[key]

    def draw(self, table: ClusterTable) -> np.ndarray:
        """[B] means of the drawn seeds and prompts."""
        S, G = table.sums_SG.shape
        prompts_BG = self.weights("prompts", table.labels) if G > 1 else np.ones((self.draws, G))
        seeds_BS = self.weights("seeds", tuple(range(S))) if S > 1 else np.ones((self.draws, 1))
        total_B = ((seeds_BS @ table.sums_SG) * prompts_BG).sum(1)
        count_B = ((seeds_BS @ table.counts_SG) * prompts_BG).sum(1)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(count_B > 0, total_B / count_B, np.nan)

    def estimate(self, table: ClusterTable | None) -> Estimate:
        if table is None:
            return UNKNOWN
        S, G = table.sums_SG.shape
        return from_draws(table.point, self.draw(table), G, S)

    def of_means(self, means_S: Sequence[float]) -> Estimate:
        """Of one mean a seed, its prompts unknown: Student's t-interval over seeds, of paired differences too, by shared normal draws a seed.

        (Three seeds drawn with replacement reach no further than the three values.) One seed, or seeds that agree, tell no spread: no bounds.
        """
        if not means_S:
            return UNKNOWN
        S, spread = len(means_S), np.subtract(means_S, np.mean(means_S))
        draws_B = np.full(self.draws, float(np.mean(means_S)))
        if S > 1:
            half_BS = named_rng(self.seed, "spread of seeds", S).standard_normal((-(-self.draws // 2), S))
            error_B = np.concatenate([half_BS, -half_BS])[: self.draws] @ spread / math.sqrt(S * (S - 1))
            draws_B += error_B * float(stats.t.ppf(LEVELS[1], S - 1) / stats.norm.ppf(LEVELS[1]))
        known = from_draws(float(np.mean(means_S)), draws_B, 0, S)
        return known if np.ptp(means_S) > 0 else replace(known, low=NAN, high=NAN)


def from_draws(value: float, draws_B: np.ndarray, prompts: int, seeds: int) -> Estimate:
    """An Estimate from a point value and its draws."""
    finite = draws_B[np.isfinite(draws_B)]
    if len(finite) == 0 or (prompts < 2 and seeds < 2):
        return Estimate(value, NAN, NAN, draws_B, prompts, seeds)
    low, high = np.quantile(finite, LEVELS)
    return Estimate(value, float(low), float(high), draws_B, prompts, seeds)


def difference(a: Estimate, b: Estimate) -> Estimate:
    """a - b, paired draw by draw."""
    if not (a.known and b.known):
        return UNKNOWN
    return from_draws(a.value - b.value, a.draws - b.draws, min(a.prompts, b.prompts), min(a.seeds, b.seeds))


def relative_drop(before: Estimate, after: Estimate) -> Estimate:
    """(before - after) / before, paired draw by draw."""
    if not (before.known and after.known) or before.value == 0:
        return UNKNOWN
    with np.errstate(invalid="ignore", divide="ignore"):
        draws = (before.draws - after.draws) / before.draws
    return from_draws((before.value - after.value) / before.value, draws, before.prompts, before.seeds)


@dataclass(frozen=True)
class Outcome:
    """What an arm reached: held-out accuracy, and mean full-vocabulary KL on the frozen contexts, before and after."""

    accuracy_before: Estimate
    accuracy_after: Estimate
    kl_before: Estimate
    kl_after: Estimate
    reverse_before: Estimate
    reverse_after: Estimate

    @property
    def kl_drop(self) -> Estimate:
        return relative_drop(self.kl_before, self.kl_after)

    @property
    def accuracy_gain(self) -> Estimate:
        return difference(self.accuracy_after, self.accuracy_before)


def outcome(runs: Sequence[Run], resampler: Resampler) -> Outcome:
    """The outcome of an arm from its runs (one a seed)."""

    def accuracy(which: str) -> Estimate:
        series = [per_prompt(eval_at(run, which)) for run in runs]
        known = [s for s in series if s is not None]
        if known:
            return resampler.estimate(cluster_table([pd.DataFrame({"sum": s, "count": np.ones(len(s))}) for s in known]))
        return resampler.of_means([e["accuracy"] for run in runs if (e := eval_at(run, which))])

    def divergence(column: str) -> Estimate:
        return resampler.estimate(cluster_table([context_sums(run.contexts, column) for run in runs if run.contexts is not None]))

    return Outcome(
        accuracy("before"), accuracy("after"), divergence("KLf_full_base"), divergence("KLf_full"), divergence("KLr_full_base"),
        divergence("KLr_full"),
    )  # fmt: skip


def context_sums(contexts: pd.DataFrame, column: str) -> pd.DataFrame | None:
    """`sum` and `count` of a column's finite values by prompt, over positions that are valid targets."""
    if column not in contexts:
        return None
    values = contexts[column].to_numpy(float)
    usable = np.isfinite(values)
    if "loss_mask" in contexts:
        usable &= contexts["loss_mask"].fillna(1).to_numpy() != 0
    group = next(name for name in ("prompt_id", "sample_index", "sample_ordinal") if name in contexts)
    frame = pd.DataFrame({"prompt": contexts[group].to_numpy()[usable], "sum": values[usable]})
    return frame.groupby("prompt")["sum"].agg(["sum", "count"])
