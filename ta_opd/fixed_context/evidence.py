"""The core evidence of several finished diagnostics side by side: one row a diagnostic, one page, one picture of the Q3 contrasts."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from ta_opd.errors import DataError
from ta_opd.fixed_context.plots import OKABE_ITO, new_figure
from ta_opd.fixed_context.tables import read_table, to_markdown, write_table

NOTES = (
    "r2: share of the gain's variance that H, D, H x D, position and the teacher's entropy explain, and what C or the split of D into "
    "learnable and incompatible disagreement adds. Q3: low student entropy, high divergence. High against low C: thirds of Q3; Dlearn: top "
    "against bottom quarter of Q3; intervals are 95 % over prompts. top-N: mean gain of the tokens that a rule would have kept at that budget, "
    "less that of a random choice. Support: smallest and largest Q3 contrast over all definitions of support and all K."
)


def core_evidence(diagnostics: Mapping[str, Path], ratio: float = 0.05) -> pd.DataFrame:
    """One row a diagnostic folder with what its analyses found; an analysis that was not run leaves NaN.

    Reads analysis/{gain,within_q3,topn,support}. Raises DataError for a folder without analyses.
    """
    return pd.DataFrame([_row(name, Path(path), ratio) for name, path in diagnostics.items()])


def _row(name: str, folder: Path, ratio: float) -> dict:
    analysis = folder / "analysis"
    if not (analysis / "gain" / "regression_summary.csv").is_file():
        raise DataError(f"{name}={folder}: expected a finished diagnostic (analysis/gain/regression_summary.csv), found none")
    r2 = read_table(analysis / "gain" / "regression_summary.csv").set_index("model")["r2"]
    row = {"diagnostic": name, "r2_HD": r2["H_D"], "added_by_C": r2["H_D_C"] - r2["H_D"], "added_by_split": r2["H_Dlearn_Dincompat"] - r2["H_D"]}
    q3 = read_table(analysis / "gain" / "q3_bootstrap_matching_summary.csv").iloc[0]
    row |= {"q3_tokens": q3.get("q3_tokens", np.nan), "q3_contrast": q3["bootstrap_mean_diff"], "q3_low": q3["bootstrap_ci_low"],
            "q3_high": q3["bootstrap_ci_high"], "matched_pairs": q3["matching_pairs"], "matched_diff": q3["matching_mean_diff"]}  # fmt: skip
    return row | _within(analysis / "within_q3") | _topn(analysis / "topn", ratio) | _support(analysis / "support")


def _within(folder: Path) -> dict:
    path = folder / "within_q3_high_low_summary.csv"
    if not path.is_file():
        return {}
    frame = read_table(path)
    part = frame[frame["score"] == "Dlearn"]
    names = {"dlearn_contrast": "high_minus_low", "dlearn_low": "ci_low", "dlearn_high": "ci_high"}
    return {} if part.empty else {ours: part[theirs].iloc[0] for ours, theirs in names.items()}


def _topn(folder: Path, ratio: float) -> dict:
    path = folder / "matched_fixed_context_topn.csv"
    if not path.is_file():
        return {}
    frame = read_table(path)
    frame = frame[np.isclose(frame["ratio"], ratio)].drop_duplicates("selector").set_index("selector")
    if "random" not in frame.index:
        return {}
    gain = frame["mean_gain"] - frame.loc["random", "mean_gain"]
    out = {f"topn_{name}": gain[name] for name in ("dlearn_high", "entropy", "divergence", "tip_softor") if name in gain}
    return out | {"topn_best": gain.drop("random").idxmax()}


def _support(folder: Path) -> dict:
    path = folder / "support_definition_robustness.csv"
    if not path.is_file():
        return {}
    contrast = read_table(path)["q3_high_minus_low"].dropna()
    return {} if contrast.empty else {"support_definitions": len(contrast), "support_min": contrast.min(), "support_max": contrast.max()}


def write_core_evidence(frame: pd.DataFrame, out: Path, ratio: float = 0.05) -> list[Path]:
    """core_evidence.csv, core_evidence_report.md (one column a diagnostic) and core_evidence_q3.png."""
    out.mkdir(parents=True, exist_ok=True)
    table = write_table(out / "core_evidence.csv", frame)
    turned = frame.set_index("diagnostic").T.rename_axis("quantity").reset_index()
    page = out / "core_evidence_report.md"
    page.write_text(f"# Core evidence of {len(frame)} diagnostics\n\nBudget of the top-N rows: {ratio:g}.\n\n{to_markdown(turned)}\n{NOTES}\n")
    return [table, page, _forest(frame, out / "core_evidence_q3.png")]


def _forest(frame: pd.DataFrame, path: Path) -> Path:
    figure, axes = new_figure(7.0, 0.9 + 0.55 * len(frame))
    y = np.arange(len(frame))[::-1]
    series = [("q3_contrast", "q3_low", "q3_high", "high against low C", 0.12, "o")]
    if "dlearn_contrast" in frame:
        series.append(("dlearn_contrast", "dlearn_low", "dlearn_high", "high against low Dlearn", -0.12, "s"))
    for i, (middle, low, high, label, shift, marker) in enumerate(series):
        errors = [frame[middle] - frame[low], frame[high] - frame[middle]]
        axes.errorbar(frame[middle], y + shift, xerr=errors, fmt=marker, color=OKABE_ITO[4 * i], capsize=3, ms=6, label=label)
    axes.axvline(0, color="grey", lw=0.8)
    axes.set(yticks=y, yticklabels=frame["diagnostic"], ylim=(-0.6, len(frame) - 0.4), xlabel="difference in mean gain inside Q3, 95 % interval over prompts")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    return path
