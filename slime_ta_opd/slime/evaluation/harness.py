"""lm-evaluation-harness on checkpoints and running servers: one process for each model, task, seed and sample, finished ones skipped."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from slime.evaluation import local_tasks
from ta_opd.errors import ConfigError
from ta_opd.suite.memory import fingerprint, stamp, write_json
from ta_opd.suite.process import run_logged

UNSAFE = re.compile(r"humaneval|mbpp")  # tasks that run code written by the model


@dataclass(frozen=True)
class Settings:
    """What to evaluate and how. `models`: label -> HF directory, http address of a SGLang server, or an OpenAI-compatible http://.../v1."""

    models: Mapping[str, str]
    tasks: tuple[str, ...]
    run_dir: Path
    python: str = sys.executable
    seeds: tuple[int, ...] = (1234,)
    n_samples: int = 1
    chat_template: bool = True
    system_instruction: str = ""
    num_fewshot: int | None = None
    max_gen_toks: int | None = None
    temperature: float | None = None  # None: what the task says (greedy mostly)
    top_p: float | None = None
    batch_size: str = "8"
    limit: str = ""
    device: str = "auto"
    dtype: str = "auto"
    max_length: int | None = None
    tokenizer: str = ""  # for servers
    server_concurrency: int = 32
    trust_remote_code: bool = False
    allow_code: bool = False
    timeout: float | None = None  # seconds of one process
    local_datasets: Mapping[str, str] = field(default_factory=dict)
    prompt_tasks: Mapping[str, str] = field(default_factory=dict)
    input_key: str = "prompt"
    label_key: str = "label"


@dataclass(frozen=True)
class Job:
    """One harness process. Its directory holds harness.log, the harness's own files and DONE. inputs: a stamp of the files that it reads."""

    model: str
    task: str
    seed: int
    sample: int
    directory: Path
    command: tuple[str, ...]
    inputs: str = ""


def check(settings: Settings) -> None:
    """Raises ConfigError for what would fail after hours: a model that is no directory, code tasks without consent, seeds without sampling."""
    for label, model in settings.models.items():
        if not model.startswith("http") and not (Path(model) / "config.json").is_file():
            raise ConfigError(f"MODELS: {label}={model}: expected a Hugging Face model directory (with config.json) or a server's address")
        if model.startswith("http") and not settings.tokenizer:
            raise ConfigError(f"TOKENIZER: expected the tokenizer's directory for the server {label}={model}")
    unsafe = [t for t in settings.tasks if UNSAFE.search(t)]
    if unsafe and not settings.allow_code:
        raise ConfigError(f"ALLOW_CODE=0: {', '.join(unsafe)} runs code written by the model; expected ALLOW_CODE=1, in a sandbox that you trust")
    if len(settings.seeds) * settings.n_samples > 1 and not settings.temperature:
        raise ConfigError(
            f"EVAL_SEEDS and N_SAMPLES: {len(settings.seeds) * settings.n_samples} runs without sampling would all be the same; "
            "expected TEMPERATURE above 0, or one seed and one sample"
        )


def jobs(settings: Settings) -> list[Job]:
    """All processes, tasks inside models, with local task files written."""
    include = settings.run_dir / "tasks"
    names = local_tasks.write(include, settings.local_datasets, settings.prompt_tasks, settings.input_key, settings.label_key)
    out = []
    for label, model in settings.models.items():
        for task in settings.tasks:
            for seed in settings.seeds:
                for sample in range(settings.n_samples):
                    directory = settings.run_dir / label / task / (f"seed{seed}" + (f"_sample{sample}" if settings.n_samples > 1 else ""))
                    words = _command(settings, model, names.get(task, task), seed + 100_003 * sample, directory)
                    if task in names:
                        words += ["--include_path", str(include)]
                    read = [p for p in (model, settings.local_datasets.get(task), settings.prompt_tasks.get(task)) if p and not p.startswith("http")]
                    inputs = fingerprint([stamp(Path(p)) for p in read]) if read else ""
                    out.append(Job(label, task, seed, sample, directory, tuple(words), inputs))
    return out


def _command(settings: Settings, model: str, task: str, seed: int, directory: Path) -> list[str]:
    words = [settings.python, "-m", "lm_eval", "run"]
    if model.startswith("http"):
        words += ["--model", *_server(model), f"tokenizer={settings.tokenizer}", f"num_concurrent={settings.server_concurrency}", f"seed={seed}"]
    else:
        words += ["--model", "hf", "--model_args", f"pretrained={model}", f"dtype={settings.dtype}"]
    if settings.max_length:
        words.append(f"max_length={settings.max_length}")
    if settings.trust_remote_code:
        words += ["--trust_remote_code"]
    words += ["--tasks", task, "--batch_size", settings.batch_size, "--seed", str(seed), "--output_path", str(directory), "--log_samples"]
    if not model.startswith("http") and settings.device != "auto":
        words += ["--device", settings.device]
    generation = {"max_gen_toks": settings.max_gen_toks, "temperature": settings.temperature or None, "top_p": settings.top_p}
    if settings.temperature:
        generation["do_sample"] = True
        if "sglang-generate" in words:  # the harness hands its own seed on to OpenAI addresses only
            generation["sampling_seed"] = seed
    given = [f"{k}={v}" for k, v in generation.items() if v is not None]
    if given:
        words += ["--gen_kwargs", *given]
    if settings.chat_template:
        words.append("--apply_chat_template")
    if settings.system_instruction:
        words.append(f"--system_instruction={settings.system_instruction}")  # one word: it may begin with a dash
    if settings.num_fewshot is not None:
        words += ["--num_fewshot", str(settings.num_fewshot)]
    if settings.limit:
        words += ["--limit", settings.limit]
    if UNSAFE.search(task):
        words.append("--confirm_run_unsafe_code")
    return words


def _server(address: str) -> list[str]:
    """The harness's model type and address: the native /generate (any task), or an OpenAI-compatible .../v1 (a SGLang server answers
    generation tasks there, but gives no log-probs of the prompt, which multiple-choice tasks need)."""
    base = address.rstrip("/").removesuffix("/completions").removesuffix("/generate")
    if base.endswith("/v1"):
        return ["local-completions", "--model_args", f"base_url={base}/completions", "model=default", "tokenizer_backend=huggingface"]
    return ["sglang-generate", "--model_args", f"base_url={base}/generate"]


def is_done(job: Job) -> bool:
    """DONE is there and was written for this very command, with the model and data as they are now."""
    try:
        done = json.loads((job.directory / "DONE").read_text())
        return done["fingerprint"] == fingerprint(job.command[1:]) and done.get("inputs", job.inputs) == job.inputs
    except (OSError, ValueError, KeyError):
        return False


def run(settings: Settings, todo: Iterable[Job], environment: dict[str, str], stop: Sequence[int]) -> list[tuple[Job, str]]:
    """Runs what is not done; returns jobs with `done`, `skipped`, `failed`, `timed out` or `interrupted`."""
    ended = []
    for job in todo:
        if stop:
            ended.append((job, "interrupted"))
            continue
        if is_done(job):
            ended.append((job, "skipped"))
            continue
        job.directory.mkdir(parents=True, exist_ok=True)
        log = job.directory / "harness.log"
        print(f"{job.model} {job.task} seed {job.seed} sample {job.sample} (log {log})", flush=True)
        environment_of_job = environment | ({"HF_ALLOW_CODE_EVAL": "1"} if UNSAFE.search(job.task) else {})
        outcome = run_logged(job.command, log=log, env=environment_of_job, stop=stop, limit=settings.timeout)
        if outcome.timed_out or outcome.interrupted:
            ended.append((job, "timed out" if outcome.timed_out else "interrupted"))
        elif outcome.returncode or not any(job.directory.rglob("results_*.json")):
            ended.append((job, "failed"))
        else:
            write_json(job.directory / "DONE", {"fingerprint": fingerprint(job.command[1:]), "inputs": job.inputs, "seconds": round(outcome.seconds, 1)})
            ended.append((job, "done"))
        print(f"  {ended[-1][1]} after {outcome.seconds:.0f} s", flush=True)
    return ended
