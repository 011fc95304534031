"""Matching inside a region: each high-C token is compared with the most similar low-C token of the same context.

Similar = smallest squared distance in (H, D, position), all on the 0-to-1 scale. A low-C token may serve several times.
"""

import numpy as np
import pandas as pd

from ta_opd.fixed_context.bootstrap import Interval, mean_interval

MATCH_ON = ("H", "D", "pos")
BLOCK = 1 << 20  # distances at once
PAIR_COLUMNS = (
    "group", "row_high", "row_low", "gain_high", "gain_low", "gain_diff", "c_high", "c_low", "h_diff", "d_diff", "pos_diff", "distance",
)  # fmt: skip


def match_within_groups(frame: pd.DataFrame, *, by: str = "C") -> pd.DataFrame:
    """Pairs (PAIR_COLUMNS), one a token above its group's median of `by`; ties at equal distance go to the earlier row.

    Groups are walked in sorted order. A group whose tokens all have one value of `by`, or that has one token, gives no pair.
    """
    pairs = []
    points = frame[list(MATCH_ON)].to_numpy(float)
    split, gain, rows = frame[by].to_numpy(float), frame["G"].to_numpy(float), frame["row"].to_numpy()
    for group, where in sorted(frame.groupby("group", sort=True).indices.items()):
        high = where[split[where] > np.median(split[where])]
        low = where[split[where] <= np.median(split[where])]
        if len(high) == 0 or len(low) == 0:
            continue
        nearest, squared = _nearest(points[high], points[low])
        partner = low[nearest]
        gaps = points[high] - points[partner]
        pairs.append(
            pd.DataFrame(
                {
                    "group": group, "row_high": rows[high], "row_low": rows[partner], "gain_high": gain[high],
                    "gain_low": gain[partner], "gain_diff": gain[high] - gain[partner], "c_high": split[high],
                    "c_low": split[partner], "h_diff": gaps[:, 0], "d_diff": gaps[:, 1], "pos_diff": gaps[:, 2],
                    "distance": np.sqrt(squared),
                }
            )
        )  # fmt: skip
    if not pairs:
        return pd.DataFrame({name: pd.Series(dtype=float) for name in PAIR_COLUMNS})
    return pd.concat(pairs, ignore_index=True)


def _nearest(points_AC: np.ndarray, others_BC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(index of the nearest other [A], its squared distance [A]); in blocks, so that one group of all rows takes no memory of A x B."""
    nearest_A, squared_A = np.empty(len(points_AC), np.int64), np.empty(len(points_AC))
    step = max(1, BLOCK // len(others_BC))
    for start in range(0, len(points_AC), step):
        block = slice(start, start + step)
        squared = ((points_AC[block, None, :] - others_BC[None, :, :]) ** 2).sum(axis=2)
        nearest_A[block] = squared.argmin(axis=1)
        squared_A[block] = squared.min(axis=1)
    return nearest_A, squared_A


def matching_summary(pairs: pd.DataFrame, num_draws: int, rng: np.random.Generator) -> dict:
    """Number of pairs, mean (with cluster interval) and median gain difference, and how far the pairs are apart."""
    if len(pairs) == 0:
        missing = float("nan")
        empty = Interval(missing, missing, missing, 0, np.array([]))
        return {"matching_pairs": 0, "matching_mean_diff": missing, "matching_median_diff": missing, **_bounds(empty)}
    mean = mean_interval(pairs["gain_diff"], pairs["group"], num_draws, rng)
    return {
        "matching_pairs": len(pairs),
        "matching_mean_diff": mean.estimate,
        "matching_median_diff": float(pairs["gain_diff"].median()),
        **_bounds(mean),
        "matching_mean_abs_h_diff": float(pairs["h_diff"].abs().mean()),
        "matching_mean_abs_d_diff": float(pairs["d_diff"].abs().mean()),
        "matching_mean_abs_pos_diff": float(pairs["pos_diff"].abs().mean()),
    }


def _bounds(mean: Interval) -> dict:
    return {"matching_ci_low": mean.low, "matching_ci_high": mean.high}
