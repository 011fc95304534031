"""The diagnostic from training to its summary, step by step; a step whose inputs and options have not changed is not run again.

    train -> export -> score_before -> convert -> score_after -> analyse -> robustness -> recommend -> summary (-> report)

Everything lands in one folder: context_bank.parquet, theta0_metrics.parquet, eval_latest/ (and eval_iter_NNNNNNN/ of further checkpoints)
with fixed_context_metrics.parquet, analysis/, the summary, pipeline_state.json and logs/. Training, conversion and the report are other
programs and run as commands; the rest runs here.
"""

import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ta_opd.errors import ConfigError, DataError, ServiceError
from ta_opd.fixed_context import analyses
from ta_opd.fixed_context.bank import export_from_dumps, export_from_token_bank, load_contexts, write_bank
from ta_opd.fixed_context.join import join_baseline
from ta_opd.fixed_context.sampling import SamplingConfig, drop_trained, read_prompts, sample_bank
from ta_opd.fixed_context.scoring import ScoringConfig, score_contexts
from ta_opd.fixed_context.tables import read_meta, read_table, write_json, write_table
from ta_opd.suite.memory import directory_lock, stamp
from ta_opd.suite.process import run_logged, stop_requests

STEPS = ("train", "export", "score_before", "convert", "score_after", "analyse", "robustness", "recommend", "summary", "report")
BANK_SOURCES = ("dump", "heldout", "tokenbank")
LOCK = "pipeline.lock"
_held: ContextVar[tuple[int, ...]] = ContextVar("held", default=())  # the lock of the running call, for the commands that it starts
BANK, BEFORE, METRICS = "context_bank.parquet", "theta0_metrics.parquet", "fixed_context_metrics.parquet"


@dataclass(frozen=True)
class PipelineConfig:
    """What a diagnostic run is made of.

    student: HF model before training. after_hf: checkpoint name -> HF model; empty means the torch_dist checkpoints under save_dir, which
    `convert_command` turns into HF models ({checkpoint_root}, {iteration}, {origin_hf}, {output} are filled in). iterations: `latest`, `all`, or
    numbers. bank_source: `dump` (rollouts of the run), `tokenbank` (its token bank, prompts from the dumps) or `heldout` (the student answers
    prompts; those that also occur in exclude_prompts are dropped).
    """

    diag_dir: str
    student: str
    teacher: str
    save_dir: str | None = None
    after_hf: dict[str, str] = field(default_factory=dict)
    iterations: str = "latest"
    train_command: str | None = None
    train_done_file: str | None = None
    convert_command: tuple[str, ...] = ()
    report_command: tuple[str, ...] = ()
    bank_source: str = "dump"
    rollout_dumps: tuple[str, ...] = ()
    token_bank: str | None = None
    prompt_data: str | None = None
    exclude_prompts: str | None = None
    sampling: SamplingConfig = SamplingConfig()
    num_contexts: int = 300
    max_response_tokens: int = 192
    bank_sample: str = "first"
    seed: int = 42
    scoring: ScoringConfig = ScoringConfig()
    analysis: analyses.AnalysisConfig = analyses.AnalysisConfig()
    summary_name: str = "diag300_summary.md"
    pair_id: str = ""

    def __post_init__(self):
        if self.bank_source not in BANK_SOURCES:
            raise ConfigError(f"bank source: expected one of {', '.join(BANK_SOURCES)}, got {self.bank_source!r}")
        need = {"dump": "rollout_dumps", "tokenbank": "token_bank", "heldout": "prompt_data"}[self.bank_source]
        if not getattr(self, need):
            raise ConfigError(f"bank source {self.bank_source} needs {need}")
        if not self.after_hf and not self.save_dir:
            raise ConfigError("expected save_dir (torch_dist checkpoints of the run) or after_hf (HF models), got neither")
        if not self.after_hf and not self.convert_command:
            raise ConfigError("checkpoints under save_dir need convert_command")


@dataclass(frozen=True)
class Step:
    """inputs: files whose change makes the step run again; options: likewise; outputs: what it leaves behind."""

    name: str
    run: Callable[[], None]
    inputs: Sequence[Path] = ()
    options: object = None
    outputs: Sequence[Path] = ()


def plan(config: PipelineConfig) -> list[str]:
    """The steps this configuration has, in order."""
    skipped = {"train": not config.train_command, "convert": bool(config.after_hf), "report": not config.report_command}
    return [name for name in STEPS if not skipped.get(name, False)]


def run_pipeline(config: PipelineConfig, *, force: Sequence[str] = (), log: Callable[[str], None] = print) -> dict[str, str]:
    """Runs what is not done yet; step -> "done" or "kept". `force` names steps to run again ("all" for every one).

    Raises ServiceError when a command fails (its log is named), DataError and ConfigError as the steps do; finished steps stay finished.
    ConfigError where another call works in diag_dir.
    """
    unknown = [name for name in force if name != "all" and name not in STEPS]
    if unknown:
        raise ConfigError(f"force: expected steps of {', '.join(STEPS)}, got {unknown}")
    out = Path(config.diag_dir)
    with directory_lock(out, name=LOCK, elsewhere="another --diag-dir (DIAG_DIR)") as descriptor:
        token = _held.set((descriptor,))
        try:
            return _run_all(config, out, force, log)
        finally:
            _held.reset(token)


def _run_all(config: PipelineConfig, out: Path, force: Sequence[str], log: Callable[[str], None]) -> dict[str, str]:
    state_file = out / "pipeline_state.json"
    state = _read_state(state_file)
    _check_models(config, state, state_file)
    results = {}
    for name in plan(config):
        step = _BUILDERS[name](config, out, log)
        key = _key(step)
        kept = state.get(name, {}).get("key") == key and all(path.exists() for path in step.outputs)
        if kept and name not in force and "all" not in force:
            log(f"{name}: kept ({_where(step)})")
            results[name] = "kept"
            continue
        log(f"{name}: running")
        state.pop(name, None)
        write_json(state_file, state)
        start = time.time()
        step.run()
        missing = [str(path) for path in step.outputs if not path.exists()]
        if missing:
            raise DataError(f"step {name} ended without {', '.join(missing)}")
        state[name] = {"key": _key(step), "seconds": round(time.time() - start, 2), "outputs": [str(p) for p in step.outputs]}
        if name == "train":
            state[name]["models"] = [config.student, config.teacher]
        write_json(state_file, state)
        log(f"{name}: done in {state[name]['seconds']:.1f} s")
        results[name] = "done"
    return results


def _read_state(path: Path) -> dict:
    """What pipeline_state.json remembers. Raises DataError where it is something else."""
    if not path.is_file():
        return {}
    try:
        state = json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path}: expected the JSON state of a diagnostic, got {error}; move the file away to run every step anew") from None
    if not isinstance(state, dict) or not all(isinstance(step, dict) for step in state.values()):
        raise DataError(f"{path}: expected the JSON state of a diagnostic, got something else; move the file away to run every step anew")
    return state


def _check_models(config: PipelineConfig, state: dict, state_file: Path) -> None:
    """Raises ConfigError where the run that is there was trained with another student or teacher than the scores would be of."""
    known = state.get("train", {}).get("models")
    done = config.train_done_file and Path(config.train_done_file).exists()
    if config.train_command and done and known and known != [config.student, config.teacher]:
        raise ConfigError(
            f"{config.train_done_file} is of a training with student {known[0]} and teacher {known[1]}, got {config.student} and "
            f"{config.teacher}: choose another RUN_NAME and DIAG_DIR (--save-dir, --diag-dir), or remove {state_file} if only the paths changed"
        )


def checkpoints(config: PipelineConfig) -> dict[str, Path]:
    """Folder name under diag_dir -> source: `eval_<name>` for HF models, else `eval_iter_NNNNNNN`; the last one is `eval_latest`.

    Raises DataError when save_dir holds no checkpoint or lacks one that was asked for.
    """
    if config.after_hf:
        names = list(config.after_hf)
        return {("eval_latest" if name == names[-1] else f"eval_{name}"): Path(config.after_hf[name]) for name in names}
    numbers = checkpoint_iterations(Path(config.save_dir), config.iterations)
    root = Path(config.save_dir)
    return {("eval_latest" if n == numbers[-1] else f"eval_iter_{n:07d}"): root / f"iter_{n:07d}" for n in numbers}


def checkpoint_iterations(root: Path, which: str) -> list[int]:
    """Iteration numbers, ascending: `latest` (the tracker's), `all` found under `root`, or the numbers in "25,50". DataError when absent."""
    found = sorted(int(p.name[5:]) for p in root.glob("iter_*") if p.name[5:].isdigit())
    if not found:
        raise DataError(f"checkpoints: no iter_NNNNNNN folder under {root}; has training saved yet?")
    if which == "all":
        return found
    if which == "latest":
        tracker = root / "latest_checkpointed_iteration.txt"
        text = tracker.read_text().strip() if tracker.is_file() else ""
        return [int(text)] if text.isdigit() and int(text) in found else [found[-1]]
    try:
        wanted = sorted({int(part) for part in which.split(",")})
    except ValueError as error:
        raise ConfigError(f"iterations: expected latest, all or numbers such as 25,50, got {which!r}") from error
    missing = [n for n in wanted if n not in found]
    if missing:
        raise DataError(f"checkpoints under {root}: expected iterations {missing}, found {found}")
    return wanted


def _train(config, out, log) -> Step:
    outputs = [Path(config.train_done_file)] if config.train_done_file else []

    def run() -> None:
        if not (outputs and outputs[0].exists()):
            _command(["bash", "-c", config.train_command], out / "logs" / "train.log", "training")

    return Step("train", run, options=config.train_command, outputs=outputs)


def _export(config, out, log) -> Step:
    target = out / BANK
    if config.bank_source == "heldout":
        inputs = [Path(config.prompt_data), *([Path(config.exclude_prompts)] if config.exclude_prompts else []), Path(config.student)]
    else:
        inputs = [Path(source).parent if "*" in source else Path(source) for source in (*config.rollout_dumps, config.token_bank or "")]
    options = [config.bank_source, config.num_contexts, config.bank_sample, config.seed, asdict(config.sampling), config.rollout_dumps]

    def run() -> None:
        shared = {"max_samples": config.num_contexts, "sample": config.bank_sample, "seed": config.seed}
        record = {"source": config.bank_source, "sample": config.bank_sample, "seed": config.seed}
        if config.bank_source == "dump":
            bank = export_from_dumps(config.rollout_dumps, **shared)
        elif config.bank_source == "tokenbank":
            bank = export_from_token_bank(config.token_bank, config.rollout_dumps, **shared)
        else:
            keys = (config.sampling.input_key, config.sampling.label_key)
            prompts = read_prompts(config.prompt_data, *keys)
            if config.exclude_prompts:
                left = drop_trained(prompts, read_prompts(config.exclude_prompts, *keys))
                log(f"export: {len(prompts) - len(left)} of {len(prompts)} prompts were trained on and are left out")
                prompts = left
            bank, record = sample_bank(prompts, config.student, config.sampling, log=log)
        write_bank(target, bank, record)
        log(f"export: {len(bank)} contexts")

    return Step("export", run, inputs, options, [target])


def _score_before(config, out, log) -> Step:
    def run() -> None:
        table, record = _score(config, out, config.student, out / BEFORE, log)
        write_table(out / BEFORE, table, record)
        shutil.rmtree(_parts(out / BEFORE), ignore_errors=True)

    return Step("score_before", run, [out / BANK, Path(config.student), Path(config.teacher)], _scoring_options(config), [out / BEFORE])


def _convert(config, out, log) -> Step:
    sources = checkpoints(config)
    outputs = [out / folder / "student_hf" for folder in sources]

    def run() -> None:
        for (folder, source), target in zip(sources.items(), outputs, strict=True):
            names = {"checkpoint_root": config.save_dir, "iteration": str(int(source.name[5:])), "origin_hf": config.student, "output": str(target)}
            command = _filled(config.convert_command, names)
            _command(command, out / "logs" / f"convert_{folder}.log", f"conversion of {source}")

    return Step("convert", run, [*sources.values(), Path(config.student)], config.convert_command, [p / "config.json" for p in outputs])


def _models_after(config, out) -> dict[str, Path]:
    sources = checkpoints(config)
    return sources if config.after_hf else {folder: out / folder / "student_hf" for folder in sources}


def _score_after(config, out, log) -> Step:
    models = _models_after(config, out)
    outputs = [out / folder / METRICS for folder in models]

    def run() -> None:
        before, before_record = read_table(out / BEFORE), read_meta(out / BEFORE)
        for (folder, model), target in zip(models.items(), outputs, strict=True):
            log(f"score_after: {folder}")
            table, record = _score(config, out, str(model), target, log)
            write_table(target, join_baseline(table, before, after_meta=record, before_meta=before_record), record)
            shutil.rmtree(_parts(target), ignore_errors=True)

    inputs = [out / BANK, out / BEFORE, Path(config.teacher), *models.values()]
    return Step("score_after", run, inputs, _scoring_options(config), outputs)


def _analyse(config, out, log) -> Step:
    tables = {folder: out / folder / METRICS for folder in _models_after(config, out)}

    def run() -> None:
        analyses.run_gain(read_table(tables["eval_latest"]), config.pair_id or "latest", config.analysis, out / "analysis")
        names = {folder.removeprefix("eval_"): path for folder, path in tables.items()}
        write_table(out / "analysis" / "gain_by_checkpoint.csv", analyses.gain_by_checkpoint(names, config.analysis))

    outputs = [out / "analysis" / "gain" / "regression_summary.csv", out / "analysis" / "gain_by_checkpoint.csv"]
    return Step("analyse", run, list(tables.values()), asdict(config.analysis), outputs)


def _robustness(config, out, log) -> Step:
    table = out / "eval_latest" / METRICS

    def run() -> None:
        analyses.run_support(read_table(table), config.pair_id or "latest", config.analysis, out / "analysis")

    outputs = [out / "analysis" / "support" / "support_definition_robustness.csv"]
    return Step("robustness", run, [table], asdict(config.analysis), outputs)


def _recommend(config, out, log) -> Step:
    table = out / "eval_latest" / METRICS

    def run() -> None:
        analyses.run_recommendation(read_table(table), config.analysis, out / "analysis")

    outputs = [out / "analysis" / "recommend" / "selector_recommendation.csv"]
    return Step("recommend", run, [table], asdict(config.analysis), outputs)


def _summary(config, out, log) -> Step:
    target = out / config.summary_name
    facts = {
        "pair": config.pair_id or f"{Path(config.teacher).name} -> {Path(config.student).name}", "student": config.student,
        "teacher": config.teacher, "bank": config.bank_source, "checkpoints": ", ".join(_models_after(config, out)),
        "profile": config.analysis.profile,
    }  # fmt: skip

    def run() -> None:
        target.write_text(encoding="utf-8", data=analyses.summary_page(f"Fixed-context diagnostic: {facts['pair']}", out, facts))

    inputs = [out / "analysis" / "gain" / "regression_summary.csv", out / "analysis" / "support" / "support_definition_robustness.csv",
              out / "analysis" / "recommend" / "selector_recommendation.csv"]  # fmt: skip
    return Step("summary", run, inputs, facts, [target])


def _report(config, out, log) -> Step:
    target = out / "report.html"

    def run() -> None:
        command = _filled(config.report_command, {"diag_dir": str(out), "output": str(target), "student": config.student})
        _command(command, out / "logs" / "report.log", "the report")

    return Step("report", run, [out / config.summary_name, out / "eval_latest" / METRICS], config.report_command, [target])


_BUILDERS = {
    "train": _train, "export": _export, "score_before": _score_before, "convert": _convert, "score_after": _score_after,
    "analyse": _analyse, "robustness": _robustness, "recommend": _recommend, "summary": _summary, "report": _report,
}  # fmt: skip


def _scoring_options(config: PipelineConfig) -> list:
    return [asdict(config.scoring), config.num_contexts, config.max_response_tokens]


def _score(config: PipelineConfig, out: Path, student: str, target: Path, log):
    contexts = load_contexts(out / BANK, max_samples=config.num_contexts, max_response_tokens=config.max_response_tokens)
    table, record = score_contexts(contexts, student, config.teacher, config.scoring, _parts(target), log=log)
    log(f"scored {record['positions']} positions in {sum(record['seconds'].values()):.1f} s {record['seconds']}")
    return table, record


def _parts(target: Path) -> Path:
    return target.with_name(target.stem + ".parts")


def _filled(command: Sequence[str], names: dict[str, str]) -> list[str]:
    """Words of a command with each {NAME} of `names` replaced; other braces, such as those of a path, stay."""
    pattern = re.compile(r"\{(" + "|".join(names) + r")\}")
    return [pattern.sub(lambda found: names[found[1]], word) for word in command]


def _command(command: Sequence[str], log_file: Path, what: str) -> None:
    with stop_requests() as stop:
        outcome = run_logged(command, log=log_file, stop=stop, keep=_held.get())
    if outcome.interrupted:
        raise KeyboardInterrupt
    if outcome.returncode != 0:
        tail = "\n".join(log_file.read_text(errors="replace").splitlines()[-15:])
        raise ServiceError(f"{what} ended with code {outcome.returncode}; the whole log is {log_file}, its end:\n{tail}")


def _key(step: Step) -> str:
    digest = hashlib.sha256(json.dumps([step.name, step.options], sort_keys=True, default=str).encode())
    for path in step.inputs:
        digest.update(stamp(Path(path)).encode())
    return digest.hexdigest()[:16]


def _where(step: Step) -> str:
    return ", ".join(path.name for path in step.outputs) or "nothing to show"
