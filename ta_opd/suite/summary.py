"""The end of a suite: one row a run, means over seeds with intervals, as CSV, Markdown and a page with its plots."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from ta_opd.suite import memory as mem
from ta_opd.suite.memory import Memory
from ta_opd.suite.plan import Row, Settings, step_names

COLUMNS = (
    "method", "mask", "budget_asked", "budget_real", "seed_label", "seed", "rollout_seed", "mask_seed", "status", "rollouts",
    "kept_tokens", "valid_tokens", "reverse_kl_first", "reverse_kl_last", "forward_kl_before", "forward_kl_after", "gain",
    "gain_relative", "q3_gap", "q3_gap_low", "q3_gap_high", "accuracy_before", "accuracy_after", "response_length",
    "train_seconds", "seconds", "run_dir",
)  # fmt: skip
MEANS = ("budget_real", "reverse_kl_last", "forward_kl_after", "gain", "gain_relative", "q3_gap", "accuracy_after", "train_seconds")
KL_WINDOW = 5  # rollouts averaged at both ends of a run, at most half of it


def summarize(settings: Settings, rows: Sequence[Row], memory: Memory) -> pd.DataFrame:
    """One row a run with COLUMNS; what a run did not write is NaN. Reads files only."""
    return pd.DataFrame([_run_row(settings, row, memory) for row in rows], columns=list(COLUMNS))


def _run_row(settings: Settings, row: Row, memory: Memory) -> dict[str, Any]:
    out: dict[str, Any] = dict.fromkeys(COLUMNS, math.nan)
    done = _json(row.run_dir / "DONE")
    out |= {
        "method": row.entry.method, "mask": row.entry.mask, "budget_asked": row.entry.ratio, "seed_label": row.seeds.label,
        "seed": row.seeds.train, "rollout_seed": row.seeds.rollout, "mask_seed": row.seeds.mask,
        "status": memory.status(row.name, step_names(settings)), "run_dir": str(row.run_dir), "seconds": memory.seconds(row.name) or math.nan,
        "train_seconds": done.get("seconds", math.nan),
    }  # fmt: skip
    out |= _training(row.run_dir / "metrics.jsonl")
    out |= _accuracy(row.run_dir / "eval.jsonl")
    out |= _fixed_context(row.eval_dir / "fixed_context_metrics.parquet")
    out |= _q3_gap(row.eval_dir / "gain" / "q3_bootstrap_matching_summary.csv")
    return out


def _training(path: Path) -> dict[str, Any]:
    """Totals and ends of metrics.jsonl; of a rollout that was logged twice (resumed) the later line counts."""
    records = {r["rollout_id"]: r for r in _json_lines(path) if "rollout_id" in r}
    ordered = [records[k] for k in sorted(records)]
    if not ordered:
        return {}
    kept, valid = (sum(r.get(f"rollout/{k}_tokens", 0) for r in ordered) for k in ("kept", "valid"))
    kl = [r.get("rollout/reverse_kl_valid", math.nan) for r in ordered]
    window = min(KL_WINDOW, max(1, len(ordered) // 2))
    return {
        "rollouts": len(ordered), "kept_tokens": kept, "valid_tokens": valid, "budget_real": kept / valid if valid else math.nan,
        "reverse_kl_first": _mean(kl[:window]), "reverse_kl_last": _mean(kl[-window:]),
        "response_length": _mean([r.get("rollout/response_length", math.nan) for r in ordered[-window:]]),
    }  # fmt: skip


def _accuracy(path: Path) -> dict[str, Any]:
    """Accuracy before (rollout -1) and at the last evaluation, mean over data sets."""
    by_rollout: dict[int, dict[str, float]] = {}
    for record in _json_lines(path):
        if isinstance(record.get("accuracy"), (int, float)):
            by_rollout.setdefault(record["rollout_id"], {})[record.get("dataset", "")] = record["accuracy"]
    out = {}
    if -1 in by_rollout:
        out["accuracy_before"] = _mean(by_rollout[-1].values())
    if by_rollout and max(by_rollout) >= 0:
        out["accuracy_after"] = _mean(by_rollout[max(by_rollout)].values())
    return out


def _fixed_context(path: Path) -> dict[str, Any]:
    """Mean forward KL on the frozen contexts before and after, the gain (their difference, paper eq. 1) and the relative one."""
    if not path.exists():
        return {}
    table = pd.read_parquet(path)
    if not {"KLf_full", "KLf_full_base"} <= set(table):
        return {}
    before, after = table["KLf_full_base"], table["KLf_full"]
    both = before.notna() & after.notna()
    before, after = float(before[both].mean()), float(after[both].mean())
    return {"forward_kl_before": before, "forward_kl_after": after, "gain": before - after,
            "gain_relative": (before - after) / before if before else math.nan}  # fmt: skip


def _q3_gap(path: Path) -> dict[str, Any]:
    """The paper's Q3 gap of gain, high C minus low C, with its bootstrap interval."""
    if not path.exists():
        return {}
    first = pd.read_csv(path).iloc[0]
    keys = {"q3_gap": "bootstrap_mean_diff", "q3_gap_low": "bootstrap_ci_low", "q3_gap_high": "bootstrap_ci_high"}
    return {ours: first[theirs] for ours, theirs in keys.items() if theirs in first}


def over_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """Mean, standard error and 95 % t-interval over seeds for each method and budget; one seed has no interval (NaN).

    Only runs whose training finished count: what a run logged before it was stopped is in the table of runs, not in a mean.
    """
    out = []
    for (method, mask, budget), group in table.groupby(["method", "mask", "budget_asked"], sort=False):
        line: dict[str, Any] = {"method": method, "mask": mask, "budget_asked": budget, "runs": int((group["status"] == mem.DONE).sum())}
        for name in MEANS:
            values = pd.to_numeric(group.loc[group["train_seconds"].notna(), name], errors="coerce").dropna().to_numpy()
            line[name] = values.mean() if len(values) else math.nan
            line[f"{name}_sem"] = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
            half = stats.t.ppf(0.975, len(values) - 1) * line[f"{name}_sem"] if len(values) > 1 else math.nan
            line[f"{name}_low"], line[f"{name}_high"] = line[name] - half, line[name] + half
        out.append(line)
    return pd.DataFrame(out)


def write(settings: Settings, rows: Sequence[Row], memory: Memory) -> list[Path]:
    """Writes suite_summary.{csv,md,html}, suite_summary_seeds.csv and plots/*.png into the suite's directory."""
    from ta_opd.suite import page

    table = summarize(settings, rows, memory)
    seeds = over_seeds(table)
    directory = settings.directory
    directory.mkdir(parents=True, exist_ok=True)
    written = [directory / "suite_summary.csv", directory / "suite_summary_seeds.csv", directory / "suite_summary.md"]
    table.to_csv(written[0], index=False)
    seeds.to_csv(written[1], index=False)
    plots = page.plots(seeds, directory / "plots")
    written[2].write_text(page.markdown(settings, table, seeds))
    html = directory / "suite_summary.html"
    html.write_text(page.html(settings, table, seeds, plots))
    return [*written, html, *plots]


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """Records of a file that may still be written: an unfinished last line is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def _mean(values) -> float:
    array = np.array([float(v) for v in values])
    array = array[np.isfinite(array)]
    return float(array.mean()) if len(array) else math.nan
