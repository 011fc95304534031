"""Budget curves: what a finished set of runs says about gain or accuracy against the share of tokens kept.

A run folder is named `<mask>_ratio<tag>`, or `<mask>_<tag>_<seed label>` in a suite of this project; tags are read as r0p05 / 0p05 (this
project: the number with p for the point) and as the released 005 (the number without its point). The ratio kept in fact is that of the
token bank beside it, or of the suite's summary.
"""

import re
from pathlib import Path

import numpy as np
import pandas as pd

from ta_opd.errors import DataError
from ta_opd.fixed_context import plots
from ta_opd.fixed_context.tables import read_table, to_markdown, write_table

GAIN_SUMMARY = "q3_bootstrap_matching_summary.csv"
SUITE_SUMMARY = "suite_summary.csv"
_RUN = re.compile(r"^(?P<mask>.+?)_r(?:atio)?_?(?P<tag>r?\d+(?:[p.]\d+)?)$")
_SUITE_RUN = re.compile(r"^(?P<mask>[a-z0-9_]+)_(?P<tag>r[01]p\d+)_(?P<seed>[A-Za-z0-9._-]+)$")
_SET_ASIDE = re.compile(r"\.old_\d{8}_\d{6}$")  # by FORCE=1


def parse_ratio_tag(tag: str) -> float:
    """0.05 for "r0p05", "0p05", "0.05" and the released "005"; 1.0 for "r1" and the released "10"; 0.1 for "01" and "010".

    A tag without point is the released form: its first digit stands before the point. DataError on anything else.
    """
    text = tag.strip().lower().removeprefix("r")
    if re.fullmatch(r"\d+[p.]\d+", text):
        return float(text.replace("p", "."))
    if re.fullmatch(r"\d+", text):
        return float(text) if tag.lower().startswith("r") else float(f"{text[0]}.{text[1:] or '0'}")
    raise DataError(f"ratio tag: expected r0p05, 0p05 or the released 005, got {tag!r}")


def run_name_parts(name: str) -> tuple[str, float, str]:
    """(mask, ratio, seed label or "") of a run folder's name. DataError when it has another form."""
    match = None if _SET_ASIDE.search(name) else _RUN.match(name) or _SUITE_RUN.match(name)
    if not match:
        raise DataError(f"run folder {name!r}: expected <mask>_ratio<tag>, such as dlearn_high_ratio0p05, or <mask>_r0p05_<seed label>")
    return match["mask"], parse_ratio_tag(match["tag"]), match.groupdict().get("seed") or ""


def collect_gain_runs(roots: dict[str, Path]) -> tuple[pd.DataFrame, list[str]]:
    """(rows, notes): one row a run folder with a gain summary under each root (label -> folder): label, mask, ratio, the summary's columns,
    mean_gain of its tokens, and keep_ratio of a token bank, or of the suite's summary, when one is there. Folders without a summary are
    named in the notes. The label of a run in a root with several seeds is its seed's ("root:seed" with several roots), else the root's.
    """
    rows, notes = [], []
    for label, root in roots.items():
        if not Path(root).is_dir():
            raise DataError(f"run root {root}: no such folder")
        found = {}
        for folder in sorted(p for p in Path(root).iterdir() if p.is_dir()):
            try:
                found[folder] = run_name_parts(folder.name)
            except DataError:
                continue
        real, several = _kept_in_suite(Path(root)), len({seed for *_, seed in found.values()}) > 1
        for folder, (mask, ratio, seed) in found.items():
            summary = next(iter(sorted(folder.glob(f"**/{GAIN_SUMMARY}"))), None)
            if summary is None:
                notes.append(f"{folder}: no {GAIN_SUMMARY}")
                continue
            own = label if not several else seed if len(roots) == 1 else f"{label}:{seed}"
            row = {"label": own, "run": folder.name, "mask": mask, "ratio": ratio, **read_table(summary).iloc[0].to_dict()}
            row |= kept_tokens(folder) or real.get((mask, round(ratio, 9), seed), {})
            if "mean_gain" not in row:
                tokens = summary.parent / "analysis_tokens.parquet"
                if tokens.is_file():
                    row["mean_gain"] = float(read_table(tokens, ["G_KLf"])["G_KLf"].mean())
            rows.append(row)
    if not rows:
        raise DataError(f"no run folder with a {GAIN_SUMMARY} under {', '.join(map(str, roots.values()))}")
    frame = pd.DataFrame(rows)
    for gain in ("bootstrap_mean_diff", "matching_mean_diff"):
        if gain in frame:
            frame[f"{gain}_per_keep"] = frame[gain] / frame.get("keep_ratio", frame["ratio"]).fillna(frame["ratio"])
    return frame, notes


def _kept_in_suite(root: Path) -> dict[tuple[str, float, str], dict]:
    """{(mask, ratio asked, seed label): what `kept_tokens` gives} from the summary of a suite in `root`; {} when there is none."""
    if not (root / SUITE_SUMMARY).is_file():
        return {}
    names = {"keep_ratio": "budget_real", "kept_tokens": "kept_tokens", "valid_tokens": "valid_tokens"}
    table = read_table(root / SUITE_SUMMARY)
    if not {"mask", "budget_asked", "seed_label", *names.values()} <= set(table):
        return {}
    table = table[table["budget_real"].notna()]
    return {(r["mask"], round(float(r["budget_asked"]), 9), str(r["seed_label"])): {ours: r[theirs] for ours, theirs in names.items()}
            for r in table.to_dict("records")}  # fmt: skip


def kept_tokens(folder: Path) -> dict:
    """{"keep_ratio", "kept_tokens", "valid_tokens"} from the summary.csv of a token bank in or under `folder`; {} when there is none."""
    for summary in sorted(Path(folder).glob("**/token_bank/summary.csv")):
        frame = pd.read_csv(summary).drop_duplicates("rollout_id", keep="last")
        kept, valid = int(frame["num_kept_tokens"].sum()), int(frame["num_valid_tokens"].sum())
        return {"keep_ratio": kept / valid if valid else float("nan"), "kept_tokens": kept, "valid_tokens": valid}
    return {}


def budget_accuracy(frame: pd.DataFrame, *, method: str = "method", budget: str = "budget_ratio", metric: str = "score") -> pd.DataFrame:
    """Per method and budget: n, mean, std (n-1), sem, ci95 (1.96 sem) of the metric; rows without a number are left out.

    Raises DataError when a column is missing or no row has a number.
    """
    missing = [name for name in (method, budget, metric) if name not in frame]
    if missing:
        raise DataError(f"budget curve: expected the columns {', '.join(missing)}; the table has {', '.join(frame.columns)}")
    values = frame.assign(**{metric: pd.to_numeric(frame[metric], errors="coerce")}).dropna(subset=[metric])
    if len(values) == 0:
        raise DataError(f"budget curve: no row has a number in {metric!r}")
    grouped = values.groupby([method, budget], sort=True)[metric]
    out = grouped.agg(n="size", mean="mean", std=lambda x: x.std(ddof=1)).reset_index()
    out["sem"] = out["std"] / np.sqrt(out["n"])
    out["ci95"] = 1.96 * out["sem"]
    return out


def write_budget_accuracy(summary: pd.DataFrame, output_dir, *, method: str, budget: str, metric: str) -> Path:
    """Writes budget_accuracy_summary.{csv,md} and budget_accuracy.png."""
    out = Path(output_dir)
    write_table(out / "budget_accuracy_summary.csv", summary)
    (out / "budget_accuracy_summary.md").write_text(to_markdown(summary))
    half = summary["ci95"].fillna(0)
    plots.curves(
        summary.assign(low=summary["mean"] - half, high=summary["mean"] + half), budget, "mean", method, out / "budget_accuracy.png",
        low="low", high="high", title=f"{metric} by budget", note="whiskers: 1.96 standard errors", xlabel="budget", ylabel=metric,
    )  # fmt: skip
    return out
