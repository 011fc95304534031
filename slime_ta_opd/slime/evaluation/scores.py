"""What evaluation reports: the harness's files read by their real keys, mean and standard error over seeds, difference to a base model."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from ta_opd.errors import DataError

# What a task's headline number is called, best first. The harness writes `metric,filter`.
HEADLINE = (
    ("aime", ("exact_match,none",)),
    ("minerva_math|hendrycks_math|math500|math_500", ("math_verify,none", "exact_match,none")),
    ("leaderboard_math", ("exact_match,none",)),
    ("gsm8k", ("exact_match,flexible-extract", "exact_match,strict-match", "exact_match,none")),
    ("gpqa", ("exact_match,flexible-extract", "exact_match,strict-match", "acc_norm,none", "acc,none")),
    ("humaneval", ("pass@1,create_test", "pass_at_k,create_test")),
    ("ifeval", ("prompt_level_strict_acc,none",)),
)
ANYWHERE = ("exact_match,none", "exact_match,last-number", "acc,none")


def headline(task: str, values: dict[str, Any]) -> tuple[str, float, float]:
    """(key, value, the harness's own standard error or NaN) of a task's result. Raises DataError where no number is there."""
    wanted = next((keys for pattern, keys in HEADLINE if re.search(pattern, task)), ())
    numbers = {
        k: v for k, v in values.items() if "," in k and "_stderr" not in k and isinstance(v, (int, float)) and not isinstance(v, bool)
    }
    key = next((k for k in (*wanted, *ANYWHERE, *numbers) if k in numbers), None)
    if key is None:
        raise DataError(f"{task}: expected a metric such as 'exact_match,none' in the harness's results, got {sorted(values)}")
    metric, _, name = key.partition(",")
    error = values.get(f"{metric}_stderr,{name}", math.nan)
    return key, float(numbers[key]), float(error) if isinstance(error, (int, float)) else math.nan


def newest_results(directory: Path) -> Path | None:
    """The newest results_*.json below a directory; the harness puts it one directory deeper, named after the model."""
    return max(directory.rglob("results_*.json"), key=lambda p: p.stat().st_mtime, default=None)


def read_runs(jobs: Iterable[tuple[str, str, int, int, Path]]) -> pd.DataFrame:
    """One row a finished harness process: model, task, seed, sample, metric, exact_match, exact_match_stderr, result_json.

    `jobs`: (model, task, seed, sample, directory). Sub-tasks of a group get rows of their own, task "group/subtask".
    """
    rows = []
    for model, task, seed, sample, directory in jobs:
        path = newest_results(directory)
        if path is None:
            continue
        content = json.loads(path.read_text())
        results = {**content.get("groups", {}), **content.get("results", {})}
        named = {n: v for n, v in results.items() if n.removesuffix("_local") == task}
        for name, values in results.items():
            if not any("," in k and isinstance(v, (int, float)) for k, v in values.items()):
                continue  # a group without a number of its own
            shown = task if name in named else f"{task}/{name.removesuffix('_local')}"
            key, value, error = headline(name, values)
            rows.append((model, shown, seed, sample, key, value, error, str(path)))
    return pd.DataFrame(rows, columns=["model", "task", "seed", "sample", "metric", "exact_match", "exact_match_stderr", "result_json"])


def summarize(runs: pd.DataFrame, base: str = "") -> pd.DataFrame:
    """Mean and standard error over seeds for each model and task, and the difference to `base`.

    The samples of one seed are averaged first. A difference is paired by seed where both have the same seeds; with one seed its error
    comes from the harness's errors over questions, and `error_over` says which it is.
    """
    by_seed = runs.groupby(["model", "task", "metric", "seed"], sort=False)[["exact_match", "exact_match_stderr"]].mean().reset_index()
    rows = []
    for (model, task, metric), group in by_seed.groupby(["model", "task", "metric"], sort=False):
        values = group.set_index("seed")["exact_match"]
        error = group["exact_match_stderr"].iloc[0]
        row = {"model": model, "task": task, "metric": metric, "seeds": len(values), "mean": values.mean(),
               "se": _sem(values) if len(values) > 1 else error, "error_over": "seeds" if len(values) > 1 else "questions"}  # fmt: skip
        row["low"], row["high"] = _interval(row["mean"], row["se"], len(values))
        row |= _delta(by_seed, base, model, task, metric, values, error)
        rows.append(row)
    return pd.DataFrame(rows)


def _delta(by_seed: pd.DataFrame, base: str, model: str, task: str, metric: str, values: pd.Series, error: float) -> dict[str, float]:
    reference = by_seed[(by_seed["model"] == base) & (by_seed["task"] == task) & (by_seed["metric"] == metric)].set_index("seed")
    if model == base or reference.empty:
        return {"delta_vs_base": math.nan, "delta_se": math.nan}
    theirs = reference["exact_match"]
    shared = values.index.intersection(theirs.index)
    if len(shared) == len(values) == len(theirs) and len(shared) > 1:
        difference = values[shared] - theirs[shared]
        return {"delta_vs_base": difference.mean(), "delta_se": _sem(difference)}
    ours_se = _sem(values) if len(values) > 1 else error
    theirs_se = _sem(theirs) if len(theirs) > 1 else reference["exact_match_stderr"].iloc[0]
    return {"delta_vs_base": values.mean() - theirs.mean(), "delta_se": math.hypot(ours_se, theirs_se)}


def _sem(values: Sequence[float]) -> float:
    array = np.asarray(values, float)
    return float(array.std(ddof=1) / math.sqrt(len(array)))


def _interval(mean: float, error: float, count: int) -> tuple[float, float]:
    half = (stats.t.ppf(0.975, count - 1) if count > 1 else 1.96) * error
    return mean - half, mean + half


def pivot(summary: pd.DataFrame) -> pd.DataFrame:
    """Models by tasks, mean in percent with its standard error, and the mean over tasks that every model has."""
    top = summary[~summary["task"].str.contains("/")]
    table = top.pivot_table(index="model", columns="task", values="mean", sort=False)
    errors = top.pivot_table(index="model", columns="task", values="se", sort=False, dropna=False)
    out = pd.DataFrame(index=table.index)
    for task in table.columns:
        out[task] = [_percent(table.loc[m, task], errors.loc[m, task] if task in errors else math.nan) for m in table.index]
    out["mean"] = [_percent(table.loc[m].mean(), math.nan) if table.loc[m].notna().all() else "" for m in table.index]
    return out.reset_index()


def math_hard(summary: pd.DataFrame) -> pd.DataFrame:
    """The released table of leaderboard_math_hard: model, overall, metric, one column a subject."""
    rows = []
    group = "leaderboard_math_hard"
    for model, part in summary[summary["task"].str.startswith(group)].groupby("model", sort=False):
        means = part.set_index("task")["mean"]
        subjects = {t.removeprefix(f"{group}/leaderboard_math_").removesuffix("_hard"): v for t, v in means.items() if "/" in t}
        overall = means.get(group, np.mean(list(subjects.values())) if subjects else math.nan)
        rows.append({"model": model, "overall": overall, "metric": part["metric"].iloc[0], **subjects})
    return pd.DataFrame(rows)


def math_hard_from_files(root: Path) -> pd.DataFrame:
    """The released table from every results_*.json below `root` that holds leaderboard_math_hard: model, overall, metric, one column a
    subject, mtime, json. The model is the first folder below `root` (as evaluate_downstream.py writes it), else the name in the file; of
    several files of one model the newest counts. Raises DataError when there is none.
    """
    group, rows = "leaderboard_math_hard", {}
    for path in sorted(root.rglob("results_*.json"), key=lambda p: p.stat().st_mtime):
        content = json.loads(path.read_text())
        results = {**content.get("groups", {}), **content.get("results", {})}
        subjects = {n: v for n, v in results.items() if re.fullmatch(r"leaderboard_math_\w+_hard", n)}
        if not subjects:
            continue
        found = {n.removeprefix("leaderboard_math_").removesuffix("_hard"): headline(n, v) for n, v in subjects.items()}
        own = results.get(group, {})
        overall = own.get("exact_match,none", np.mean([value for _, value, _ in found.values()]))
        parts = path.relative_to(root).parts
        model = parts[0] if len(parts) > 2 else content.get("model_name") or parts[0]
        rows[model] = {"model": model, "overall": overall, "metric": next(iter(found.values()))[0], **{n: value for n, (_, value, _) in found.items()},
                       "mtime": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(path.stat().st_mtime)), "json": str(path)}  # fmt: skip
    if not rows:
        raise DataError(f"{root}: expected results_*.json files with {group} below it, found none")
    table = pd.DataFrame(rows.values())
    return table[[*(c for c in table if c not in ("mtime", "json")), "mtime", "json"]]


def _percent(value: float, error: float) -> str:
    if math.isnan(value):
        return ""
    return f"{100 * value:.2f}" + ("" if math.isnan(error) else f" +- {100 * error:.2f}")


def markdown(table: pd.DataFrame) -> str:
    """A Markdown table; numbers to four digits, NaN empty."""
    text = table.map(lambda v: ("" if math.isnan(v) else f"{v:.4f}") if isinstance(v, float) else str(v))
    lines = ["| " + " | ".join(map(str, table.columns)) + " |", "|" + "---|" * len(table.columns)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in text.itertuples(index=False)]) + "\n"


def write(directory: Path, runs: pd.DataFrame, base: str) -> list[Path]:
    """runs.csv, summary.csv, summary.md, and math_hard_summary.{csv,md} where that group was run."""
    directory.mkdir(parents=True, exist_ok=True)
    if runs.empty:
        return []
    summary = summarize(runs, base)
    paths = [directory / "runs.csv", directory / "summary.csv", directory / "summary.md"]
    runs.to_csv(paths[0], index=False)
    summary.to_csv(paths[1], index=False)
    paths[2].write_text(f"## Scores in percent\n\n{markdown(pivot(summary))}\n## Every task\n\n{markdown(summary)}")
    hard = math_hard(summary)
    if len(hard):
        paths += [directory / "math_hard_summary.csv", directory / "math_hard_summary.md"]
        hard.to_csv(paths[-2], index=False)
        paths[-1].write_text(markdown(hard))
    return paths
