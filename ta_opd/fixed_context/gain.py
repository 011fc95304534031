"""The gain analysis: what explains the gain, and does compatibility separate learnable tokens inside the Q3 region?

Released file names: regression_summary.csv, q3_bootstrap_matching_summary.csv, q3_matching_pairs.parquet, analysis_tokens.parquet,
config.json and three pictures; added: regression_coefficients.csv (cluster-robust).
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from ta_opd.fixed_context import plots
from ta_opd.fixed_context.bootstrap import difference_interval, named_rng
from ta_opd.fixed_context.features import (
    Columns,
    build_features,
    low_entropy_high_divergence,
    resolve_columns,
    with_gains,
)
from ta_opd.fixed_context.matching import match_within_groups, matching_summary
from ta_opd.fixed_context.regression import regression_tables, residual
from ta_opd.fixed_context.tables import write_json, write_table
from ta_opd.scores import QUADRANT_NAMES, ScoreConfig
from ta_opd.scores import batch_scores as online_scores

Q3 = QUADRANT_NAMES[3]


@dataclass(frozen=True)
class GainConfig:
    """Options of `analyze_gain`; the quantiles are those of the released tool. winsor and trim are (low, high) quantiles of the gain."""

    profile: str = "paper"
    q_low: float = 0.05
    q_high: float = 0.95
    h_quantile: float = 0.5
    d_quantile: float = 0.5
    low_c_quantile: float = 1 / 3
    high_c_quantile: float = 2 / 3
    bootstrap: int = 1000
    seed: int = 42
    use_quadrant: bool = False
    winsor: tuple[float, float] | None = None
    trim: tuple[float, float] | None = None
    overrides: dict = field(default_factory=dict)


@dataclass(frozen=True)
class GainResult:
    """Tables of one analysis; `summary` has one row, `notes` say what a reader must know (rows left out, empty region, fallbacks)."""

    columns: Columns
    regressions: pd.DataFrame
    coefficients: pd.DataFrame
    summary: pd.DataFrame
    pairs: pd.DataFrame
    tokens: pd.DataFrame
    notes: tuple[str, ...]
    config: GainConfig


def analyze_gain(table: pd.DataFrame, config: GainConfig | None = None) -> GainResult:
    """Regressions, the Q3 contrast of high against low C with its cluster bootstrap, and within-context matching.

    The C cuts are tertiles of the whole region, fixed before the bootstrap. An empty region gives NaN and a note, not an error.
    Raises DataError when a needed column is missing or no row is left.
    """
    config = config or GainConfig()
    table = with_gains(table)
    columns = resolve_columns(table, config.profile, **config.overrides)
    features = build_features(
        table, columns, profile=config.profile, q_low=config.q_low, q_high=config.q_high, winsor=config.winsor, trim=config.trim
    )  # fmt: skip
    frame, notes = features.frame, list(features.notes)
    regressions, coefficients = regression_tables(frame)
    if coefficients["rank_deficient"].any():
        models = ", ".join(coefficients.loc[coefficients["rank_deficient"], "model"].unique())
        notes.append(f"terms of {models} are constant or repeat each other: their single coefficients mean nothing")
    in_region = _region(table, frame, config, notes)
    summary = {
        "profile": config.profile, "gain_column": columns.gain, "rows": len(frame), "nan_rows": features.nan_rows,
        "groups": frame["group"].nunique(), "mean_gain": float(frame["G"].mean()), "q3_tokens": int(in_region.sum()),
    }  # fmt: skip
    region = frame[in_region]
    if summary["groups"] < 2:
        notes.append("only one group: no bootstrap or cluster-robust interval can be given")
    contrast, pairs = _contrast(region, config, notes)
    summary |= contrast
    summary |= matching_summary(pairs, config.bootstrap, named_rng(config.seed, "matching"))
    tokens = table.iloc[frame["row"]].reset_index(drop=True)
    added = frame.drop(columns=["row", "group"]).rename(columns=lambda name: f"feature_{name}")
    tokens = pd.concat([tokens, added.reset_index(drop=True)], axis=1)
    tokens["residual_HD"], tokens["in_q3"] = residual(frame), in_region
    return GainResult(
        columns, regressions, coefficients, pd.DataFrame([summary]), pairs, tokens, tuple(notes), config
    )  # fmt: skip


def _contrast(region: pd.DataFrame, config: GainConfig, notes: list[str]) -> tuple[dict, pd.DataFrame]:
    names = ("bootstrap_mean_diff", "bootstrap_ci_low", "bootstrap_ci_high")
    if len(region) == 0:
        notes.append("the Q3 region is empty: no contrast and no matching")
        return dict.fromkeys(names, float("nan")), match_within_groups(region)
    c = region["C"].to_numpy()
    low_cut, high_cut = np.quantile(c, [config.low_c_quantile, config.high_c_quantile])
    if low_cut == high_cut:
        notes.append(f"C is {low_cut:.4g} at both cuts of the region: the high and the low side share tokens")
    rng = np.random.default_rng(config.seed)
    found = difference_interval(region["G"], c >= high_cut, c <= low_cut, region["group"], config.bootstrap, rng)
    values = (found.estimate, found.low, found.high)
    sides = {"high_c_tokens": int((c >= high_cut).sum()), "low_c_tokens": int((c <= low_cut).sum())}
    return dict(zip(names, values, strict=True)) | sides, match_within_groups(region)


def _region(table: pd.DataFrame, frame: pd.DataFrame, config: GainConfig, notes: list[str]) -> np.ndarray:
    """[N] bool. With use_quadrant: the table's `quadrant` column, or the online rule applied to the features."""
    if not config.use_quadrant:
        return low_entropy_high_divergence(frame, config.h_quantile, config.d_quantile)
    if "quadrant" in table:
        quadrant = table["quadrant"].to_numpy()[frame["row"]]
        return (quadrant == Q3) | (quadrant == 3)
    if config.profile == "released":
        notes.append("no quadrant column: the region is cut by quantiles, as without --use-quadrant")
        return low_entropy_high_divergence(frame, config.h_quantile, config.d_quantile)
    notes.append("no quadrant column: quadrants are the online rule on the analysis features (high = at or above the median)")
    metrics = {"Hs_topk_norm": frame["raw_h"].to_numpy(), "KLf_union": frame["raw_d"].to_numpy(), "Cmass": frame["raw_c"].to_numpy()}
    scores = online_scores(metrics, np.ones(len(frame), bool), ScoreConfig(q_low=config.q_low, q_high=config.q_high))
    return scores["quadrant"] == 3


def write_gain(result: GainResult, output_dir, *, pictures: bool = True) -> Path:
    """Writes the files of the module's description to `output_dir`; returns it."""
    out = Path(output_dir)
    out.mkdir(parents=True, exist_ok=True)
    write_table(out / "regression_summary.csv", result.regressions)
    write_table(out / "regression_coefficients.csv", result.coefficients)
    write_table(out / "q3_bootstrap_matching_summary.csv", result.summary)
    write_table(out / "q3_matching_pairs.parquet", result.pairs)
    write_table(out / "analysis_tokens.parquet", result.tokens)
    write_json(
        out / "config.json",
        {"columns": result.columns.as_dict(), "options": asdict(result.config), "notes": list(result.notes)},
    )
    if pictures:
        plots.gain_pictures(result.tokens, out)
    return out

