"""What a run says on standard output: what starts, how far it is and for how long yet, and at the end where everything lies.

On a terminal the rollouts are a bar. Elsewhere (Slurm, a file, a pipe) they are lines with their end in sight, since a bar would
fill one endless line of a log. TA_OPD_PROGRESS=bar or =lines decides where the guess is wrong.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from slime.utils.misc import human_seconds
from ta_opd.errors import ConfigError

CHOICE = "TA_OPD_PROGRESS"
SHOWN = {"kl": "rollout/reverse_kl_valid", "kept": "rollout/keep_ratio", "len": "rollout/response_length", "loss": "train/loss"}
PHASES = ("generate", "train")
REPORT = Path(__file__).resolve().parents[3] / "tools" / "build_report.py"
EVERY = 10.0  # seconds between two lines, where steps are shorter


def wants_bar(stream: TextIO) -> bool:
    """Whether `stream` shows a bar well. A terminal of no columns (a container without a size) does not. ConfigError for an unknown choice."""
    choice = os.environ.get(CHOICE, "")
    if choice not in ("", "bar", "lines"):
        raise ConfigError(f"{CHOICE}: expected bar, lines or nothing, got {choice!r}")
    if choice:
        return choice == "bar"
    try:
        return stream.isatty() and os.get_terminal_size(stream.fileno()).columns > 0
    except OSError:
        return False


def say(text: str) -> None:
    """One line at once, above a bar where there is one."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def tell_start(args, layout) -> None:
    """What is being started, and where one can watch it: minutes may pass before the first rollout."""
    where = Path(args.output_dir).resolve()
    teachers = sum(len(replicas) for replicas in layout.teachers.values())
    parts = [(len(layout.trainer), "trainer rank"), (len(layout.engines), "student engine"), (teachers, "teacher server")]
    words = ", ".join(f"{n} {what}{'s' if n > 1 else ''}" for n, what in parts if n)
    say(f"{args.run_name}: {args.num_rollout} rollouts, everything goes to {where}")
    say(f"starting {words}" + (f"; servers write to {where / 'logs'}" if layout.engines or teachers else ""))


def tell_resume(args, start: int) -> None:
    """Which part of the run is done already; nothing for one that starts at its beginning."""
    if start > 0:
        say(f"{args.run_name}: going on from {args.load or 'the rollout asked for'}: {start} of {args.num_rollout} rollouts are done")


def tell_end(args, directory: Path, rollouts: int, seconds: float) -> None:
    """The last lines of a run: how long it took, where everything is, and what makes a page of it."""
    where = directory.resolve()
    say(f"{args.run_name}: finished, {rollouts} rollouts in {human_seconds(seconds)}; everything is in {where}")
    if args.debug_rollout_only:
        return
    for what, path in (("the trained model", args.save_hf), ("checkpoints", args.save)):
        if path and Path(path).exists() and (what != "checkpoints" or where not in (Path(path).resolve(), *Path(path).resolve().parents)):
            say(f"{what}: {Path(path).resolve()}")
    if REPORT.is_file():
        say(f"a page with pictures: python {REPORT} {where}")


class RolloutProgress:
    """Iterates over rollout ids from `start` to `total`; `step` tells what the one that just ended gave."""

    def __init__(self, name: str, start: int, total: int, stream: TextIO | None = None, clock=time.monotonic):
        self.name, self.start, self.total, self.clock = name, start, total, clock
        self.stream = stream or sys.stdout
        self.bar = None
        if wants_bar(self.stream):
            self.bar = tqdm(total=total, initial=start, desc=name, unit="step", dynamic_ncols=True, file=self.stream)
        self.began = self.told = clock()
        self.first: float | None = None  # when the first rollout had ended: it warms up and says little about the others

    def __iter__(self) -> Iterator[int]:
        yield from range(self.start, self.total)

    def step(self, rollout_id: int, metrics: dict[str, Any], seconds: dict[str, float]) -> None:
        """Moves the bar, or prints a line: of the first and last rollout, and of those that end EVERY seconds after the last line."""
        shown = {k: f"{metrics[m]:.3g}" for k, m in SHOWN.items() if m in metrics}
        if self.bar is not None:
            self.bar.set_postfix(shown, refresh=False)
            self.bar.update()
            return
        now, done = self.clock(), rollout_id + 1
        left = self._left(now, rollout_id)
        self.first = self.first or now
        if now - self.told < EVERY and rollout_id != self.start and done < self.total:
            return
        self.told = now
        phases = ", ".join(f"{name} {seconds[name]:.1f}" for name in PHASES if seconds.get(name))
        took = f"{seconds.get('total', 0.0):.1f} s" + (f" ({phases})" if phases else "")
        values = " ".join(f"{k}={v}" for k, v in shown.items())
        ahead = f", {human_seconds(left)} left" if left else ""
        print(f"{self.name}: rollout {done} of {self.total}, {values}, {took}{ahead}", file=self.stream, flush=True)

    def _left(self, now: float, rollout_id: int) -> float:
        """Seconds that the other rollouts will take, by the mean of those after the first."""
        after = rollout_id - self.start
        mean = (now - self.first) / after if self.first and after else now - self.began
        return mean * (self.total - 1 - rollout_id)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
