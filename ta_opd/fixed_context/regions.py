"""Contrasts inside the Q3 region (low entropy, high divergence): does gain rise with Dlearn, Dincompat or C there?

For each score: mean gain by quartile bucket, and top quarter minus bottom quarter, with cluster-bootstrap intervals.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ta_opd.fixed_context import plots
from ta_opd.fixed_context.bootstrap import Interval, difference_interval, mean_interval, named_rng
from ta_opd.fixed_context.features import (
    before_training_where_released,
    build_features,
    low_entropy_high_divergence,
    resolve_columns,
    with_gains,
)
from ta_opd.fixed_context.tables import write_json, write_table

SCORES = {"Dlearn": "Dlearn", "Dincompat": "Dincompat", "Cn": "C"}
BUCKETS = 4


@dataclass(frozen=True)
class RegionConfig:
    """Options of `within_q3`; winsor: quantiles of the gain over the whole table, None = raw."""

    profile: str = "paper"
    q_low: float = 0.05
    q_high: float = 0.95
    h_quantile: float = 0.5
    d_quantile: float = 0.5
    winsor: tuple[float, float] | None = (0.01, 0.99)
    bootstrap: int = 1000
    seed: int = 20260513


@dataclass(frozen=True)
class RegionResult:
    """`buckets`: one row a dataset, score and quartile; `contrasts`: one row a dataset and score; `notes` by dataset."""

    buckets: pd.DataFrame
    contrasts: pd.DataFrame
    notes: dict[str, tuple[str, ...]]
    columns: dict[str, dict]


def within_q3(tables: dict[str, pd.DataFrame], config: RegionConfig | None = None) -> RegionResult:
    """Buckets and contrasts for each named table (the released tool names them by K).

    Profile `released` takes the before-training H and D when they exist, and one stream of random numbers through scores, buckets and
    contrasts; profile `paper` uses before-training columns only and an own stream a contrast. An empty region gives NaN and a note.
    """
    config = config or RegionConfig()
    buckets, contrasts, notes, used = [], [], {}, {}
    for label, table in tables.items():
        table = with_gains(table)
        columns = resolve_columns(table, config.profile, **before_training_where_released(table, config.profile))
        features = build_features(
            table, columns, profile=config.profile, q_low=config.q_low, q_high=config.q_high, winsor=config.winsor
        )
        region = features.frame[low_entropy_high_divergence(features.frame, config.h_quantile, config.d_quantile)]
        notes[label], used[label] = features.notes, columns.as_dict()
        if len(region) == 0:
            notes[label] += ("the Q3 region is empty: nothing to contrast",)
        shared = np.random.default_rng(config.seed)
        for score, column in SCORES.items():
            rows, contrast = _one_score(region, score, column, label, config, shared)
            buckets += rows
            contrasts.append(contrast)
    return RegionResult(pd.DataFrame(buckets), pd.DataFrame(contrasts), notes, used)


def quartile_of(values: np.ndarray) -> np.ndarray:
    """[N] int 0..3: which quarter, edges belonging to the lower one (as pandas.qcut); equal edges leave a quarter empty."""
    edges = np.quantile(values, np.arange(1, BUCKETS) / BUCKETS)
    return np.searchsorted(edges, values, side="left")


def _one_score(region, score, column, label, config: RegionConfig, shared) -> tuple[list[dict], dict]:
    def rng(*names):
        return shared if config.profile == "released" else named_rng(config.seed, label, score, *names)

    if len(region) == 0:
        missing = Interval(float("nan"), float("nan"), float("nan"), 0, np.array([]))
        return [], _contrast_row(label, score, missing, np.zeros(0, bool), np.zeros(0, bool), np.zeros(0))
    x, gain, groups = region[column].to_numpy(), region["G"].to_numpy(), region["group"].to_numpy()
    which, rows = quartile_of(x), []
    for bucket in range(BUCKETS):
        inside = which == bucket
        mean = mean_interval(gain[inside], groups[inside], config.bootstrap, rng(bucket))
        rows.append(
            {
                "dataset": label, "score": score, "bucket": f"Q{bucket + 1}", "n": int(inside.sum()), "groups": mean.num_groups,
                "mean_gain": mean.estimate, "ci_low": mean.low, "ci_high": mean.high,
                **{f"mean_{name}": _mean(region[name].to_numpy()[inside]) for name in ("H", "D", "C", "Dlearn", "Dincompat")},
            }
        )  # fmt: skip
    low_cut, high_cut = np.quantile(x, [1 / BUCKETS, 1 - 1 / BUCKETS])
    high, low = x >= high_cut, x <= low_cut
    found = difference_interval(gain, high, low, groups, config.bootstrap, rng("contrast"))
    return rows, _contrast_row(label, score, found, high, low, gain)


def _contrast_row(label, score, found: Interval, high, low, gain) -> dict:
    return {
        "dataset": label, "score": score, "high_n": int(high.sum()), "low_n": int(low.sum()), "high_mean": _mean(gain[high]),
        "low_mean": _mean(gain[low]), "high_minus_low": found.estimate, "ci_low": found.low, "ci_high": found.high,
        "q3_tokens": len(gain), "groups": found.num_groups,
    }  # fmt: skip


def _mean(x: np.ndarray) -> float:
    return float(x.mean()) if len(x) else float("nan")


def write_within_q3(result: RegionResult, config: RegionConfig, output_dir) -> Path:
    """Writes within_q3_bucket_summary.csv, within_q3_high_low_summary.csv, config.json and a picture a dataset."""
    out = Path(output_dir)
    write_table(out / "within_q3_high_low_summary.csv", result.contrasts)
    write_json(
        out / "config.json",
        {"options": vars(config), "columns": result.columns, "notes": {k: list(v) for k, v in result.notes.items()}},
    )
    if len(result.buckets):
        write_table(out / "within_q3_bucket_summary.csv", result.buckets)
        for label, part in result.buckets.groupby("dataset", sort=False):
            part = part.assign(quartile=part["bucket"].str[1].astype(int))
            plots.curves(
                part, "quartile", "mean_gain", "score", out / f"within_q3_{label}.png", low="ci_low", high="ci_high",
                title=f"Gain by quartile inside Q3, {label}", note="whiskers: 95 % bootstrap intervals over prompts; Q3: low entropy, high divergence",
                xlabel="quartile of the score (1: lowest)", ylabel="mean gain, nats a token",
            )  # fmt: skip
    return out
