"""Which tokens to teach, measured: every selector at several budgets, two losses, three seeds, the better of two learning rates.

    python benchmarks/gpu/behaviour.py --size gpu --output-dir outputs/behaviour --seconds 560     # again, until it says it is done
    python benchmarks/gpu/behaviour.py --size mid --device cpu --output-dir outputs/behaviour-mid  # minutes, two cores
    python benchmarks/gpu/behaviour.py --size gpu --count                                          # what would run, and what it costs

A teacher and a student are trained from scratch on generated multi-step reasoning (examples/reasoning), each in its own writer's words.
Then groups of runs of on-policy distillation share the device (behaviour/distil.py); every run samples equally many responses. A
call that is stopped goes on where it ended. The first seed runs at both rates; the others at the one that was better for the arm. Writes runs.csv, arms.csv (at the better learning rate, 95 % intervals over seeds),
arms.png, regression*.csv, rollouts.parquet, report.html and result.json.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if __package__ in (None, ""):
    sys.path[:0] = [str(ROOT), str(ROOT / "slime_ta_opd")]

import pandas as pd  # noqa: E402
import torch  # noqa: E402

from benchmarks.behaviour import outcome, plan  # noqa: E402
from benchmarks.behaviour.distil import Distiller  # noqa: E402
from benchmarks.behaviour.pretrain import models, problem_sets  # noqa: E402
from benchmarks.behaviour.sizes import SIZES, Size  # noqa: E402
from benchmarks.behaviour.stacked import Stack  # noqa: E402
from ta_opd.errors import ConfigError, TaOpdError  # noqa: E402
from ta_opd.fixed_context.hf import import_transformers  # noqa: E402


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
    launches = len(groups) * size.rollouts * (size.response * size.student.width.layers * 30 + 3000) * 8e-6
    serial = len(runs) * size.rollouts * 2.5e-3
    return {"selectors": len(plan.selectors(size)), "arms": len(plan.arms(size)), "runs": len(runs), "groups": len(groups), "rollouts": size.rollouts,
            "responses": len(runs) * size.rollouts * size.prompts, "tokens": tokens, "operations": done, "teacher_parameters": teacher, "student_parameters": student,
            "seconds_operations": done / (0.35 * 790e12), "seconds_launches": launches, "seconds_serial": serial}  # fmt: skip


class Session:
    """The output directory: what is finished, and going on from there."""

    def __init__(self, folder: Path, size: Size, device: torch.device, workers: int):
        self.folder, self.size, self.device = folder, size, device
        folder.mkdir(parents=True, exist_ok=True)
        self.teacher, self.student, self.facts = models(size, folder, device, say)
        self.heldout, self.validation = problem_sets(size)
        self.frozen = outcome.Frozen(folder, self.heldout, size, self.teacher, device)
        start = outcome.measure(Stack.copies(self.student, 1, device), [plan.Run(plan.Arm("none", 0.0, ""), 0, 0.0)], self.frozen, self.heldout, self.validation, size)[0]
        self.start = {k: start[k] for k in ("accuracy", "KLf", "KLr", "validation")}
        say(f"teacher {self.facts['teacher']['heldout']:.3f}, initial student {self.start['accuracy']:.3f} of held-out problems; KL {self.start['KLf']:.4f} nats")
        avoid = {p.prompt for p in self.heldout + self.validation}
        self.distiller = Distiller(self.teacher, self.student, size, device, avoid, workers)
        self.parts = folder / "groups"
        self.parts.mkdir(exist_ok=True)
        self._check_same_size()

    def _check_same_size(self) -> None:
        """ConfigError where the folder's groups are of other settings."""
        stamp, own = self.folder / "size.json", json.dumps(asdict(self.size), indent=1, default=str)
        if not stamp.is_file() or not any(self.parts.iterdir()):
            stamp.write_text(own)
        elif stamp.read_text() != own:
            raise ConfigError(f"--output-dir {self.folder}: expected groups of the same settings, its size.json says otherwise; give a new directory")

    def train(self, deadline: float) -> bool:
        """Trains groups until all are done (True) or the next would probably end after `deadline`."""
        self.longest = 0.0
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
            return True
        if time.time() + 1.1 * self.longest > deadline:
            say(f"stopped at the time limit: {number} groups are done; call again to go on")
            return False
        began = time.time()
        self.distiller.log.rows.clear()
        stack = self.distiller.train(runs)
        rows = outcome.measure(stack, runs, self.frozen, self.heldout, self.validation, self.size)
        seconds = time.time() - began
        middle = sorted(self.size.budgets)[len(self.size.budgets) // 2]
        wanted = [run.arm.budget in (1.0, middle) and (run.arm.selector == "full" or run.arm.selector in outcome.REGRESSED and run.seed == self.size.seeds[0])
                  for run in runs]  # fmt: skip
        states = {run.name: stack.state_of(i) for i, run in enumerate(runs) if wanted[i]}
        partial = file.with_suffix(".partial")
        partial.write_bytes(pickle.dumps({"rows": rows, "rollouts": self.distiller.log.rows, "states": states, "seconds": seconds}))
        partial.replace(file)
        self.longest = max(self.longest, seconds)
        best = max(rows, key=lambda r: r["accuracy"])
        say(f"group {number + 1}: {len(runs)} runs in {seconds:.1f} s; best {best['run']} {best['accuracy']:.3f}")
        return True

    def finish(self, complete: bool) -> dict:
        """Tables and pictures of what is done; regression and report when that is all."""
        rows, rollouts, states, seconds = [], [], {}, 0.0
        for file in sorted(self.parts.glob("*.pickle")):
            part = pickle.loads(file.read_bytes())
            rows += part["rows"]
            rollouts += part["rollouts"]
            states |= part["states"]
            seconds += part["seconds"]
        if not rows:
            return {"complete": False, "runs": 0}
        steps = pd.DataFrame(rollouts)
        sums = steps.groupby("run")[["tokens", "kept"]].sum()
        table = pd.DataFrame(rows).merge(sums, left_on="run", right_index=True)
        table.to_csv(self.folder / "runs.csv", index=False, float_format="%.6g")
        steps.to_parquet(self.folder / "rollouts.parquet", index=False)
        best = outcome.better_rate(table)
        arms = outcome.arm_table(best)
        arms.to_csv(self.folder / "arms.csv", index=False, float_format="%.6g")
        outcome.picture(arms, self.start, self.folder / "arms.png")
        tables, page, left_out = {}, None, [] if complete else ["regression and report: made when all groups are done"]
        try:  # a machine for training may lack statsmodels or jinja2: the tables above are worth having all the same
            if complete:
                summary, coefficients, tables = outcome.regressions(self.frozen, states, best, self.device, say)
                summary.to_csv(self.folder / "regression.csv", index=False, float_format="%.6g")
                coefficients.to_csv(self.folder / "regression_coefficients.csv", index=False, float_format="%.6g")
                page = outcome.report(self.folder, best, steps, tables, self.start, self.facts, self.size)
        except ImportError as error:
            left_out.append(f"regression or report: {error}")
            say(f"left out: {left_out[-1]}")
        last = steps[steps["rollout"] == 0]
        result = {"complete": complete, "runs": len(table), "of": plan.number_of_runs(self.size), "models": self.facts, "start": self.start,
                  "compatibility_sd": float(last["Cmass_sd"].mean()), "mean_compatibility": float(last["Cmass"].mean()), "sentences": outcome.sentences(arms),
                  "report": str(page) if page else None, "left_out": left_out, "seconds_training_and_measuring": seconds}  # fmt: skip
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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="gpu")
    parser.add_argument("--output-dir", type=Path)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=1140, help="start no group that would end later than this")
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
    workers = args.workers if args.workers is not None else 0 if args.device == "cpu" else max(1, min(12, (os.cpu_count() or 2) - 2))
    if workers:  # they start afresh and have to find this tree
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "slime_ta_opd"), *filter(None, [os.environ.get("PYTHONPATH")])])
    import_transformers().utils.logging.disable_progress_bar()
    try:
        session = Session(args.output_dir, size, torch.device(args.device), workers)
        try:
            complete = session.train(began + args.seconds)
        finally:
            session.distiller.close()
        result = session.finish(complete)
    except TaOpdError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    stages = {k: round(v, 1) for k, v in session.distiller.log.seconds.items()}
    result |= {"size": args.size, "device": args.device, "wall_seconds_of_this_call": time.time() - began, "seconds_by_stage_of_this_call": stages, "count": count(size)}
    (args.output_dir / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    say(f"stages {stages}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
