"""Makes a report: reads a run or a suite, draws, and writes report.html with its pictures and tables beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from ta_opd import __version__
from ta_opd.errors import ConfigError
from ta_opd.report import figures_outcome as outcome_figures
from ta_opd.report import figures_tokens as token_figures
from ta_opd.report import health, heatmap, page
from ta_opd.report.loading import FIXED_CONTEXT_FILE, Suite, load, sample_bank
from ta_opd.report.statistics import DRAWS, Resampler, outcome
from ta_opd.report.style import Picture, arm_styles
from ta_opd.report.summary import ON_PAGE, headline, shown, summary, write_tables
from ta_opd.report.vocabulary import Vocabulary, load_vocabulary

MIB = 1 << 20
SETTINGS = (
    "hf_checkpoint", "teacher_model", "rm_url", "prompt_data", "num_rollout", "rollout_batch_size", "n_samples_per_prompt",
    "global_batch_size", "rollout_max_response_len", "rollout_temperature", "opd_loss_type", "opd_loss_reduction", "opd_topk_support",
    "opd_topk_metrics_k", "opd_profile", "opd_budget_scope", "opd_budget_min_keep_per_sample", "lr", "lr_decay_style", "adam_beta1",
    "adam_beta2", "weight_decay", "clip_grad", "seed", "rollout_seed", "opd_budget_mask_seed",
)  # fmt: skip


@dataclass(frozen=True)
class Options:
    """max_bytes: size that the page must stay under. bank_rollouts, bank_rows: how much of each token bank the pictures read. training: the
    run directory behind a diagnostic."""

    max_bytes: int = 10 * MIB
    bank_rollouts: int = 24
    bank_rows: int = 400_000
    tokenizer: str | None = None
    title: str | None = None
    draws: int = DRAWS
    pictures: bool = True
    training: str | None = None

    def __post_init__(self):
        if self.max_bytes < MIB:
            raise ConfigError(f"report: expected room for at least 1 MiB, got {self.max_bytes} bytes")


@dataclass(frozen=True)
class Report:
    """What was written: the page, pictures and tables; the summary table and the sentences of the result."""

    html: Path
    pictures: list[Path]
    tables: list[Path]
    summary: pd.DataFrame
    headline: list[str]
    warnings: list[str]
    notes: list[str]


def build_report(directory: str | Path, output: str | Path | None = None, options: Options | None = None) -> Report:
    """Reads `directory` (a run or a suite) and writes `output` (default <directory>/report.html) and <output stem>/ beside it.

    Raises DataError when there is no run to report on, ConfigError when the page cannot be made small enough.
    """
    options = options or Options()
    suite = load(directory, options.title, options.training)
    html = Path(output) if output else suite.directory / "report.html"
    arms, resampler = suite.arms, Resampler(options.draws)
    outcomes = {key: outcome(runs, resampler) for key, runs in arms.items()}
    styles = arm_styles(list(arms), outcome_figures.bold_arms(outcomes))
    vocabulary = find_vocabulary(suite, options.tokenizer)
    if vocabulary is None:
        suite.notes.append("No tokenizer.json was found, so tokens show as ids; pass --tokenizer DIR.")
    samples = {}
    for key, runs in arms.items():
        sample = sample_bank(runs[0], max_rollouts=options.bank_rollouts, max_rows=options.bank_rows, notes=suite.notes)
        if sample is not None:
            samples[key] = sample
    checks = [check for key, runs in arms.items() for run in runs for check in health.check_run(run, samples.get(key) if run is runs[0] else None)]
    kinds = token_figures.kind_table(samples, vocabulary) if vocabulary and samples else pd.DataFrame()
    pictures = draw(suite, outcomes, styles, samples, kinds, vocabulary)
    room = options.max_bytes - sum(len(p.svg.encode()) for p in pictures.values()) - MIB // 4
    heat = heatmap.build(suite, vocabulary, max_bytes=room, notes=suite.notes)
    table = summary(suite, outcomes)
    beside = html.with_suffix("")
    tables = {"summary": table, "token_kinds": kinds, "checks": _checks_table(checks)}
    table_files = write_tables({name: t for name, t in tables.items() if len(t)}, beside)
    picture_files = [p.write(beside) for p in pictures.values()] if options.pictures else []
    order = outcome_figures.best_first(outcomes)
    sentences, warned = headline(suite, outcomes), health.warnings(checks) + [f"Selector recommendation: {text}" for text in suite.advice]
    text = page.render(
        pictures=pictures, heat=heat if heat["blocks"] else None, title=suite.title, facts=page_facts(suite), headline=sentences,
        summary=shown(table, ON_PAGE), several_seeds=any(len(r) > 1 for r in arms.values()), draws=f"{options.draws:,}",
        summary_rows=page.swatch_rows(shown(table, ON_PAGE), [styles[k].color for k in arms], list(arms).index(order[0]) if _judged(outcomes) else None),
        warnings=warned, calm=_calm(checks), notes=suite.notes, checks=checks, has_tokens=bool(samples),
        has_contexts=any(run.contexts is not None for run in suite.runs), fixed_context_file=FIXED_CONTEXT_FILE, settings=settings(suite),
        files=[f"{beside.name}/{p.name}" for p in [*picture_files, *table_files]], footer=f"Made by ta_opd {__version__}. Everything is inside this file.",
    )  # fmt: skip
    size = len(text.encode())
    if size > options.max_bytes:
        raise ConfigError(f"report: the page has {size:,} bytes, more than the {options.max_bytes:,} allowed; allow more, or report on fewer runs")
    html.parent.mkdir(parents=True, exist_ok=True)
    partial = html.with_name(html.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(html)
    return Report(html, picture_files, table_files, table, sentences, warned, suite.notes)


def draw(suite: Suite, outcomes, styles, samples, kinds, vocabulary: Vocabulary | None) -> dict[str, Picture]:
    """All pictures that the suite has data for, by name."""
    arms = suite.arms
    made = [
        outcome_figures.glance(suite, outcomes, styles),
        outcome_figures.accuracy_curve(arms, styles, suite.facts.get("teacher_accuracy")),
        outcome_figures.reverse_kl(arms, styles),
        outcome_figures.kept_tokens(arms, styles),
        outcome_figures.budget_curve(outcomes, styles),
        health.curves(arms, samples, styles),
        token_figures.response_strip(samples, styles, vocabulary),
        token_figures.plane(samples, styles),
        token_figures.token_kinds(kinds, samples, styles),
        token_figures.positions(samples, styles),
        token_figures.quadrant_gain(suite, styles),
        token_figures.selector_gain(suite),
        outcome_figures.seconds(arms, styles),
    ]
    return {p.name: p for p in made if p is not None}


def find_vocabulary(suite: Suite, tokenizer: str | None) -> Vocabulary | None:
    """From --tokenizer, the runs' final HF directories, or the student they started from."""
    places: Sequence = [tokenizer, suite.directory / "tokenizer", suite.facts.get("tokenizer")]
    places = [*places, *(run.directory / "hf" for run in suite.runs), *(run.config.get("hf_checkpoint") for run in suite.runs)]
    return load_vocabulary(places)


def page_facts(suite: Suite) -> list[str]:
    """Short facts under the title."""
    config = _settings_of(suite)
    given = list(suite.facts.get("facts", []))
    seeds = max((len(runs) for runs in suite.arms.values()), default=1)
    k = config.get("opd_topk_metrics_k")
    loss = config.get("opd_loss_type")
    rollouts = max(len(run.metrics) for run in suite.runs)
    checkpoints = f"{len(suite.runs)} checkpoint{'s' if len(suite.runs) > 1 else ''} on frozen contexts"
    if not rollouts:
        return [*given, checkpoints]
    own = [
        checkpoints if suite.runs[-1].key.title else f"{len(suite.arms)} method{'s' if len(suite.arms) > 1 else ''}, {seeds} seed{'s' if seeds > 1 else ''} each",
        f"{rollouts} rollouts of {config.get('rollout_batch_size', '?')} × {config.get('n_samples_per_prompt', '?')} responses",
        f"K = {k}" if k else "", f"loss {loss}" if loss else "", f"lr {config['lr']:g}" if config.get("lr") else "",
    ]  # fmt: skip
    return given + [fact for fact in own if fact]


def settings(suite: Suite) -> list[tuple[str, str]]:
    """Flags of the first run that decide what it computes."""
    config = _settings_of(suite)
    return [(name.replace("_", "-"), str(config[name])) for name in SETTINGS if config.get(name) is not None]


def _settings_of(suite: Suite) -> dict:
    """Settings of the first run that has any (of a diagnostic, those of its training run)."""
    return next((run.config for run in suite.runs if run.config), {})


def _judged(outcomes) -> bool:
    return any(o.accuracy_after.known or o.kl_after.known for o in outcomes.values())


def _calm(checks) -> str:
    if not checks:
        return "Nothing to check for collapse: no metrics of lengths or divergence were logged."
    kinds = list(dict.fromkeys(check.name for check in checks))
    return f"No sign of collapse in any run ({', '.join(kinds)})."


def _checks_table(checks) -> pd.DataFrame:
    rows = [{"method": c.arm.label, "run": c.run, "check": c.name, "start": c.start, "end": c.end, "collapse": c.bad, "text": c.text} for c in checks]
    return pd.DataFrame(rows)
