"""All analyses of one diagnostic folder in one call, and the page that sums them up. Used by the pipeline; every part is its own tool too."""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from ta_opd.errors import DataError
from ta_opd.fixed_context.bootstrap import mean_interval, named_rng
from ta_opd.fixed_context.features import resolve_columns, with_gains
from ta_opd.fixed_context.gain import GainConfig, analyze_gain, write_gain
from ta_opd.fixed_context.reachability import ReachabilityConfig, reachability
from ta_opd.fixed_context.recommend import RecommendConfig, recommend, write_recommendation
from ta_opd.fixed_context.regions import RegionConfig, within_q3, write_within_q3
from ta_opd.fixed_context.support import SupportConfig, support_robustness, write_support
from ta_opd.fixed_context.tables import read_meta, read_table, to_markdown, write_json, write_table
from ta_opd.fixed_context.topn import TopNConfig, matched_topn, write_topn


@dataclass(frozen=True)
class AnalysisConfig:
    """profile, bootstrap and seed of every analysis (seed None: each analysis' own default); winsor: for the tools that take one."""

    profile: str = "paper"
    bootstrap: int = 1000
    seed: int | None = None
    winsor: tuple[float, float] | None = (0.01, 0.99)

    def seeded(self, default: int) -> int:
        return default if self.seed is None else self.seed


def run_gain(table: pd.DataFrame, name: str, config: AnalysisConfig, out: Path) -> None:
    """analysis/gain, within_q3, topn and reachability of one joined table."""
    gain = GainConfig(profile=config.profile, bootstrap=config.bootstrap, seed=config.seeded(42))
    write_gain(analyze_gain(table, gain), out / "gain")
    region = RegionConfig(profile=config.profile, bootstrap=config.bootstrap, seed=config.seeded(20260513), winsor=config.winsor)
    write_within_q3(within_q3({name: table}, region), region, out / "within_q3")
    topn = TopNConfig(profile=config.profile, bootstrap=config.bootstrap, seed=config.seeded(20260515), winsor=config.winsor)
    write_topn(matched_topn(table, topn, dataset=name), topn, {name: "joined table"}, out / "topn")
    try:
        models, tertiles, notes = reachability(table, ReachabilityConfig(profile=config.profile, seed=config.seeded(42)))
    except DataError as error:
        models, tertiles, notes = pd.DataFrame(), pd.DataFrame(), [str(error)]
    write_table(out / "reachability" / "q3_reachability.csv", models)
    write_table(out / "reachability" / "q3_reachability_tertiles.csv", tertiles)
    write_json(out / "reachability" / "notes.json", notes)


def run_support(table: pd.DataFrame, name: str, config: AnalysisConfig, out: Path) -> None:
    """analysis/support of one joined table (support definitions and K)."""
    support = SupportConfig(profile=config.profile, bootstrap=config.bootstrap, seed=config.seeded(17))
    write_support(support_robustness({name: table}, support), support, {}, out / "support")


def run_recommendation(table: pd.DataFrame, config: AnalysisConfig, out: Path) -> None:
    """analysis/recommend of one joined table; says why where the table does not allow it."""
    options = RecommendConfig(bootstrap=config.bootstrap, seed=config.seeded(42), winsor=config.winsor, profile=config.profile)
    write_recommendation(recommend(table, options), out / "recommend")


def gain_by_checkpoint(tables: dict[str, Path], config: AnalysisConfig) -> pd.DataFrame:
    """One row a checkpoint: mean and median gain, its interval, mean divergence before and after, entropy, relative gain.

    tables: checkpoint name -> joined table, in training order.
    """
    rows = []
    for name, path in tables.items():
        table = with_gains(read_table(path))
        columns = resolve_columns(table, "paper" if config.profile == "paper" else "released")
        gain = table[columns.gain]
        usable = gain.notna()
        mean = mean_interval(gain[usable], table[columns.group][usable], config.bootstrap, named_rng(config.seeded(42), name))
        row = {"checkpoint": name, "tokens": len(table), "nan_rows": int((~usable).sum()), "gain_column": columns.gain,
               "mean_gain": mean.estimate, "ci_low": mean.low, "ci_high": mean.high, "median_gain": float(gain.median()),
               "share_positive": float((gain[usable] > 0).mean())}  # fmt: skip
        for column in ("KLf_full", "KLf_full_base", "KLr_full", "KLr_full_base", "Hs_full", "Hs_full_base", "KLf_union", "KLf_union_base",
                       "Cmass_true", "Cmass_true_base"):  # fmt: skip
            if column in table:
                row[f"mean_{column}"] = float(table[column].mean())
        rows.append(row)
    return pd.DataFrame(rows)


def summary_page(title: str, diag_dir: Path, facts: dict) -> str:
    """The run's summary in Markdown, from the files of its analyses; parts that were not run are left out."""
    analysis = diag_dir / "analysis"
    lines = [f"# {title}\n"]
    lines += [f"- {key}: {value}" for key, value in facts.items()]
    metrics = next(iter(sorted(diag_dir.glob("eval_latest/fixed_context_metrics.parquet"))), None)
    if metrics is not None:
        meta = read_meta(metrics)
        lines += [f"- {key}: {meta[key]}" for key in ("contexts", "positions", "topk", "bank_fingerprint") if key in meta]
    blocks = (
        ("Gain by checkpoint", analysis / "gain_by_checkpoint.csv", None),
        ("Regressions of the gain", analysis / "gain" / "regression_summary.csv", None),
        ("High against low C inside Q3, and matching", analysis / "gain" / "q3_bootstrap_matching_summary.csv", "rows"),
        ("Within Q3: top against bottom quarter", analysis / "within_q3" / "within_q3_high_low_summary.csv", None),
        ("Support definitions and K", analysis / "support" / "support_definition_robustness.csv", None),
    )
    for heading, path, layout in blocks:
        if path.is_file():
            frame = read_table(path)
            if layout == "rows":
                frame = frame.iloc[0].rename_axis("quantity").rename("value").reset_index()
            lines.append(f"\n## {heading}\n\n{to_markdown(frame)}")
    page = analysis / "recommend" / "selector_recommendation.md"
    if page.is_file():
        lines.append("\n" + page.read_text().replace("# Which selector", "## Which selector", 1))
    return "\n".join(lines) + "\n"


