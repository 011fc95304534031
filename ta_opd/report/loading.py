"""Runs and suites as tables: finds run directories and reads what each of them wrote.

A run directory holds metrics.jsonl and, where they exist, eval.jsonl, config.yaml, DONE, token_bank/ and
fixed_context_metrics.parquet. A suite is a directory of run directories, or one with a suite_summary.csv that names them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from ta_opd.errors import DataError
from ta_opd.fixed_context.tables import read_meta, read_table
from ta_opd.token_bank.reader import bank_files
from ta_opd.token_bank.reader import read_table as read_bank_file
from ta_opd.token_bank.writer import rollout_files

MASK_LABELS = {
    "full": "Full OPD", "dlearn_high": "Teachability (TA-OPD)", "entropy": "Entropy", "random": "Random", "divergence": "Divergence",
    "ca_softor": "Teachability + entropy", "split_budget_ca": "Teachability / entropy split", "tip": "TIP-style",
    "compatibility": "Compatibility", "q3": "Q3", "q3_highc": "Q3, high C", "q3_lowc": "Q3, low C", "dincompat_high": "Incompatible",
}  # fmt: skip
BANK_COLUMNS = (
    "rollout_id", "sample_index", "sample_ordinal", "tok_pos", "pos_norm", "resp_len", "prompt_len", "truncated", "token_id",
    "sampled_reverse_kl", "Hs_topk", "Ht_topk", "Hs_topk_norm", "KLf_union", "Cmass", "H_norm", "D_norm", "C_norm", "Dlearn",
    "quadrant", "loss_mask_original", "budget_keep", "budget_score",
)  # fmt: skip
TOPK_COLUMNS = ("student_top_ids", "student_top_logps", "teacher_top_ids", "teacher_top_logps")
FIXED_CONTEXT_FILE = "fixed_context_metrics.parquet"


@dataclass(frozen=True)
class ArmKey:
    """What runs of different seeds share: the mask and the budget asked for. title: a label of its own, for checkpoints of one run."""

    mask: str
    ratio: float
    title: str = ""

    @property
    def label(self) -> str:
        if self.title:
            return self.title
        name = MASK_LABELS.get(self.mask, self.mask)
        return name if self.mask == "full" else f"{name} {100 * self.ratio:.3g} %"

    @property
    def slug(self) -> str:
        return f"{self.mask}_{f'{self.ratio:.4f}'.rstrip('0').replace('.', 'p')}"


@dataclass
class Run:
    """One training run. metrics: one row a rollout, columns as in metrics.jsonl; evals: lines of eval.jsonl;
    contexts: the scored frozen contexts joined with those before training, without raw top-k lists, or None; contexts_file has these, too."""

    name: str
    directory: Path
    key: ArmKey
    seed: str
    config: dict[str, Any]
    metrics: pd.DataFrame
    evals: list[dict[str, Any]]
    done: dict[str, Any]
    bank_dir: Path | None
    contexts: pd.DataFrame | None
    contexts_meta: dict[str, Any] = field(default_factory=dict)
    contexts_file: Path | None = None

    def column(self, *names: str) -> np.ndarray:
        """[rollouts] float64: the first of `names` that the run logged, NaN where it did not."""
        for name in names:
            if name in self.metrics:
                return pd.to_numeric(self.metrics[name], errors="coerce").to_numpy(float)
        return np.full(len(self.metrics), np.nan)


@dataclass
class Suite:
    """The runs of one report, arms in the order in which they were planned. notes: what could not be read."""

    directory: Path
    title: str
    runs: list[Run]
    notes: list[str]
    facts: dict[str, Any] = field(default_factory=dict)
    topn: pd.DataFrame | None = None
    bank_prompts: pd.DataFrame | None = None
    advice: list[str] = field(default_factory=list)

    @property
    def arms(self) -> dict[ArmKey, list[Run]]:
        grouped: dict[ArmKey, list[Run]] = {}
        for run in self.runs:
            grouped.setdefault(run.key, []).append(run)
        return grouped


def load(directory: str | Path, title: str | None = None, training: str | Path | None = None) -> Suite:
    """The suite (or single run) at `directory`. training: the run directory behind a diagnostic, whose curves and token bank are shown with
    its latest checkpoint. Raises DataError when no run is in it, or a run's own files are unreadable."""
    directory = Path(directory)
    if not directory.is_dir():
        raise DataError(f"report: expected the directory of a run or a suite, got {str(directory)!r}, which is none")
    notes: list[str] = []
    facts = _json(directory / "suite.json")
    if not isinstance(facts.get("teacher_accuracy"), (int, float)):
        facts.pop("teacher_accuracy", None)
    found = find_runs(directory, notes)
    runs = [run for path, contexts in found if (run := read_run(path, contexts, notes)) is not None]
    if not runs:
        runs = diagnostic_checkpoints(directory, notes)
        if runs and training is not None:
            runs[-1] = _trained(runs[-1], Path(training), notes)
    if not runs:
        raise DataError(
            f"report: no run with a metrics.jsonl in {directory}; expected a run directory, a directory of runs, a suite with a "
            f"suite_summary.csv, or a diagnostic with eval_*/{FIXED_CONTEXT_FILE}"
        )
    order = {name: i for i, name in enumerate(facts.get("runs", []))}
    runs.sort(key=lambda run: order.get(run.name, len(order)))
    suite = Suite(directory, title or facts.get("title") or directory.resolve().name, runs, notes, facts)
    for candidate in sorted(directory.rglob("matched_fixed_context_topn.csv"))[:1]:
        suite.topn = _optional(candidate, notes)
    for path in sorted(directory.rglob("selector_recommendation.json"))[:1]:
        suite.advice = [str(text) for text in _json(path).get("warnings", [])]
    bank = next((p for p in (directory / "context_bank.parquet", directory / "baseline" / "context_bank.parquet") if p.is_file()), None)
    if bank is not None:
        prompts = _optional(bank, notes)
        suite.bank_prompts = prompts if prompts is not None and {"prompt", "label"} <= set(prompts) else None
    return suite


def _optional(path: Path, notes: list[str]) -> pd.DataFrame | None:
    """A table that a report can do without: None, with a note, where it cannot be read."""
    try:
        return read_table(path)
    except DataError as error:
        notes.append(str(error))
        return None


def find_runs(directory: Path, notes: list[str] | None = None) -> list[tuple[Path, Path | None]]:
    """(run directory, directory that may hold its fixed-context table) of every run, in order."""
    if (directory / "metrics.jsonl").is_file():
        return [(directory, None)]
    summary = directory / "suite_summary.csv"
    if summary.is_file():
        table = _optional(summary, [] if notes is None else notes)
        named = ["run_dir", "mask", "budget_asked", "seed_label"]
        if table is not None and set(named) <= set(table):
            from ta_opd.suite.methods import budget_tag

            rows = table.dropna(subset=named).itertuples(index=False)
            return [
                (_near(Path(row.run_dir), directory), directory / f"{row.mask}_{budget_tag(row.budget_asked)}_{row.seed_label}")
                for row in rows
            ]
    children = sorted(p.parent for p in [*directory.glob("*/metrics.jsonl"), *directory.glob("runs/*/metrics.jsonl")])
    return [(child, None) for child in children]


def diagnostic_checkpoints(directory: Path, notes: list[str]) -> list[Run]:
    """Checkpoints of a fixed-context diagnostic (eval_<name>/), oldest first, `latest` last; each is shown as an arm of its own."""

    def age(path: Path) -> tuple[bool, list[int], str]:
        return path.name == "eval_latest", [int(n) for n in re.findall(r"\d+", path.name)], path.name

    runs = []
    for path in sorted((p.parent for p in directory.glob(f"eval_*/{FIXED_CONTEXT_FILE}")), key=age):
        contexts, meta = _read_contexts(path, path.name, notes)
        if contexts is not None:
            key = ArmKey("full", 1.0, title="Checkpoint " + path.name.removeprefix("eval_").replace("_", " "))
            runs.append(Run(path.name, path, key, "", {}, pd.DataFrame({"rollout_id": []}), [], {}, None, contexts, meta, path / FIXED_CONTEXT_FILE))
    return runs


def _trained(latest: Run, directory: Path, notes: list[str]) -> Run:
    """`latest` with what its training run wrote: metrics, evaluations, settings, token bank."""
    run = read_run(directory, None, notes) if (directory / "metrics.jsonl").is_file() else None
    if run is None:
        notes.append(f"{directory}: no metrics.jsonl, so there are no curves over training")
        return latest
    same = {name: getattr(latest, name) for name in ("name", "key", "contexts", "contexts_meta", "contexts_file")}
    return replace(run, **same)


def _read_contexts(place: Path, name: str, notes: list[str]) -> tuple[pd.DataFrame | None, dict[str, Any]]:
    """The scored contexts in `place` and their record, or None with a note where they cannot be used."""
    file = place / FIXED_CONTEXT_FILE
    try:
        meta = read_meta(file)
        contexts = read_table(file, [name for name in pq.read_schema(file).names if not re.search(r"_top_(ids|logps)(_base)?$", name)])
    except DataError as error:
        notes.append(f"{name}: {error}")
        return None, {}
    if "KLf_full_base" not in contexts or "KLf_full" not in contexts:
        notes.append(f"{name}: {FIXED_CONTEXT_FILE} has no before-training columns (KLf_full_base), left out")
        return None, {}
    return contexts, meta


def _near(path: Path, suite: Path) -> Path:
    """A run directory as written, or where it lies when the suite's parent directory was moved."""
    moved = suite.parent / path.name
    return path if path.is_dir() or not moved.is_dir() else moved


def read_run(directory: Path, contexts_dir: Path | None, notes: list[str]) -> Run | None:
    """One run, or None (with a note) when it has no metrics. What is optional and unreadable becomes a note."""
    lines = [line for line in json_lines(directory / "metrics.jsonl") if isinstance(line.get("rollout_id"), int)]
    if not lines:
        notes.append(f"{directory.name}: no line in metrics.jsonl with a rollout_id, left out")
        return None
    metrics = pd.DataFrame(lines).drop_duplicates("rollout_id", keep="last").sort_values("rollout_id").reset_index(drop=True)
    config = _yaml(directory / "config.yaml")
    bank_dir = directory / "token_bank"
    if config.get("opd_token_bank_dir") and not bank_dir.is_dir():
        bank_dir = Path(config["opd_token_bank_dir"])
    bank_config = _json(bank_dir / "config.json") if bank_dir.is_dir() else {}
    mask = config.get("opd_budget_mask") or bank_config.get("opd_budget_mask") or "full"
    ratio = config.get("opd_budget_ratio") or bank_config.get("opd_budget_ratio") or 1.0
    if not isinstance(ratio, (int, float)):
        raise DataError(f"{directory / 'config.yaml'}: expected a number as opd_budget_ratio, got {ratio!r}")
    key = ArmKey("full", 1.0) if mask in ("none", "full") or ratio >= 1 else ArmKey(_canonical(mask), ratio)
    seed = "/".join(str(config[k]) for k in ("seed", "rollout_seed", "opd_budget_mask_seed") if config.get(k) is not None)
    place = next((p for p in (directory, contexts_dir) if p is not None and (p / FIXED_CONTEXT_FILE).is_file()), None)
    contexts, meta = _read_contexts(place, directory.name, notes) if place else (None, {})
    return Run(
        directory.name, directory, key, seed, config, metrics, json_lines(directory / "eval.jsonl"), _json(directory / "DONE"),
        bank_dir if bank_dir.is_dir() else None, contexts, meta, place / FIXED_CONTEXT_FILE if contexts is not None else None,
    )  # fmt: skip


def _canonical(mask: str) -> str:
    from ta_opd.selection import METHOD_ALIASES

    return METHOD_ALIASES.get(mask, mask)


@dataclass(frozen=True)
class BankSample:
    """Rows of some rollouts of a token bank. rollouts: their ids; of: how many the bank has."""

    table: pd.DataFrame
    rollouts: tuple[int, ...]
    of: int

    @property
    def caption(self) -> str:
        what = "All" if len(self.rollouts) == self.of else f"{len(self.rollouts)} of"
        return f"{what} {self.of} rollouts, {len(self.table):,} tokens"


def sample_bank(
    run: Run, *, max_rollouts: int, max_rows: int, notes: list[str], columns: Sequence[str] = BANK_COLUMNS,
    pick: Callable[[pa.Table], pa.Table] | None = None,
) -> BankSample | None:  # fmt: skip
    """Evenly spaced rollouts (first and last included) of a run's bank, at most about `max_rows` rows; None without a bank.

    pick: the rows of a file that are wanted; whole files without it.
    """
    if run.bank_dir is None:
        return None
    files = list(rollout_files(run.bank_dir).values()) or bank_files(run.bank_dir)  # by name first: one bad file must not hide the rest
    if not files:
        return None
    chosen = [files[i] for i in np.unique(np.linspace(0, len(files) - 1, min(max_rollouts, len(files))).round().astype(int))]
    parts, rows = [], 0
    for path in _alternating(chosen):
        try:
            part = read_bank_file(path, columns)
            part = (pick(part) if pick else part).to_pandas()
        except DataError as error:
            notes.append(f"{run.name}: {error}")
            continue
        if parts and rows + len(part) > max_rows:
            break
        parts.append(part)
        rows += len(part)
    if not parts:
        return None
    table = pd.concat(parts, ignore_index=True).sort_values(["rollout_id", "sample_ordinal", "tok_pos"], kind="stable")
    return BankSample(table.reset_index(drop=True), tuple(int(r) for r in np.unique(table["rollout_id"])), len(files))


def _alternating(items: list) -> list:
    """First, last, then towards the middle, so that a cut by size keeps both ends of a run."""
    order, low, high = [], 0, len(items) - 1
    while low <= high:
        order.append(items[low])
        if high != low:
            order.append(items[high])
        low, high = low + 1, high - 1
    return order


def eval_at(run: Run, which: str) -> dict[str, Any] | None:
    """The evaluation "before" training or the last one "after" it; the first data set where there are several."""
    rows = [row for row in run.evals if isinstance(row.get("accuracy"), (int, float)) and isinstance(row.get("rollout_id"), int)]
    before = [row for row in rows if row["rollout_id"] < 0]
    after = [row for row in rows if row["rollout_id"] >= 0]
    chosen = before if which == "before" else after
    if not chosen:
        return None
    dataset = rows[0].get("dataset")
    same = [row for row in chosen if row.get("dataset") == dataset]
    return max(same, key=lambda row: row["rollout_id"]) if same else None


def per_prompt(evaluation: dict[str, Any] | None) -> pd.Series | None:
    """Accuracy by prompt row, or None when the evaluation kept none."""
    if not evaluation or not evaluation.get("per_prompt"):
        return None
    rows = evaluation["per_prompt"]
    index = [row["row"] if row.get("row") is not None else i for i, row in enumerate(rows)]
    return pd.Series([float(row["accuracy"]) for row in rows], index=index).groupby(level=0).mean()


def json_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSON-lines file; a line cut off by a crash is left out, a missing file has none."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_bytes().splitlines():
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _json(path: Path) -> dict[str, Any]:
    try:
        value = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return {}
    return value if isinstance(value, dict) else {}


def _yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise DataError(f"{path}: not valid YAML ({error})") from error
    return value if isinstance(value, dict) else {}


def finite_mean(values) -> float:
    """Mean of the finite values, NaN without any."""
    array = np.asarray(list(values), float)
    array = array[np.isfinite(array)]
    return float(array.mean()) if len(array) else math.nan
