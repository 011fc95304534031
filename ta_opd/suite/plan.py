"""The table of a suite: one row a run (method, budget, seed), and for each row the commands from training to gain."""

from __future__ import annotations

import csv
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ta_opd.errors import ConfigError
from ta_opd.suite.methods import Entry, Seeds, budget_tag, slug

BASELINE_ROW = "baseline"
# Flags that say where and how fast a run goes, not what it computes: they may change between calls of a suite.
PLACEMENT_FLAGS = {
    "--load", "--no-load-optim", "--start-rollout-id", "--teacher-port", "--teacher-nccl-port", "--teacher-mem-fraction-static",
    "--teacher-cuda-graph-max-bs", "--sglang-mem-fraction-static", "--sglang-cuda-graph-max-bs", "--max-tokens-per-gpu",
    "--teacher-num-gpus", "--teacher-num-gpus-per-engine", "--teacher-colocate", "--colocate", "--rollout-num-gpus",
    "--rollout-num-gpus-per-engine", "--save-interval", "--use-wandb", "--wandb-project", "--rm-url",
    "--rollout-external-engine-addrs", "--allow-teacher-change", "--sglang-host", "--use-sglang-router", "--optimizer-cpu-offload",
}  # fmt: skip
PORT_VARIABLES = (
    "TEACHER_PORT", "TEACHER_NCCL_PORT", "RAY_PORT", "RAY_DASHBOARD_PORT", "RAY_OBJECT_MANAGER_PORT", "RAY_NODE_MANAGER_PORT",
    "RAY_DASHBOARD_AGENT_LISTEN_PORT", "RAY_DASHBOARD_AGENT_GRPC_PORT", "RAY_METRICS_EXPORT_PORT",
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What a suite is about; everything else reaches train.py through the environment and run_opd.sh."""

    root: Path  # of the project: scripts/ and tools/
    python: str
    output_root: Path
    log_dir: Path
    tag: str
    entries: tuple[Entry, ...]
    seeds: tuple[Seeds, ...]
    student: str
    teacher: str  # Hugging Face directory for the fixed-context scoring; "" where there is none
    prompt_data: str
    top_k: int
    max_response_len: int
    skip_eval: bool = False
    common_context: str = ""
    baseline_metrics: str = ""
    heldout_prompt_data: str = ""
    input_key: str = "prompt"
    label_key: str = ""
    apply_chat_template: bool = True
    contexts: int = 300
    context_tokens: int = 192
    context_seed: int = 41717
    eval_gpus: str = ""  # "" = CPU
    bootstrap: int = 1000

    @property
    def directory(self) -> Path:
        return self.output_root / self.tag


@dataclass(frozen=True)
class Step:
    """One command of a row. It is done when memory says so and all `outputs` exist.

    inputs: words of the commands that made what it reads and whose paths stay the same; when they change, it is run again.
    """

    name: str
    command: tuple[str, ...]
    outputs: tuple[Path, ...]
    env: dict[str, str] = field(default_factory=dict)
    identity: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """One run. `run_dir` is SAVE_DIR of training, `eval_dir` holds what is computed from its last checkpoint."""

    name: str
    entry: Entry
    seeds: Seeds
    run_dir: Path
    eval_dir: Path
    env: dict[str, str]


def make_rows(settings: Settings, environment: dict[str, str]) -> list[Row]:
    """All runs, budgets inside seeds, in the order of the list. `environment` is read for port bases only."""
    rows = []
    data = slug(re.sub(r"\.(jsonl|json|parquet)$", "", settings.prompt_data))
    for seeds in settings.seeds:
        for entry in settings.entries:
            tag = budget_tag(entry.ratio)
            name = (
                f"{slug(settings.student)}_{data}_budget_k{settings.top_k}_{tag}_{entry.mask}"
                f"_max{settings.max_response_len}_{seeds.label}_{settings.tag}"
            )
            run_dir = settings.output_root / name
            env = {
                "RUN_NAME": name, "SAVE_DIR": str(run_dir), "METHOD_NAME": entry.method, "OPD_BUDGET_MASK": entry.mask,
                "OPD_BUDGET_RATIO": _exact(entry.ratio), "SEED": str(seeds.train), "ROLLOUT_SEED": str(seeds.rollout),
                "OPD_BUDGET_MASK_SEED": str(seeds.mask), "OPD_TOKEN_BANK_DIR": "", "RAY_JOB_ID": "",
            }  # fmt: skip
            env |= _ports(environment, entry.index)
            eval_dir = settings.directory / f"{entry.mask}_{tag}_{seeds.label}"
            rows.append(Row(name, entry, seeds, run_dir, eval_dir, env))
    return rows


def _exact(ratio: float) -> str:
    """The ratio with all its digits: 0.1, 1, 0.12345678."""
    return repr(ratio).removesuffix(".0")


def _ports(environment: dict[str, str], index: int) -> dict[str, str]:
    """Ports that the user fixed are bases, as in the released sweep: base + index for each run."""
    ports = {}
    for name in PORT_VARIABLES:
        base = environment.get(name, "auto")
        if base not in ("", "auto"):
            ports[name] = str(int(base) + index)
    return ports


def launcher(settings: Settings) -> tuple[str, ...]:
    return ("bash", str(settings.root / "scripts/train/run_opd.sh"))


def other_runs(rows: Sequence[Row], names: Iterable[str]) -> list[str]:
    """Those of `names` that have another student, prompt file, K or response length than `rows`; eval_dir does not tell them apart."""

    def sort_of_run(name: str) -> tuple[str, str] | None:
        found = re.fullmatch(r"(.+_budget_k\d+)_r[01]p\d+_.+_max(\d+)_.+", name)
        return (found[1], found[2]) if found else None

    ours = {sort_of_run(row.name) for row in rows}
    return [name for name in names if sort_of_run(name) is not None and sort_of_run(name) not in ours]


_ESCAPES = {b"a": b"\a", b"b": b"\b", b"E": b"\x1b", b"f": b"\f", b"n": b"\n", b"r": b"\r", b"t": b"\t", b"v": b"\v"}


def _shell_words(text: str) -> list[str]:
    """Words of a command as bash's %q prints them; what is not ASCII comes as $'...' in some locales."""

    def octet(found: re.Match) -> bytes:
        return bytes([int(found[1], 8)]) if found[1].isdigit() else _ESCAPES.get(found[1], found[1])

    def plain(found: re.Match) -> str:
        return shlex.quote(re.sub(rb"(?s)\\([0-7]{3}|.)", octet, found[1].encode(errors="surrogateescape")).decode(errors="surrogateescape"))

    return shlex.split(re.sub(r"(?<!\S)\$'((?:[^'\\]|\\.)*)'", plain, text.replace("\\\n", " ")))


def identity_of(dry_run_output: str) -> tuple[str, ...]:
    """What a run computes, from the command that DRY_RUN=1 prints: its flags with values, less those of PLACEMENT_FLAGS.

    `train_async.py` is one of its words: one step off-policy is another result.
    """
    words = _shell_words(dry_run_output)
    script = next((i for i, w in enumerate(words) if w.endswith(("train.py", "train_async.py"))), None)
    if script is None:
        raise ConfigError(f"launcher: expected a train.py command from DRY_RUN=1, got {dry_run_output!r}")
    flags: list[list[str]] = [["train_async.py"]] if words[script].endswith("train_async.py") else []
    for word in words[script + 1 :]:
        if word.startswith("--"):
            flags.append([word])
        elif flags:
            flags[-1].append(word)
    return tuple(sorted(" ".join(flag) for flag in flags if flag[0] not in PLACEMENT_FLAGS))


def differences(old: list[str] | tuple[str, ...], new: tuple[str, ...]) -> str:
    """Words that tell two identities apart: `--num-rollout 50 -> --num-rollout 100`."""
    gone, come = ([text for text in one if text not in other] for one, other in ((tuple(old), new), (new, tuple(old))))

    def side(texts: list[str], flag: str) -> str:
        return ", ".join(text for text in texts if text.split(" ")[0] == flag) or f"{flag} absent"

    flags = dict.fromkeys(text.split(" ")[0] for text in (*gone, *come))  # a flag may be there several times: --teacher
    return "; ".join(f"{side(gone, flag)} -> {side(come, flag)}" for flag in flags)


def tool(settings: Settings, name: str, *words: str) -> tuple[str, ...]:
    return (settings.python, str(settings.root / "tools" / name), *words)


def baseline_steps(settings: Settings) -> list[Step]:
    """Steps that make the context bank and its scores before training; empty where both are given or not needed."""
    if settings.skip_eval or (settings.common_context and settings.baseline_metrics):
        return []
    steps = []
    bank = common_context(settings)
    if not settings.common_context:
        prompts = settings.heldout_prompt_data or settings.prompt_data
        words = ["--model", settings.student, "--prompt-data", prompts, "--input-key", settings.input_key]
        if settings.label_key:
            words += ["--label-key", settings.label_key]
        if settings.apply_chat_template:
            words.append("--apply-chat-template")
        words += ["--max-samples", str(settings.contexts), "--max-response-tokens", str(settings.context_tokens),
                  "--seed", str(settings.context_seed), "--device", _devices(settings)[0], "--output", str(bank)]  # fmt: skip
        steps.append(Step("bank", tool(settings, "export_fixed_context_bank.py", *words), (bank,), _eval_env(settings)))
    if not settings.baseline_metrics:
        theta0 = baseline_metrics(settings)
        words = ["--context-bank", str(bank), "--student", settings.student, "--teacher", settings.teacher,
                 "--output", str(theta0), *_scoring_words(settings)]  # fmt: skip
        steps.append(Step("score_before", tool(settings, "eval_fixed_context_bank.py", *words), (theta0,), _eval_env(settings)))
    return steps


def common_context(settings: Settings) -> Path:
    return Path(settings.common_context or settings.directory / BASELINE_ROW / "context_bank.parquet")


def baseline_metrics(settings: Settings) -> Path:
    return Path(settings.baseline_metrics or settings.directory / BASELINE_ROW / "theta0_metrics.parquet")


def step_names(settings: Settings) -> tuple[str, ...]:
    """Names of the steps of a row, in order."""
    return ("train", "merge") if settings.skip_eval else ("train", "merge", "score_after", "gain")


def row_steps(settings: Settings, row: Row, identity: tuple[str, ...]) -> list[Step]:
    """Commands of one run: train, merge the token bank, score the frozen contexts, analyse the gain."""
    bank = row.run_dir / "token_bank"
    merged = bank / "merged.parquet"
    steps = [
        Step("train", launcher(settings), (row.run_dir / "DONE",), row.env, identity),
        Step("merge", tool(settings, "merge_token_bank.py", str(bank), "--output", str(merged), "--drop-raw-topk"), (merged,)),
    ]
    if settings.skip_eval:
        return steps
    metrics = row.eval_dir / "fixed_context_metrics.parquet"
    score = tool(
        settings, "eval_fixed_context_from_megatron.py",
        "--checkpoint-root", str(row.run_dir), "--iteration", "latest", "--origin-hf-dir", settings.student,
        "--teacher-hf-dir", settings.teacher, "--context-bank", str(common_context(settings)),
        "--baseline-metrics", str(baseline_metrics(settings)), "--output-dir", str(row.eval_dir), "--force-convert",
        *_scoring_words(settings),
    )  # fmt: skip
    baseline = tuple(word for step in baseline_steps(settings) for word in step.command)
    gain = row.eval_dir / "gain"
    analyse = tool(
        settings, "analyze_fixed_context_gain.py", "--input", str(metrics), "--output-dir", str(gain),
        "--bootstrap", str(settings.bootstrap), "--seed", "20260512", "--use-quadrant",
    )  # fmt: skip
    steps.append(Step("score_after", score, (metrics,), _eval_env(settings), inputs=baseline))
    steps.append(Step("gain", analyse, (gain / "regression_summary.csv",)))
    return steps


def _scoring_words(settings: Settings) -> list[str]:
    student, teacher = _devices(settings)
    return ["--topk", str(settings.top_k), "--student-device", student, "--teacher-device", teacher,
            "--dtype", "bfloat16" if settings.eval_gpus else "float32"]  # fmt: skip


def _devices(settings: Settings) -> tuple[str, str]:
    gpus = [g for g in settings.eval_gpus.split(",") if g]
    if not gpus:
        return "cpu", "cpu"
    return "cuda:0", "cuda:1" if len(gpus) > 1 else "cuda:0"


def _eval_env(settings: Settings) -> dict[str, str]:
    return {"CUDA_VISIBLE_DEVICES": settings.eval_gpus}


def write_mapping(settings: Settings) -> Path:
    """`method_mapping.csv` of the suite: method, mask, ratio, idx, notes."""
    path = settings.directory / "method_mapping.csv"
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "mask", "ratio", "idx", "notes"])
        for entry in settings.entries:
            writer.writerow([entry.method, entry.mask, _exact(entry.ratio), entry.index, entry.notes])
    return path
