"""How much of the measured gain a selection would have bet on: mean gain of kept tokens, per budget and against random, with intervals.

All selections share one set of bootstrap draws, so differences between them are paired.

Shape suffixes: N rows, G groups, B draws, M selections.
"""

from dataclasses import dataclass

import numpy as np

from ta_opd.fixed_context.bootstrap import Interval, group_codes, interval, multiplicities, ratio_draws


@dataclass(frozen=True)
class SelectionGain:
    """Of one selection. Intervals are cluster bootstraps; `vs_random`: mean gain of kept tokens - mean gain of all usable tokens (what a
    random choice expects); `share_of_gain`: sum over kept / sum over all, NaN when that total is not positive."""

    n_keep: int
    keep_ratio: float
    mean_gain: Interval
    vs_random: Interval
    share_of_gain: float
    contexts_with_none: float
    effective_contexts: float


def selection_gains(gain_N: np.ndarray, weights_NM: list[np.ndarray], groups, num_draws: int, rng: np.random.Generator) -> list[SelectionGain]:
    """One SelectionGain a column of weights (0 = not kept; a bool mask is weights 0 and 1).

    gain_N: finite gains of the usable tokens. groups [N]: the cluster of each token.
    """
    codes_N, labels_G = group_codes(groups)
    G, N = len(labels_G), len(gain_N)
    draws_BG = multiplicities(G, num_draws, rng)
    weights = [np.asarray(w, float) for w in weights_NM]
    sums_GM = np.stack([np.bincount(codes_N, weights=gain_N * w, minlength=G) for w in weights], axis=1)
    mass_GM = np.stack([np.bincount(codes_N, weights=w, minlength=G) for w in weights], axis=1)
    kept_GM = np.stack([np.bincount(codes_N, weights=w > 0, minlength=G) for w in weights], axis=1)
    all_G, count_G = np.bincount(codes_N, weights=gain_N, minlength=G), np.bincount(codes_N, minlength=G).astype(float)
    mean_BM = ratio_draws(draws_BG, sums_GM, mass_GM)
    random_B = ratio_draws(draws_BG, all_G, count_G)
    total, overall = float(gain_N.sum()), float(gain_N.mean())
    results = []
    for m, w in enumerate(weights):
        mass, kept = float(w.sum()), kept_GM[:, m]
        mean = float((gain_N * w).sum() / mass) if mass > 0 else float("nan")
        n_keep = int(kept.sum())
        results.append(
            SelectionGain(
                n_keep=n_keep,
                keep_ratio=n_keep / N,
                mean_gain=interval(mean, mean_BM[:, m], G),
                vs_random=interval(mean - overall, mean_BM[:, m] - random_B, G),
                share_of_gain=float(gain_N[w > 0].sum()) / total if total > 0 else float("nan"),
                contexts_with_none=float((kept == 0).mean()),
                effective_contexts=float(n_keep**2 / (kept**2).sum()) if n_keep else 0.0,
            )
        )
    return results


@dataclass(frozen=True)
class HonestChoice:
    """What the best-looking selection brings on contexts that did not choose it: mean gain of its kept tokens and its difference to random,
    averaged over split halves; chosen: index of a selection -> share of the splits that chose it."""

    mean_gain: float
    vs_random: float
    chosen: dict[int, float]


def honest_choice(gain_N: np.ndarray, weights_NM: list[np.ndarray], groups, rng: np.random.Generator, *, repeats: int = 50) -> HonestChoice:
    """Choose on one half of the groups, judge on the other, both ways, `repeats` times. NaN with fewer than four groups.

    The best of many noisy means is too good to be true on the data that chose it; this is not.
    """
    codes_N, labels_G = group_codes(groups)
    G = len(labels_G)
    if G < 4:
        return HonestChoice(float("nan"), float("nan"), {})
    sums_GM = np.stack([np.bincount(codes_N, weights=gain_N * w, minlength=G) for w in weights_NM], axis=1)
    mass_GM = np.stack([np.bincount(codes_N, weights=np.asarray(w, float), minlength=G) for w in weights_NM], axis=1)
    all_G, count_G = np.bincount(codes_N, weights=gain_N, minlength=G), np.bincount(codes_N, minlength=G).astype(float)
    halves = np.zeros((2 * repeats, G))
    for r in range(repeats):
        halves[2 * r, rng.permutation(G)[: G // 2]] = 1
        halves[2 * r + 1] = 1 - halves[2 * r]
    mean = ratio_draws(halves, sums_GM, mass_GM)
    overall = ratio_draws(halves, all_G, count_G)
    picks, gains, differences = [], [], []
    for half in range(2 * repeats):
        other = half ^ 1
        if not np.isfinite(mean[half]).any():
            continue
        best = int(np.nanargmax(mean[half]))
        if np.isfinite(mean[other, best]):
            picks.append(best)
            gains.append(mean[other, best])
            differences.append(mean[other, best] - overall[other])
    if not picks:
        return HonestChoice(float("nan"), float("nan"), {})
    values, counts = np.unique(picks, return_counts=True)
    shares = dict(zip(values.tolist(), (counts / len(picks)).tolist(), strict=True))
    return HonestChoice(float(np.mean(gains)), float(np.mean(differences)), shares)
