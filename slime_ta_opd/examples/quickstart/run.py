"""The quick start: a task, two tiny models, one distillation a method on the real stack, and a report that compares them.

Everything runs on the CPU of this machine. Two SGLang servers serve all runs one after another; each run syncs its own
student into the student server when it begins, so the runs do not see each other.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported: the tiny models gain nothing from a GPU
ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [p for p in (str(ROOT), str(ROOT / "slime_ta_opd")) if p not in sys.path]

from examples.quickstart import arithmetic, heldout, plan, processes, tiny_models  # noqa: E402
from examples.quickstart.processes import say  # noqa: E402
from ta_opd.errors import ConfigError, TaOpdError  # noqa: E402
from ta_opd.fixed_context.hf import import_transformers  # noqa: E402

GAP_TO_CLOSE, KL_TO_CUT = 1 / 3, 0.30
CONTEXT, MAX_RESPONSE, TOPK = 96, 48, 16  # as in config.yaml


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="quickstart.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=ROOT / "outputs" / "quickstart")
    parser.add_argument("--cache-dir", type=Path, default=ROOT / "outputs" / "cache", help="where the two models are kept")
    parser.add_argument("--teacher-steps", type=int, default=tiny_models.Settings().teacher.steps,
                        help="training steps of the teacher; with fewer than 300 it is too weak (default: %(default)s)")  # fmt: skip
    parser.add_argument("--methods", default=plan.METHODS, help="method:ratio entries (default: %(default)s)")
    parser.add_argument("--seeds", default="seed1", help="seed labels: seed1 seed2 ..., every method with each (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=80, help="rollouts of each run (default: %(default)s)")
    parser.add_argument("--contexts", type=int, default=300, help="frozen held-out contexts (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of the trainer (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="run again what finished runs with the same settings are there for")
    parser.add_argument("--check", action="store_true", help="exit with 1 unless full OPD reaches the goals")
    parser.add_argument("train_flags", nargs="*", help="after --: further train.py flags for every run")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return run(args)
    except TaOpdError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: everything that the quick start started has been stopped; finished runs are kept", file=sys.stderr)
        return 130


def run(args: argparse.Namespace) -> int:
    """The whole quick start; returns the exit code."""
    began, home = time.time(), args.output_dir.resolve()
    if not 1 <= args.contexts <= 300:
        raise ConfigError(f"--contexts: expected 1 to 300 (the held-out prompts), got {args.contexts}")
    settings = tiny_models.with_teacher_steps(args.teacher_steps)
    plan.plan(home, methods=args.methods, seeds=args.seeds, steps=args.steps, student=home, train_file=home, heldout_file=home)  # checked early
    import_transformers().utils.logging.disable_progress_bar()  # tiny models load in milliseconds
    with processes.MemoryWatch() as memory:
        say("task: 2,000 training prompts and 300 held-out ones")
        task = arithmetic.write_task(home / "task")
        say("models: teacher and student, trained here or taken from the cache")
        models = tiny_models.tiny_models(args.cache_dir.resolve(), arithmetic.read_jsonl(task["heldout"]), settings)
        say(f"teacher solves {models.teacher_accuracy:.1%}, student {models.student_accuracy:.1%} of the held-out prompts")
        runs = plan.plan(
            home, methods=args.methods, seeds=args.seeds, steps=args.steps, student=models.student, train_file=task["train"],
            heldout_file=task["heldout"], extra=args.train_flags,
        )  # fmt: skip
        train_all(runs, models, home, args)
        score_all(runs, models, task, home, args.contexts)
        report = make_report(runs, models, task, home)
    say(f"{time.time() - began:.0f} s, at most {memory.peak / 2**30:.1f} GiB of memory")
    reached = goals(report.summary)
    print("\n".join(["", *report.headline, *(f"warning: {w}" for w in report.warnings), *(text for text, _ in reached), "", f"report: {report.html}"]))
    return 1 if args.check and not all(ok for _, ok in reached) else 0


def train_all(runs: list[plan.Planned], models: tiny_models.TinyModels, home: Path, args: argparse.Namespace) -> None:
    """Trains what is not finished yet."""
    waiting = [r for r in runs if args.force or not r.finished]
    for r in runs:
        if r not in waiting:
            say(f"{r.name}: finished before with these settings, kept")
    if not waiting:
        return
    say("starting the student's and the teacher's SGLang server")
    with processes.servers(models.student, models.teacher, context=CONTEXT, logs=home / "logs") as (student_url, teacher_url):
        for number, r in enumerate(waiting, start=1):
            say(f"run {number} of {len(waiting)}: {r.name}, {args.steps} rollouts")
            began = time.time()
            _clear(r)
            processes.train(
                plan.command(r, student_url, teacher_url), log=home / "logs" / f"{r.name}.log", environment=processes.environment(args.threads)
            )
            r.remember()
            say(f"{r.name}: {time.time() - began:.0f} s")


def _clear(r: plan.Planned) -> None:
    """Removes what an earlier run left in the directory of this one, so that no two runs are mixed."""
    if r.directory.is_dir():
        shutil.rmtree(r.directory)


def score_all(runs: list[plan.Planned], models: tiny_models.TinyModels, task: dict[str, Path], home: Path, contexts: int) -> None:
    """Frozen contexts: sampled and scored before training, and scored after each run."""
    from tqdm import tqdm

    bank, before = home / "context_bank.parquet", home / "context_scores_before.parquet"
    say(f"frozen contexts: {contexts} held-out prompts answered by the initial student, scored by both models")
    heldout.make_bank(bank, task["heldout"], models.student, contexts=contexts, max_response_tokens=MAX_RESPONSE)
    heldout.score(bank, models.student, models.teacher, before, topk=TOPK)
    for r in tqdm(runs, desc="scoring after training", unit="run", dynamic_ncols=True, disable=None):
        heldout.score_run(r.directory, bank, models.teacher, before, topk=TOPK)


def make_report(runs: list[plan.Planned], models: tiny_models.TinyModels, task: dict[str, Path], home: Path):
    """Writes suite.json and report.html."""
    from ta_opd.report.build import build_report

    say("report")
    suite = {
        "title": "Quick start: multi-step arithmetic", "runs": [r.name for r in runs], "teacher_accuracy": models.teacher_accuracy,
        "student_accuracy": models.student_accuracy, "tokenizer": str(task["tokenizer"]),
        "facts": [f"teacher solves {models.teacher_accuracy:.1%}", "Qwen3 architecture, 2 layers, 398,080 parameters", "CPU"],
    }  # fmt: skip
    (home / "suite.json").write_text(json.dumps(suite, indent=1) + "\n")
    return build_report(home)


def goals(summary) -> list[tuple[str, bool]]:
    """What full OPD must reach, as (line to print, reached); nothing when it was not run."""
    full = summary[summary["mask"] == "full"]
    if full.empty:
        return []
    gap, drop = float(full["gap_closed"].iloc[0]), float(full["kl_drop"].iloc[0])
    lines = [("closed of the accuracy gap to the teacher", gap, GAP_TO_CLOSE), ("cut of the KL on frozen contexts", drop, KL_TO_CUT)]
    return [
        (f"full OPD: {value:.0%} {what} (goal: at least {goal:.0%}): {'reached' if value >= goal else 'not reached'}", value >= goal)
        for what, value, goal in lines
    ]


def _interrupt(signum, frame):
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
