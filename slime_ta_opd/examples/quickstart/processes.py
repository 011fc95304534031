"""The quick start's child processes: two servers for all runs, one train.py after another, and how much memory they take."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
from tqdm import tqdm

from ta_opd.errors import ServiceError

STOP_SECONDS = 45.0


@contextlib.contextmanager
def servers(student: Path, teacher: Path, *, context: int, logs: Path) -> Iterator[tuple[str, str]]:
    """(student URL, teacher URL) of two SGLang servers on the CPU, stopped at the end of the block.

    Raises ServiceError with the end of the log when one does not come up.
    """
    from slime.backends.sglang_utils.server import SGLangServer

    args = Namespace(device="cpu", rollout_max_context_len=context, rollout_seed=42)
    started = [SGLangServer.for_run(args, role, str(path), log_file=logs / f"{role}.log") for role, path in (("student", student), ("teacher", teacher))]
    try:
        for server in started:
            server.start()
        with tqdm(total=len(started), desc="servers", unit="server", dynamic_ncols=True, disable=None) as bar:
            for server in started:
                server.wait_ready(timeout=300, progress=lambda line: bar.refresh())
                bar.update()
        yield started[0].url, started[1].url
    finally:
        for server in started:
            server.stop()


def train(command: Sequence[str], *, log: Path, environment: dict[str, str]) -> None:
    """Runs train.py, its output shown and kept in `log`. An interrupt is left to train.py, which stops what it started.

    Raises ServiceError with the last lines when it fails.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
        try:
            for chunk in iter(lambda: child.stdout.read1(65536), b""):
                file.write(chunk)
                if sys.stdout.isatty():
                    sys.stdout.buffer.write(chunk)
                    sys.stdout.buffer.flush()
            code = child.wait()
        except BaseException:
            _end(child)
            raise
    if code:
        raise ServiceError(f"train.py ended with exit code {code}; the end of {log}:\n{tail(log)}")


def _end(child: subprocess.Popen, patience: tuple[float, float, float] = (STOP_SECONDS, 15.0, 15.0)) -> None:
    """Waits for a child that got the terminal's interrupt too, then asks it to end, and at last kills it: this child only."""
    for ask, seconds in zip((lambda: None, child.terminate, child.kill), patience, strict=True):
        ask()
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            child.wait(seconds)
            return


def tail(log: Path, lines: int = 15) -> str:
    """The last lines of a log; what a progress bar overwrote is left out."""
    text = log.read_bytes()[-16384:].decode("utf-8", "replace")
    return "\n".join("    " + line.rsplit("\r", 1)[-1] for line in text.splitlines()[-lines:])


def environment(threads: int) -> dict[str, str]:
    """Of the training runs: no GPU, no network, `threads` for every maths library."""
    return dict(os.environ) | {
        "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_DEDUP_LOGS": "1", "PYTHONUNBUFFERED": "1",
        "TA_OPD_PROGRESS": "bar" if sys.stdout.isatty() else "lines",  # train.py writes into a pipe, which `train` shows on a terminal
    }  # fmt: skip


class MemoryWatch:
    """Peak memory of this process and everything below it, sampled every two seconds by a thread; shared pages count once."""

    def __init__(self, interval: float = 2.0):
        self.interval, self.peak = interval, 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        root = psutil.Process()
        while not self._stop.wait(self.interval):
            total = 0
            for process in [root, *root.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    total += process.memory_full_info().pss if hasattr(psutil, "LINUX") and psutil.LINUX else process.memory_info().rss
            self.peak = max(self.peak, total)


def say(text: str) -> None:
    """One line with the time of day."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)
