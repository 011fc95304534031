"""A teacher and a student of Qwen3 architecture for the arithmetic task, trained from scratch on the CPU and cached.

Both learn the worked solutions by cross-entropy. The teacher trains to the end of its schedule; the student is stopped
the first time it solves a set share of its own validation problems, so that there is something left to distil. Every
number is a count of steps, never of seconds: a busy machine makes the same models.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import random
import shutil
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from examples.quickstart import decoding
from examples.quickstart.arithmetic import VOCAB_SIZE, Problem, build_tokenizer, make_problems, sample_problem
from ta_opd.errors import ConfigError, NumericsError
from ta_opd.fixed_context.hf import import_transformers

RECIPE = 1  # raise when the code changes what is trained, so that cached models are made anew
THREADS = 1  # fixed: the order of float sums depends on it; the two models train side by side in two processes
IGNORED = -100


@dataclass(frozen=True)
class Shape:
    """A Qwen3 model; the default has 398,080 parameters."""

    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32


@dataclass(frozen=True)
class Training:
    """AdamW with warm-up and a cosine over `schedule` steps; `steps` of them are taken at most.

    With `stop_at`, training ends at the first check (every `check_every` steps) at which that share of the validation
    problems is solved.
    """

    seed: int
    steps: int = 600
    schedule: int = 600
    lr: float = 4e-3
    warmup: int = 30
    batch_size: int = 64
    stop_at: float | None = None
    check_every: int = 10
    validation: int = 300


@dataclass(frozen=True)
class Settings:
    """Everything that decides what the two models are; its hash names the cache entry."""

    teacher: Training = field(default_factory=lambda: Training(seed=3))
    student: Training = field(default_factory=lambda: Training(seed=7, steps=500, schedule=500, stop_at=0.4))
    teacher_shape: Shape = field(default_factory=Shape)
    student_shape: Shape = field(default_factory=Shape)
    teacher_at_least: float = 0.9
    student_between: tuple[float, float] = (0.2, 0.6)


def with_teacher_steps(steps: int) -> Settings:
    """The usual settings with a teacher of so many steps, its schedule as long. Raises ConfigError below 1."""
    if steps < 1:
        raise ConfigError(f"--teacher-steps: expected at least 1, got {steps}")
    usual = Settings()
    return replace(usual, teacher=replace(usual.teacher, steps=steps, schedule=steps))


@dataclass(frozen=True)
class TinyModels:
    """Directories of the two models (with tokenizers) and what each solves of the held-out problems, greedily."""

    teacher: Path
    student: Path
    teacher_accuracy: float
    student_accuracy: float
    cached: bool


def make_model(shape: Shape, seed: int):
    """A Qwen3ForCausalLM (fp32, tied embeddings, vocabulary of the task) with weights drawn from `seed`."""
    import torch

    transformers = import_transformers()
    tokenizer = build_tokenizer()
    config = transformers.Qwen3Config(
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **asdict(shape),
    )
    torch.manual_seed(seed)
    return transformers.Qwen3ForCausalLM(config)


def encode(problems: Sequence[Problem], tokenizer):
    """(ids_BL, targets_BL) int64, padded on the right; targets are IGNORED outside the response and its end token."""
    import torch

    rows = [
        (tokenizer(problem.prompt)["input_ids"], tokenizer(problem.solution)["input_ids"] + [tokenizer.eos_token_id]) for problem in problems
    ]
    length = max(len(prompt) + len(solution) for prompt, solution in rows)
    ids_BL = torch.full((len(rows), length), tokenizer.pad_token_id)
    targets_BL = torch.full((len(rows), length), IGNORED)
    for index, (prompt, solution) in enumerate(rows):
        end = len(prompt) + len(solution)
        ids_BL[index, :end] = torch.tensor(prompt + solution)
        targets_BL[index, len(prompt) : end] = ids_BL[index, len(prompt) : end]
    return ids_BL, targets_BL


def learning_rate(training: Training, step: int) -> float:
    """Linear warm-up times a cosine that reaches zero after `schedule` steps; `step` counts from 0."""
    warm = min(1.0, (step + 1) / training.warmup)
    return training.lr * warm * 0.5 * (1 + math.cos(math.pi * min(step / training.schedule, 1.0)))


def train(shape: Shape, training: Training, held_back: set[str], *, label: str = "model", line: int = 0):
    """A model trained by cross-entropy on fresh problems; returns (model, steps taken).

    No problem whose prompt is in `held_back` is trained on. `line`: place of the progress bar below the first. Raises NumericsError when the loss is not finite or when
    `stop_at` is not reached within `steps`.
    """
    import torch
    from tqdm import tqdm

    tokenizer, rng = build_tokenizer(), random.Random(training.seed)
    model = make_model(shape, training.seed).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=training.lr, betas=(0.9, 0.98), weight_decay=0.01)
    validation = [p for p in make_problems(1, training.validation, seed=-1 - training.seed)[1] if p.prompt not in held_back]
    live = sys.stderr.isatty()  # a log gets no cursor movements and a line's worth now and then
    bar = tqdm(range(training.steps), desc=label, unit="step", dynamic_ncols=True, position=line if live else 0, mininterval=0.1 if live else 30)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(training, step)
        ids_BL, targets_BL = encode(_fresh(rng, training.batch_size, held_back), tokenizer)
        logits_BLV = model(input_ids=ids_BL, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits_BLV[:, :-1].flatten(0, 1), targets_BL[:, 1:].flatten(), ignore_index=IGNORED)
        if not torch.isfinite(loss):
            raise NumericsError(f"{label}, step {step}: expected a finite loss, got {loss.item()}; use a smaller learning rate")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if training.stop_at is not None and (step + 1) % training.check_every == 0:
            share = decoding.solved(model.eval(), tokenizer, validation).mean()
            model.train()
            bar.set_postfix(loss=f"{loss.item():.3f}", solved=f"{share:.2f}", refresh=False)
            if share >= training.stop_at:
                bar.total = step + 1
                bar.close()
                return model.eval(), step + 1
    if training.stop_at is not None:
        raise NumericsError(f"{label}: expected {training.stop_at:.0%} solved within {training.steps} steps, it did not get there")
    return model.eval(), training.steps


def _fresh(rng: random.Random, count: int, held_back: set[str]) -> list[Problem]:
    problems: list[Problem] = []
    while len(problems) < count:
        problem = sample_problem(rng)
        if problem.prompt not in held_back:
            problems.append(problem)
    return problems


def fingerprint(settings: Settings, heldout: Sequence[Problem]) -> str:
    """12 hex digits of the settings, the recipe and the prompts that were kept out of training."""
    content = {"recipe": RECIPE, "settings": asdict(settings), "heldout": [problem.prompt for problem in heldout]}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def tiny_models(cache: Path, heldout: Sequence[Problem], settings: Settings | None = None, *, force: bool = False) -> TinyModels:
    """The two models from `cache`, trained now where they are not there yet (about a minute on two cores).

    Raises NumericsError when a model comes out too weak or too strong for the task, ConfigError without held-out problems.
    """
    if not heldout:
        raise ConfigError("tiny models: expected held-out problems to keep out of training, got none")
    settings = settings or Settings()
    home = cache / f"tiny-{fingerprint(settings, heldout)}"
    summary_file = home / "summary.json"
    if force:
        shutil.rmtree(home, ignore_errors=True)
    cached = summary_file.is_file()
    if not cached:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="tiny-", dir=cache) as partial:
            _make(Path(partial), heldout, settings)
            shutil.rmtree(home, ignore_errors=True)
            Path(partial).rename(home)
            Path(partial).mkdir()  # so that the temporary directory can be removed
        home.chmod(0o755)
    summary = json.loads(summary_file.read_text())
    return TinyModels(home / "teacher", home / "student", summary["teacher_accuracy"], summary["student_accuracy"], cached)


def _make(home: Path, heldout: Sequence[Problem], settings: Settings) -> None:
    results = _train_both(home, heldout, settings)
    summary: dict[str, object] = {"recipe": RECIPE, "settings": asdict(settings)}
    for role, (accuracy, steps, parameters) in results.items():
        print(f"{role}: {parameters:,} parameters, {steps} steps, solves {accuracy:.1%} of {len(heldout)} held-out problems")
        summary |= {f"{role}_accuracy": accuracy, f"{role}_steps": steps}
    low, high = settings.student_between
    if results["teacher"][0] < settings.teacher_at_least:
        raise NumericsError(f"teacher: expected at least {settings.teacher_at_least:.0%} solved, got {results['teacher'][0]:.1%}")
    if not low <= results["student"][0] <= high:
        raise NumericsError(f"student: expected {low:.0%} to {high:.0%} solved, got {results['student'][0]:.1%}")
    (home / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")


def _train_both(home: Path, heldout: Sequence[Problem], settings: Settings) -> dict[str, tuple[float, int, int]]:
    """Both models side by side, each in a process of its own."""
    roles = (("teacher", settings.teacher_shape, settings.teacher), ("student", settings.student_shape, settings.student))
    with ProcessPoolExecutor(max_workers=2, mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(_make_one, home / role, shape, training, list(heldout), role, i) for i, (role, shape, training) in enumerate(roles)]
        return {role: job.result() for (role, _, _), job in zip(roles, jobs, strict=True)}


def _make_one(home: Path, shape: Shape, training: Training, heldout: list[Problem], label: str, line: int) -> tuple[float, int, int]:
    """Trains and saves one model; returns (held-out accuracy, steps, parameters)."""
    import torch

    torch.set_num_threads(THREADS)
    tokenizer = build_tokenizer()
    import_transformers().utils.logging.disable_progress_bar()
    model, steps = train(shape, training, {problem.prompt for problem in heldout}, label=label, line=line)
    model.save_pretrained(str(home))
    tokenizer.save_pretrained(str(home))
    accuracy = float(decoding.solved(model, tokenizer, heldout).mean())
    return accuracy, steps, sum(p.numel() for p in model.parameters())
