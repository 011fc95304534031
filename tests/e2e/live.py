"""A training run that a test watches and hurts: its output, its rows, its processes, and what must hold after its end."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq

from tests.e2e.conftest import BASE, TRAIN

SAMPLES = 16  # of a rollout, by BASE


class LiveRun:
    """train.py (or another script of its folder) in a process of its own, under `folder`: out, checkpoints, dumps."""

    def __init__(self, task, folder: Path, *flags, script="train.py", env=None):
        self.folder, self.dir, self.checkpoints, self.dumps = folder, folder / "out", folder / "checkpoints", folder / "dumps"
        self.file = folder / f"output_{len(list(folder.glob('output_*')))}.txt" if folder.exists() else folder / "output_0.txt"
        folder.mkdir(exist_ok=True)
        words = [sys.executable, str(TRAIN.with_name(script)), "--hf-checkpoint", str(task.student), "--prompt-data", str(task.train),
                 "--output-dir", str(self.dir), "--save", str(self.checkpoints), "--save-debug-rollout-data", str(self.dumps),
                 *BASE, *flags]  # fmt: skip
        if (self.checkpoints / "latest_checkpointed_iteration.txt").exists():
            words += ["--load", str(self.checkpoints)]
        with self.file.open("w") as output:
            self.process = subprocess.Popen(words, cwd=TRAIN.parent, stdout=output, stderr=output, env={**os.environ, "OMP_NUM_THREADS": "1"} | (env or {}))
        self.seen: dict[int, psutil.Process] = {}

    @property
    def output(self) -> str:
        return self.file.read_text(errors="replace")

    def rows(self) -> list[dict]:
        file = self.dir / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []

    def look(self) -> list[psutil.Process]:
        """The processes that the run has now; remembered for `left`."""
        try:
            found = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        self.seen.update((p.pid, p) for p in found if p not in self.seen.values())
        return found

    def named(self, *words: str) -> list[psutil.Process]:
        """Processes of the run whose title or command line holds all words."""
        found = []
        for process in self.look():
            try:
                line = " ".join(process.cmdline())
            except psutil.Error:
                continue
            if all(word in line for word in words):
                found.append(process)
        return found

    def wait(self, reached, what: str, seconds: float = 240):
        """The first true value of reached(). Fails with the run's output where it ends or takes too long."""
        deadline = time.monotonic() + seconds
        while not (value := reached()):
            self.look()
            assert self.process.poll() is None, f"ended with {self.process.returncode} before {what}:\n{self.output[-4000:]}"
            assert time.monotonic() < deadline, f"no {what} within {seconds} s:\n{self.output[-4000:]}"
            time.sleep(0.05)
        return value

    def wait_rows(self, count: int):
        return self.wait(lambda: len(self.rows()) >= count, f"{count} rows")

    def wait_said(self, pattern: str, times: int = 1):
        return self.wait(lambda: len(re.findall(pattern, self.output)) >= times, f"{pattern!r} {times} times")

    def wait_sampling(self, log: str = "student_0.log"):
        """Returns at the beginning of a rollout's sampling, by the engine's own log."""
        file = self.dir / "logs" / log
        before = file.read_text(errors="replace").count("Prefill batch")
        self.wait(lambda: file.read_text(errors="replace").count("Prefill batch") > before, f"a new batch in {log}")

    def ends(self, code: int, seconds: float = 120) -> str:
        """Waits for the run's end, checks its exit code and that nothing of it is left; its output."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < deadline:
            self.look()
            time.sleep(0.1)
        assert self.process.poll() == code, f"exit code {self.process.poll()}, expected {code}:\n{self.output[-4000:]}"
        left = self.left()
        assert not left, f"left behind: {left}"
        return self.output

    def left(self, seconds: float = 20) -> list[str]:
        """Processes of the run that are still there after `seconds`, and files of its servers."""
        _, alive = psutil.wait_procs(list(self.seen.values()), timeout=seconds)
        there = [f"{p.pid} {' '.join(p.cmdline())[:120]}" for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        return there + [str(folder) for folder in Path("/tmp").glob("sgl-*") if int(folder.name.split("-")[1]) in self.seen]

    def stop(self) -> None:
        """Whatever happened in the test: no process stays."""
        self.look()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for process in self.seen.values():
            try:
                process.kill()
            except psutil.Error:
                pass

    def check_samples(self, rollouts: int) -> None:
        """Every rollout's row is there once, and every sample was trained exactly once, in its own rollout."""
        assert [row["rollout_id"] for row in self.rows()] == list(range(rollouts))
        for rollout_id in range(rollouts):
            indices = sorted(pq.read_table(self.dumps / f"rollout_{rollout_id:06d}.parquet").column("sample_index").to_pylist())
            assert indices == list(range(SAMPLES * rollout_id, SAMPLES * (rollout_id + 1))), rollout_id
