"""Several runs of one comparison: statistics over seeds, and paired bootstraps between methods.

Pairing matters: two methods that share seeds (and prompts) share much of their noise. With three seeds an interval over seeds is wide and
says so; nothing here turns three numbers into certainty.
"""

from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd

from ta_opd.errors import DataError
from ta_opd.fixed_context.bootstrap import interval, multiplicities, named_rng


@dataclass(frozen=True)
class PairedConfig:
    """bootstrap: draws; seed: of the draws."""

    bootstrap: int = 1000
    seed: int = 20260512


def seed_summary(frame: pd.DataFrame, *, by: list[str], value: str, seed: str = "seed") -> pd.DataFrame:
    """Per combination of `by`: n seeds, mean, std (n-1), sem, 95 % half width (Student t), min, max of `value`.

    Raises DataError when a (by, seed) pair occurs twice or a column is missing.
    """
    from scipy.stats import t

    _need(frame, [*by, value, seed])
    twice = frame.duplicated([*by, seed])
    if twice.any():
        raise DataError(f"multi-seed: {int(twice.sum())} rows repeat a combination of {by} and {seed}; one row a run is expected")
    rows = []
    for key, part in frame.dropna(subset=[value]).groupby(by, sort=False):
        x = part[value].to_numpy(float)
        n = len(x)
        std = x.std(ddof=1) if n > 1 else float("nan")
        half = t.ppf(0.975, n - 1) * std / np.sqrt(n) if n > 1 else float("nan")
        key = key if isinstance(key, tuple) else (key,)
        rows.append({**dict(zip(by, key, strict=True)), "seeds": n, "mean": x.mean(), "std": std, "sem": std / np.sqrt(n),
                     "ci95_half_width": half, "min": x.min(), "max": x.max()})  # fmt: skip
    return pd.DataFrame(rows)


def paired_differences(
    frame: pd.DataFrame, *, method: str, value: str, unit: list[str], cluster: str, config: PairedConfig | None = None
) -> pd.DataFrame:
    """Every pair of methods on the units both have: mean(a) - mean(b), with an interval over clusters drawn with replacement.

    unit: columns that name a measurement apart from the method (["seed"], or ["seed", "prompt_id"]); cluster: the column that is drawn
    ("seed", or "prompt_id" to generalise over prompts). The draws are the same for every pair. Raises DataError on repeated units.
    """
    config = config or PairedConfig()
    _need(frame, [method, value, *unit])
    if frame.duplicated([method, *unit]).any():
        raise DataError(f"paired bootstrap: a method has two values for one of {unit}")
    wide = frame.pivot(index=unit, columns=method, values=value)
    rows = []
    for a, b in combinations(wide.columns, 2):
        both = wide[[a, b]].dropna()
        row = {"method_a": a, "method_b": b, "units": len(both)}
        if len(both) == 0:
            rows.append(row | {"note": "no unit in common"})
            continue
        labels, codes = np.unique(both.index.get_level_values(cluster).to_numpy(), return_inverse=True)
        difference = (both[a] - both[b]).to_numpy(float)
        sums, counts = np.bincount(codes, weights=difference), np.bincount(codes).astype(float)
        draws = multiplicities(len(labels), config.bootstrap, named_rng(config.seed, cluster))
        found = interval(difference.mean(), (draws @ sums) / (draws @ counts), len(labels))
        note = "" if len(labels) > 1 else "one cluster: no interval"
        rows.append(row | {"clusters": len(labels), "mean_a": both[a].mean(), "mean_b": both[b].mean(), "difference": found.estimate,
                           "ci_low": found.low, "ci_high": found.high,
                           "share_of_draws_above_0": float((found.draws > 0).mean()), "note": note})  # fmt: skip
    return pd.DataFrame(rows)


def _need(frame: pd.DataFrame, columns: list[str]) -> None:
    missing = [name for name in columns if name not in frame]
    if missing:
        raise DataError(f"expected the columns {', '.join(missing)}; the table has {', '.join(frame.columns)}")
