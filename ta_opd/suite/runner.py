"""Goes through the table of a suite: skips what is done, runs what is not, and says how each row ended."""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from ta_opd.errors import ConfigError
from ta_opd.suite import memory as mem
from ta_opd.suite import plan
from ta_opd.suite.plan import BASELINE_ROW, Row, Settings, Step
from ta_opd.suite.process import run_logged, stop_requests


@dataclass
class Result:
    """Rows by how they ended: {"done": [...], "skipped": [...], "failed": [...], "interrupted": [...], "pending": [...]}."""

    rows: dict[str, list[str]] = field(default_factory=dict)

    def add(self, how: str, row: str) -> None:
        self.rows.setdefault(how, []).append(row)

    @property
    def exit_code(self) -> int:
        if self.rows.get("interrupted"):
            return 130
        return 1 if self.rows.get("failed") or self.rows.get("pending") else 0


def preview(settings: Settings, rows: Sequence[Row], environment: dict[str, str]) -> dict[str, str]:
    """What run_opd.sh would run for each row, checked by it. Raises ConfigError with its message for the first bad row."""

    def one(row: Row) -> str:
        env = environment | row.env | {"DRY_RUN": "1"}
        done = subprocess.run(plan.launcher(settings), env=env, capture_output=True, text=True)
        if done.returncode:
            raise ConfigError(f"row {row.entry.method}:{row.entry.ratio:g} ({row.seeds.label}):\n{done.stderr.strip()}")
        return done.stdout

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        return dict(zip([r.name for r in rows], pool.map(one, rows), strict=True))


def print_commands(settings: Settings, rows: Sequence[Row], commands: dict[str, str]) -> None:
    """DRY_RUN=1: every command of the suite in order."""
    for step in plan.baseline_steps(settings):
        _print_step(BASELINE_ROW, step)
    for row in rows:
        for step in plan.row_steps(settings, row, ()):
            if step.name == "train":
                print(f"# {row.name}: train\n{commands[row.name].rstrip()}")
            else:
                _print_step(row.name, step)


def _print_step(row: str, step: Step) -> None:
    prefix = [f"{k}={v}" for k, v in step.env.items()]
    words = (["env", *prefix] if prefix else []) + list(step.command)
    print(f"# {row}: {step.name}\n{shlex.join(words)}")


class Suite:
    """One suite directory, held by this process while `run` works."""

    def __init__(self, settings: Settings, environment: dict[str, str], *, force: bool = False, on_error: str = "continue"):
        self.settings, self.environment = settings, environment
        self.force, self.on_error = force, on_error
        self.rows = plan.make_rows(settings, environment)
        self._lock = -1  # descriptor, while `run` works

    def dry_run(self) -> None:
        print_commands(self.settings, self.rows, preview(self.settings, self.rows, self.environment))

    def run(self) -> Result:
        """Runs what is missing. Raises ConfigError before anything starts when a row cannot be run or was begun with other settings."""
        commands = preview(self.settings, self.rows, self.environment)
        identities = {name: plan.identity_of(text) for name, text in commands.items()}
        self._check_ports()
        with mem.directory_lock(self.settings.directory) as self._lock, stop_requests() as stop:
            memory = mem.Memory(self.settings.directory / "suite_state.json")
            if self.force:
                self._set_aside(memory)
            else:
                self._check_settings(memory, identities)
            plan.write_mapping(self.settings)
            return self._run_all(memory, identities, stop)

    def _check_ports(self) -> None:
        """Two rows run one after the other, so only the ports of one row must differ among themselves."""
        for row in self.rows:
            ports = [v for k, v in row.env.items() if k in plan.PORT_VARIABLES]
            if len(set(ports)) < len(ports):
                raise ConfigError(f"ports of {row.entry.method}: expected different ports, got {', '.join(ports)}; space the bases wider")

    def _check_settings(self, memory: mem.Memory, identities: dict[str, tuple[str, ...]]) -> None:
        for row in self.rows:
            record = memory.get(row.name, "train")
            old = record.get("identity")
            if old is not None and tuple(old) != identities[row.name]:
                raise ConfigError(
                    f"{row.name} was {'finished' if record['status'] == mem.DONE else 'begun'} with other settings: "
                    f"{plan.differences(old, identities[row.name])}. FORCE=1 runs it anew (the old directory is kept under "
                    "another name); another TAG keeps both"
                )
        scored = [name for name, steps in memory.rows.items() if "score_after" in steps]
        if not self.settings.skip_eval and (others := plan.other_runs(self.rows, scored)):
            raise ConfigError(
                f"{self.settings.directory} holds the contexts and scores of {others[0]}: expected one student, prompt file, K and response "
                "length in a TAG; another TAG keeps both, FORCE=1 keeps the old scores under another name"
            )

    def _set_aside(self, memory: mem.Memory) -> None:
        stamp = time.strftime("%Y%m%d_%H%M%S")
        for row in self.rows:
            for directory in (row.run_dir, row.eval_dir):
                if directory.exists():
                    directory.rename(directory.with_name(f"{directory.name}.old_{stamp}"))
            memory.forget(row.name)

    def _run_all(self, memory: mem.Memory, identities: dict[str, tuple[str, ...]], stop: list[int]) -> Result:
        result = Result()
        baseline = plan.baseline_steps(self.settings)
        if baseline and self._run_steps(BASELINE_ROW, baseline, memory, stop) not in (mem.DONE, "skipped"):
            result.add("interrupted" if stop else "failed", BASELINE_ROW)
            for row in self.rows:
                result.add("pending", row.name)
            return result
        for number, row in enumerate(self.rows, start=1):
            if stop or (self.on_error == "stop" and result.rows.get("failed")):
                result.add("pending", row.name)
                continue
            label = f"[{number}/{len(self.rows)}] {row.entry.method} {row.entry.ratio:g} {row.seeds.label}"
            steps = plan.row_steps(self.settings, row, identities[row.name])
            result.add(self._run_steps(row.name, steps, memory, stop, label=label, run_dir=row.run_dir), row.name)
        return result

    def _run_steps(self, name: str, steps: Sequence[Step], memory: mem.Memory, stop: list[int], *, label: str = "[baseline]",
                   run_dir: Path | None = None) -> str:  # fmt: skip
        """Ends with `done`, `skipped` (nothing was left to do), `failed` or `interrupted`."""
        ran = False
        for step in steps:
            print_of_step = mem.fingerprint(step.identity or (*step.command, *step.inputs))
            record = memory.get(name, step.name)
            if all(o.exists() for o in step.outputs):
                if step.name == "train" and record["status"] != mem.DONE:  # finished by somebody else, or memory was lost
                    memory.set(name, step.name, status=mem.DONE, identity=list(step.identity), fingerprint=print_of_step)
                    continue
                if record["status"] == mem.DONE and record.get("fingerprint") == print_of_step and not ran:
                    continue
            outcome = self._run_step(name, step, print_of_step, memory, stop, label, run_dir)
            if outcome != mem.DONE:
                return outcome
            ran = True
        return mem.DONE if ran else self._skipped(label)

    @staticmethod
    def _skipped(label: str) -> str:
        print(f"{label}: already done", flush=True)
        return "skipped"

    def _run_step(self, name: str, step: Step, print_of_step: str, memory: mem.Memory, stop: list[int], label: str,
                  run_dir: Path | None) -> str:  # fmt: skip
        prefix = f"{self.settings.tag}_{name}" if name == BASELINE_ROW else name
        log = self.settings.log_dir / (f"{prefix}_driver.log" if step.name == "train" else f"{prefix}_{step.name}.log")
        record = {"fingerprint": print_of_step, "log": str(log)}
        if step.identity:
            record["identity"] = list(step.identity)
        for output in step.outputs:
            output.parent.mkdir(parents=True, exist_ok=True)
        memory.set(name, step.name, status=mem.RUNNING, started=time.time(), **record)
        print(f"{label}: {step.name} (log {log})", flush=True)
        with _progress(f"{label} {step.name}", _rollouts(step), run_dir) as tick:
            outcome = run_logged(step.command, log=log, env=self.environment | {"DRY_RUN": "0"} | step.env, stop=stop, tick=tick, keep=[self._lock])
        missing = [str(o) for o in step.outputs if not o.exists()]
        if outcome.interrupted or (stop and (outcome.returncode or missing)):
            status = mem.INTERRUPTED
        else:
            status = mem.FAILED if outcome.returncode or missing else mem.DONE
        memory.set(name, step.name, status=status, seconds=round(outcome.seconds, 3), returncode=outcome.returncode,
                   ended=time.time(), **record)  # fmt: skip
        if status == mem.FAILED:
            why = f"exit code {outcome.returncode}" if outcome.returncode else f"it did not write {', '.join(missing)}"
            print(f"{label}: {step.name} failed: {why}; the end of {log}:\n{tail(log)}", file=sys.stderr, flush=True)
        else:
            print(f"{label}: {step.name} {status} after {outcome.seconds:.1f} s", flush=True)
        return status


def tail(path: Path, lines: int = 20) -> str:
    """The last lines of a log, indented."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - 16384))
        return "\n".join("    " + line for line in file.read().decode(errors="replace").splitlines()[-lines:])
    return ""


def _rollouts(step: Step) -> int:
    """Rollouts that a training step will make, 0 for other steps."""
    found = next((text for text in step.identity if text.startswith("--num-rollout ")), "")
    return int(found.split()[1]) if found else 0


@contextlib.contextmanager
def _progress(label: str, total: int, run_dir: Path | None):
    """A line that grows on a terminal, counting the rollouts in metrics.jsonl; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    metrics = run_dir / "metrics.jsonl" if run_dir and total else None

    def tick(seconds: float) -> None:
        count = metrics.read_bytes().count(b"\n") if metrics and metrics.exists() else 0
        done = f" {min(count, total)}/{total} rollouts" if total else ""
        print(f"\r\033[K{label}:{done} {seconds:.0f} s", end="", file=sys.stderr, flush=True)

    try:
        yield tick
    finally:
        print("\r\033[K", end="", file=sys.stderr, flush=True)
