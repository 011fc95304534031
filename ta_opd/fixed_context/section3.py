"""The tables of the paper's section 3 from before-training features and gains: per dataset and pooled, with robust statistics."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ta_opd.errors import DataError
from ta_opd.fixed_context.bootstrap import difference_interval, mean_interval, named_rng
from ta_opd.fixed_context.features import build_features, low_entropy_high_divergence, resolve_columns
from ta_opd.fixed_context.join import join_baseline
from ta_opd.fixed_context.regions import quartile_of
from ta_opd.fixed_context.regression import MODELS, coefficient_rows, design
from ta_opd.fixed_context.support import definitions_of, with_set_columns
from ta_opd.fixed_context.tables import read_meta, read_table, to_markdown, write_json, write_table

BEFORE, AFTER = "theta0_metrics.parquet", "eval_latest/fixed_context_metrics.parquet"
NAMES = {"H_D": "H_D_interaction", "H_D_C": "H_D_C", "H_Dlearn_Dincompat": "teach_decomp"}
VARIANTS = {"raw": None, "trim_5_95": (0.05, 0.95), "winsor_1_99": (0.01, 0.99), "winsor_5_95": (0.05, 0.95)}


@dataclass(frozen=True)
class Section3Config:
    """gain: `absolute` (paper, eq. 1) or `relative` (released)."""

    bootstrap: int = 1000
    seed: int = 41717
    gain: str = "absolute"

    @property
    def gain_column(self) -> str:
        return {"absolute": "G_KLf_abs", "relative": "G_KLf"}[self.gain]


def load_dataset(spec: str) -> tuple[str, pd.DataFrame]:
    """(name, joined table) of "NAME=DIR" (a diagnostic folder) or "NAME=BEFORE:AFTER" (two tables). DataError when files are missing."""
    name, _, where = spec.partition("=")
    if not name or not where:
        raise DataError(f"dataset: expected NAME=DIR or NAME=BEFORE:AFTER, got {spec!r}")
    before, _, after = where.partition(":")
    paths = (Path(before), Path(after)) if after else (Path(where) / BEFORE, Path(where) / AFTER)
    frames = [read_table(path) for path in paths]
    metas = [read_meta(path) for path in paths]
    after_table = frames[1][[c for c in frames[1] if not c.endswith("_base") and not c.startswith("G_")]]
    return name, join_baseline(after_table, frames[0], after_meta=metas[1], before_meta=metas[0])


def section3_tables(datasets: dict[str, pd.DataFrame], config: Section3Config | None = None) -> dict[str, pd.DataFrame]:
    """File stem -> table, for every table of the released package, computed from `*_base` features. DataError without a dataset."""
    config = config or Section3Config()
    if not datasets:
        raise DataError("section 3: expected at least one dataset")
    tables: dict[str, list] = {stem: [] for stem in (
        "section3_dataset_manifest", "existing_q3_scale_context_summary", "robust_gain_stats", "bucket_gain_curves",
        "standardized_regression_coefficients", "within_q3_support_proxy_summary", "spline_sanity_bins",
    )}  # fmt: skip
    tokens = []
    for name, table in datasets.items():
        columns = resolve_columns(table, "paper", gain=config.gain_column)
        features = {
            variant: build_features(
                table, columns, profile="paper",
                winsor=cut if variant.startswith("winsor") else None, trim=cut if variant.startswith("trim") else None,
            )
            for variant, cut in VARIANTS.items()
        }  # fmt: skip
        raw = features["raw"].frame
        q3 = low_entropy_high_divergence(raw)
        tables["section3_dataset_manifest"].append(
            {"dataset": name, "tokens": len(raw), "nan_rows": features["raw"].nan_rows, "groups": raw["group"].nunique(),
             "q3_tokens": int(q3.sum()), "gain_column": columns.gain, **{f"{k}_column": v for k, v in columns.as_dict().items()}}
        )  # fmt: skip
        tables["existing_q3_scale_context_summary"].append(_scale(name, raw, q3, config))
        tables["robust_gain_stats"] += [_robust(name, variant, f.frame, config) for variant, f in features.items()]
        tables["bucket_gain_curves"] += _bucket_curves(name, raw, q3, config)
        for variant in ("raw", "winsor_1_99"):
            tables["standardized_regression_coefficients"] += _coefficients(name, variant, features[variant].frame)
        tables["within_q3_support_proxy_summary"] += _proxies(name, table, raw, q3, config)
        tables["spline_sanity_bins"] += _residual_bins(name, raw)
        tokens.append(raw.assign(dataset=name, in_q3=q3))
    result = {stem: pd.DataFrame(rows) for stem, rows in tables.items()}
    result["section3_analysis_tokens"] = pd.concat(tokens, ignore_index=True).astype({"group": str})
    return result


def _scale(name, raw, q3, config) -> dict:
    region = raw[q3]
    row = {"dataset": name, "q3_tokens": len(region), "groups": region["group"].nunique()}
    if len(region) == 0:
        return row | {"note": "the Q3 region is empty"}
    low, high = np.quantile(region["C"], [1 / 3, 2 / 3])
    found = difference_interval(
        region["G"], region["C"] >= high, region["C"] <= low, region["group"], config.bootstrap, named_rng(config.seed, name, "scale")
    )
    return row | {"high_minus_low_c": found.estimate, "ci_low": found.low, "ci_high": found.high, "note": ""}


def _robust(name, variant, frame, config) -> dict:
    mean = mean_interval(frame["G"], frame["group"], config.bootstrap, named_rng(config.seed, name, variant))
    return {
        "dataset": name, "variant": variant, "n": len(frame), "mean": mean.estimate, "ci_low": mean.low, "ci_high": mean.high,
        "median": float(frame["G"].median()), "share_positive": float((frame["G"] > 0).mean()),
    }  # fmt: skip


def _bucket_curves(name, raw, q3, config) -> list[dict]:
    rows = []
    for region, frame in (("all", raw), ("Q3", raw[q3])):
        if len(frame) == 0:
            continue
        for score in ("H", "D", "C", "Dlearn", "Dincompat"):
            which = quartile_of(frame[score].to_numpy())
            for bucket in range(4):
                part = frame[which == bucket]
                mean = mean_interval(part["G"], part["group"], config.bootstrap, named_rng(config.seed, name, region, score, bucket))
                rows.append({"dataset": name, "region": region, "score": score, "bucket": f"Q{bucket + 1}", "n": len(part),
                             "mean_gain": mean.estimate, "ci_low": mean.low, "ci_high": mean.high})  # fmt: skip
    return rows


def _coefficients(name, variant, frame) -> list[dict]:
    rows = []
    for model, terms in MODELS.items():
        coefficients, r2 = coefficient_rows(frame, terms, standardise=True)
        rows += [{"dataset": name, "gain": variant, "model": NAMES[model], "r2": r2, **row} for row in coefficients]
    return rows


def _proxies(name, table, raw, q3, config) -> list[dict]:
    table = with_set_columns(table, "_base")
    rows = []
    for definition in definitions_of(table, "_base"):
        values = table[f"{definition}_base"].to_numpy(float)[raw["row"]][q3]
        region = raw[q3][np.isfinite(values)]
        values = values[np.isfinite(values)]
        if len(region) == 0:
            continue
        low, high = np.quantile(values, [0.25, 0.75])
        found = difference_interval(
            region["G"], values >= high, values <= low, region["group"], config.bootstrap, named_rng(config.seed, name, definition)
        )
        note = "its top and bottom quarter share tokens" if low == high else ""
        rows.append({"dataset": name, "support": definition, "n": len(region), "high_minus_low": found.estimate,
                     "ci_low": found.low, "ci_high": found.high, "note": note})  # fmt: skip
    return rows


def _residual_bins(name, raw, bins: int = 10) -> list[dict]:
    """Deciles of C, Dlearn and Dincompat against what H, D, position and teacher entropy leave of the gain."""
    x = design(raw, ("H", "D", "pos", "Ht"))
    beta, *_ = np.linalg.lstsq(x, raw["G"].to_numpy(), rcond=None)
    left = raw["G"].to_numpy() - x @ beta
    rows = []
    for score in ("C", "Dlearn", "Dincompat"):
        edges = np.quantile(raw[score], np.arange(1, bins) / bins)
        which = np.searchsorted(edges, raw[score].to_numpy(), side="left")
        for b in range(bins):
            inside = which == b
            rows.append({"dataset": name, "score": score, "decile": b + 1, "n": int(inside.sum()),
                         "mean_score": float(raw[score].to_numpy()[inside].mean()) if inside.any() else float("nan"),
                         "mean_residual": float(left[inside].mean()) if inside.any() else float("nan")})  # fmt: skip
    return rows


def write_section3(tables: dict[str, pd.DataFrame], config: Section3Config, output_dir) -> Path:
    """Writes every table as CSV, the tokens as parquet, and section3_p0_evidence_summary.md."""
    out = Path(output_dir)
    for stem, frame in tables.items():
        write_table(out / (stem + (".parquet" if stem == "section3_analysis_tokens" else ".csv")), frame)
    write_json(out / "section3_config.json", vars(config) | {"gain_column": config.gain_column})
    parts = [f"# Section 3 tables ({config.gain} gain, before-training features)\n"]
    for stem in ("section3_dataset_manifest", "existing_q3_scale_context_summary", "robust_gain_stats", "within_q3_support_proxy_summary"):
        parts.append(f"## {stem}\n\n{to_markdown(tables[stem])}")
    (out / "section3_p0_evidence_summary.md").write_text("\n".join(parts))
    return out
