"""Which tokens to teach, measured: every selector at several budgets, two losses, three seeds, the better of two learning rates.

    python benchmarks/gpu/behaviour.py --size gpu --output-dir outputs/behaviour --seconds 1140    # again, until it says it is done
    python benchmarks/gpu/behaviour.py --size mid --device cpu --output-dir outputs/behaviour-mid --seconds 6000  # one core
    python benchmarks/gpu/behaviour.py --size gpu --count                                          # what would run, what it costs, memory

A teacher and a student are trained from scratch on generated multi-step reasoning (examples/reasoning), each in its own writer's words.
Then groups of runs of on-policy distillation share the device (behaviour/distil.py); every run samples equally many responses. The first
seed runs at both rates; the others at the one that was better for the arm. Writes runs.csv and arms.csv (at the better learning rate, 95 %
intervals over seeds) after every group; at the end, or when --seconds are over or SIGTERM or SIGINT comes, of what is done: arms.png, regression*.csv,
rollouts.parquet, report.html and result.json. A call that was stopped is gone on with by the same call, `--seconds 0` only analyses.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pickle
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor
from dataclasses import asdict, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if __package__ in (None, ""):
    sys.path[:0] = [str(ROOT), str(ROOT / "slime_ta_opd")]

import pandas as pd  # noqa: E402
import torch  # noqa: E402

from benchmarks.behaviour import outcome, plan  # noqa: E402
from benchmarks.behaviour.choosing import Chooser  # noqa: E402
from benchmarks.behaviour.distil import Distiller  # noqa: E402
from benchmarks.behaviour.pretrain import models, problem_sets  # noqa: E402
from benchmarks.behaviour.sizes import SIZES, Size  # noqa: E402
from benchmarks.behaviour.stacked import Stack  # noqa: E402
from examples.reasoning.corpus import VOCABULARY  # noqa: E402
from ta_opd.errors import ConfigError, TaOpdError  # noqa: E402
from ta_opd.fixed_context.hf import import_transformers  # noqa: E402

FINISH_SECONDS = 90  # of --seconds kept for pictures, regression and report, at most a tenth of them


def count(size: Size) -> dict:
    """Runs, tokens and operations; seconds at 35 % of 790 TFLOP/s plus what launches and the CPU take, a guess to check against the first group."""
    first = plan.first_runs(size)
    later = plan.later_runs(size, dict.fromkeys(plan.arms(size), size.rates[0]))
    runs, groups = first + later, [*plan.groups(size, first), *plan.groups(size, later)]
    length = 18 + 0.8 * size.response  # tokens of a prompt and a response, about
    tokens = len(runs) * size.rollouts * size.prompts * length
    student, teacher = size.student.width.parameters, size.teacher.width.parameters
    pretrain = sum(6 * s.width.parameters * s.steps * s.batch * length for s in (size.teacher, size.student))
    done = tokens * (2 * teacher + 8 * student + 2 * student) + pretrain
    launches = len(groups) * size.rollouts * (size.response * size.student.width.layers * 26 + 3000) * 8e-6
    return {"selectors": len(plan.selectors(size)), "arms": len(plan.arms(size)), "runs": len(runs), "groups": len(groups), "rollouts": size.rollouts,
            "responses": len(runs) * size.rollouts * size.prompts, "tokens": tokens, "operations": done, "teacher_parameters": teacher, "student_parameters": student,
            "seconds_operations": done / (0.35 * 790e12), "seconds_launches": launches, "gib": {k: round(v / 2**30, 1) for k, v in memory(size).items()}}  # fmt: skip


def memory(size: Size) -> dict[str, float]:
    """Bytes on the device at the peak of a group, by what holds them. Responses as long as they may be: an upper bound of what is saved for backward."""
    w, runs = size.student.width, size.group
    held = runs * w.parameters
    rows = runs * size.prompts * (18 + size.response)
    heads = (w.heads + w.kv_heads) * w.head_dim
    # fp32: two norms' inputs and outputs, the heads before and after their norm; bf16: their casts, q, k, v packed and spread, gate, up, silu, product
    layer = rows * (4 * (4 * w.hidden + 3 * heads) + 2 * (2 * w.hidden + 4 * (w.heads + 2 * w.kv_heads) * w.head_dim + 4 * w.ffn))
    cache = 2 * 2 * runs * (size.heldout + size.validation) * (40 + size.response) * w.kv_heads * w.head_dim * w.layers
    train = w.layers * layer + 4 * rows * w.hidden * 2 + 3 * 4 * rows * VOCABULARY
    measure = cache + 4 * runs * (size.heldout + size.validation) * 40 * (3 * w.hidden + 2 * w.ffn)
    found = {"weights": 4 * held, "gradients and Adam": 3 * 4 * held, "bf16 weights": 2 * held, "kept for backward": train, "measuring": measure,
             "teacher and its frozen scores": 2 * 4 * size.teacher.width.parameters + 4 * size.contexts * size.response * VOCABULARY}  # fmt: skip
    peak = max(found["gradients and Adam"] + train, measure)
    return found | {"peak": found["weights"] + found["bf16 weights"] + found["teacher and its frozen scores"] + peak}


def fitted(size: Size, folder: Path) -> Size:
    """The size with groups as in the folder, or where it has none small enough for what is free on the device, a tenth of it spared."""
    torch.backends.cuda.enable_cudnn_sdp(False)  # builds a plan for every shape, and every rollout has its own
    free, whole = torch.cuda.mem_get_info()
    begun = any(folder.glob("groups/*.pickle")) and json.loads((folder / "size.json").read_text())["group"]
    while not begun and size.group > 1 and memory(size)["peak"] > 0.9 * free:
        size = replace(size, group=size.group // 2)
    size = replace(size, group=min(begun or size.group, size.group))
    say(f"groups of {size.group} runs, at most about {memory(size)['peak'] / 2**30:.0f} GiB; {free / 2**30:.0f} of {whole / 2**30:.0f} GiB are free")
    return size


class OutOfTime(Exception):
    """The deadline, or a signal to stop: the group in work is given up."""


class Session:
    """The output directory: what is finished, and going on from there."""

    def __init__(self, folder: Path, size: Size, device: torch.device, chooser: Chooser):
        self.folder, self.size, self.device = folder, size, device
        self.parts, self.states = folder / "groups", folder / "states"
        for made in (folder, self.parts, self.states):
            made.mkdir(parents=True, exist_ok=True)
        self._check_same_size()
        self.teacher, self.student, self.facts = models(size, folder, device, say)
        self.heldout, self.validation = problem_sets(size)
        self.frozen = outcome.Frozen(folder, self.heldout, size, self.teacher, device)
        self.start = self._start()
        say(f"teacher {self.facts['teacher']['heldout']:.3f}, initial student {self.start['accuracy']:.3f} of held-out problems; KL {self.start['KLf']:.4f} nats")
        avoid = {p.prompt for p in self.heldout + self.validation}
        self.distiller = Distiller(self.teacher, self.student, size, device, avoid, chooser)
        self.runs_left, self.seconds_a_run, self.longest = plan.number_of_runs(size), 0.0, 0.0

    def _check_same_size(self) -> None:
        """ConfigError where the folder's groups are of other settings."""
        stamp, own = self.folder / "size.json", json.dumps(asdict(self.size), indent=1, default=str)
        if not stamp.is_file() or not any(self.parts.glob("*.pickle")):
            stamp.write_text(own)
        elif stamp.read_text() != own:
            raise ConfigError(f"--output-dir {self.folder}: expected groups of the same settings, its size.json says otherwise; give a new directory")

    def _start(self) -> dict:
        """What the initial student does; kept in the folder."""
        file = self.folder / "start.json"
        if not file.is_file():
            start = outcome.measure(Stack.copies(self.student, 1, self.device), [plan.Run(plan.Arm("none", 0.0, ""), 0, 0.0)], self.frozen, self.heldout, self.validation, self.size)[0]
            file.write_text(json.dumps({k: start[k] for k in ("accuracy", "KLf", "KLr", "validation")}))
        return json.loads(file.read_text())

    def train(self, deadline: float) -> bool:
        """Trains groups until all are done (True) or the next would probably end after `deadline`. Raises OutOfTime inside a group."""
        first = list(plan.groups(self.size, plan.first_runs(self.size)))
        if not all(self._group(number, runs, deadline) for number, runs in enumerate(first)):
            return False
        rates = {plan.Arm(*key): lr for key, lr in outcome.rate_of_each_arm(pd.DataFrame(self._rows(len(first)))).items()}
        later = plan.groups(self.size, plan.later_runs(self.size, rates))
        return all(self._group(len(first) + number, runs, deadline) for number, runs in enumerate(later))

    def _file(self, number: int) -> Path:
        return self.parts / f"{number:04d}.pickle"

    def _rows(self, count: int) -> list[dict]:
        """Results of the first `count` groups."""
        return [row for number in range(count) for row in pickle.loads(self._file(number).read_bytes())["rows"]]

    def _group(self, number: int, runs: list[plan.Run], deadline: float) -> bool:
        """Whether the group is done, now or before."""
        file = self._file(number)
        if file.is_file():
            self.runs_left -= len(runs)
            self.longest = max(self.longest, pickle.loads(file.read_bytes())["seconds"])
            return True
        if time.time() + 1.1 * self.longest > deadline:
            say(f"stopped at the time limit: {number} groups are done; call again to go on")
            return False
        began = time.time()
        self.distiller.log.rows.clear()

        def in_time(stack: Stack, rollout: int) -> None:
            if time.time() > deadline:
                raise OutOfTime(f"the time limit came in group {number + 1}, rollout {rollout + 1} of {self.size.rollouts}: call again to train it anew")

        stack = self.distiller.train(runs, in_time)
        rows = outcome.measure(stack, runs, self.frozen, self.heldout, self.validation, self.size)
        seconds = time.time() - began
        self._keep_states(stack, runs)
        partial = file.with_suffix(".partial")
        partial.write_bytes(pickle.dumps({"rows": rows, "rollouts": self.distiller.log.rows, "seconds": seconds}))
        partial.replace(file)
        self.longest, self.runs_left, self.seconds_a_run = max(self.longest, seconds), self.runs_left - len(runs), seconds / len(runs)
        self._tables()
        best, whole = max(rows, key=lambda r: r["accuracy"]), plan.number_of_runs(self.size)
        say(f"group {number + 1}: {len(runs)} runs in {seconds:.1f} s; best {best['run']} {best['accuracy']:.3f}; {whole - self.runs_left} of {whole} runs done, "
            f"about {self.seconds_a_run * self.runs_left:.0f} s left")  # fmt: skip
        return True

    def _keep_states(self, stack: Stack, runs: list[plan.Run]) -> None:
        """Weights for the regression of gains, until that is made."""
        middle = sorted(self.size.budgets)[len(self.size.budgets) // 2]
        for i, run in enumerate(runs):
            if run.arm.budget in (1.0, middle) and (run.arm.selector == "full" or run.arm.selector in outcome.REGRESSED and run.seed == self.size.seeds[0]):
                torch.save(stack.state_of(i), self.states / f"{run.name}.pt")

    def _tables(self) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame, pd.DataFrame, float]:
        """(runs, those at the better rate, arms, rollouts, seconds of the groups), written too."""
        rows, rollouts, seconds = [], [], 0.0
        for file in sorted(self.parts.glob("*.pickle")):
            part = pickle.loads(file.read_bytes())
            rows += part["rows"]
            rollouts += part["rollouts"]
            seconds += part["seconds"]
        if not rows:
            return pd.DataFrame(), pd.DataFrame(), pd.DataFrame(), pd.DataFrame(), 0.0
        steps = pd.DataFrame(rollouts)
        table = pd.DataFrame(rows).merge(steps.groupby("run")[["tokens", "kept"]].sum(), left_on="run", right_index=True)
        best = outcome.better_rate(table)
        arms = outcome.arm_table(best)
        table.to_csv(self.folder / "runs.csv", index=False, float_format="%.6g")
        arms.to_csv(self.folder / "arms.csv", index=False, float_format="%.6g")
        return table, best, arms, steps, seconds

    def finish(self, complete: bool, deadline: float) -> dict:
        """Tables, pictures, regression and report of what is done; the regression takes as many runs as fit before the deadline."""
        table, best, arms, steps, seconds = self._tables()
        if table.empty:
            return {"complete": False, "runs": 0}
        steps.to_parquet(self.folder / "rollouts.parquet", index=False)
        outcome.picture(arms, self.start, self.folder / "arms.png", self.facts["teacher"]["heldout"])
        tables, page, left_out = {}, None, []

        @contextlib.contextmanager
        def if_it_can(what: str) -> Iterator[None]:
            """A machine for training may lack statsmodels or jinja2, or the device be lost: the tables above are worth having all the same."""
            try:
                yield
            except (ImportError, TaOpdError, ValueError, RuntimeError) as error:
                left_out.append(f"{what}: {type(error).__name__}: {error}")
                say(f"left out: {left_out[-1]}")

        with if_it_can("regression"):
            summary, coefficients, tables = outcome.regressions(self.frozen, self.states, best, self.device, say, deadline)
            if tables:
                summary.to_csv(self.folder / "regression.csv", index=False, float_format="%.6g")
                coefficients.to_csv(self.folder / "regression_coefficients.csv", index=False, float_format="%.6g")
        with if_it_can("report"):
            page = outcome.report(self.folder, best, steps, tables, self.start, self.facts, self.size)
        last = steps[steps["rollout"] == 0]
        result = {"complete": complete, "runs": len(table), "of": plan.number_of_runs(self.size), "models": self.facts, "start": self.start,
                  "compatibility_sd": float(last["Cmass_sd"].mean()), "mean_compatibility": float(last["Cmass"].mean()), "sentences": outcome.sentences(arms),
                  "regressed": sorted(tables), "report": page.name if page else None, "left_out": left_out, "seconds_training_and_measuring": seconds}  # fmt: skip
        print("\n".join(["", arms.to_string(max_rows=60, float_format="%.4f"), "", *result["sentences"]]))
        return result


def sized(args) -> Size:
    """The size with what the command line changes."""
    size = SIZES[args.size]
    teacher = replace(size.teacher, steps=args.teacher_steps or size.teacher.steps)
    student = replace(size.student, stop_at=args.student_stop_at or size.student.stop_at)
    return replace(size, teacher=teacher, student=student, group=args.group or size.group, rollouts=args.rollouts or size.rollouts)


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


@contextlib.contextmanager
def stopping_on_signals():
    """SIGTERM and SIGINT end training where it is, once, with OutOfTime; then what is done is written."""
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}

    def stop(number, _) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        raise OutOfTime(f"stopped by {signal.Signals(number).name}: call again to train the group anew")

    for each in before:
        signal.signal(each, stop)
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def run(args, size: Size, chooser: Chooser, began: float) -> int:
    """Trains, measures and writes result.json; 0, or 1 where something failed and only the finished groups are written."""
    deadline = began + args.seconds
    session, complete, failed = Session(args.output_dir, size, torch.device(args.device), chooser), False, None
    try:
        complete = session.train(deadline - min(FINISH_SECONDS, 0.1 * args.seconds))
    except OutOfTime as stopped:
        say(str(stopped))
    except (RuntimeError, OSError, BrokenExecutor) as error:  # memory, a lost worker, a full disk: the finished groups are worth their tables
        failed = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    result = session.finish(complete, deadline)
    stages = {k: round(v, 1) for k, v in session.distiller.log.seconds.items()}
    peak = torch.cuda.max_memory_allocated() / 2**30 if args.device == "cuda" else None
    result |= {"size": args.size, "device": args.device, "wall_seconds_of_this_call": time.time() - began, "seconds_by_stage_of_this_call": stages, "failed": failed,
               "peak_gib": peak, "count": count(size)}  # fmt: skip
    (args.output_dir / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    say(f"stages {stages}" + (f"; peak {peak:.1f} GiB" if peak else ""))
    if complete:
        shutil.rmtree(session.states)
        say("done")
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="gpu")
    parser.add_argument("--output-dir", type=Path)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=1140, help="of the whole call: no group is begun that would end later, and one that does is given up")
    parser.add_argument("--workers", type=int, help="processes that select; default: the cores less two, at most 12 (0 on a CPU device)")
    parser.add_argument("--group", type=int, help="runs that share the device; fewer take less memory")
    parser.add_argument("--rollouts", type=int, help="of every run")
    parser.add_argument("--teacher-steps", type=int, help="of the teacher's pretraining")
    parser.add_argument("--student-stop-at", type=float, help="share of validation problems at which the student's pretraining ends")
    parser.add_argument("--count", action="store_true", help="print what would run, and stop")
    args = parser.parse_args(argv)
    size, began = sized(args), time.time()
    if args.count:
        print(json.dumps(count(size), indent=1))
        return 0
    if args.output_dir is None:
        parser.error("--output-dir: expected a directory")
    workers = args.workers if args.workers is not None else 0 if args.device == "cpu" else max(1, min(12, len(os.sched_getaffinity(0)) - 2))
    import_transformers().utils.logging.disable_progress_bar()
    with Chooser(workers, size.group, size.prompts * size.response, size.k) as chooser, stopping_on_signals():  # workers before CUDA starts
        try:
            return run(args, fitted(size, args.output_dir) if args.device == "cuda" else size, chooser, began)
        except OutOfTime as stopped:
            say(f"{stopped}; the models were not trained yet")
            return 0
        except TaOpdError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2


if __name__ == "__main__":
    sys.exit(main())
