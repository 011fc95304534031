"""Runs one command of a suite in a process group of its own: logged, watched, and stopped with everything it started."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

GRACE_SECONDS = 60.0  # what training gets to stop its servers after Ctrl-C
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Outcome:
    """`returncode` of the command, `seconds` it took, and whether we stopped it: on request, or at its time limit."""

    returncode: int
    seconds: float
    interrupted: bool = False
    timed_out: bool = False


class Interrupted(Exception):
    """The user asked the suite to stop."""


@contextlib.contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Collects SIGINT, SIGTERM and SIGHUP in a list instead of raising, so that a child can be stopped in order."""
    seen: list[int] = []
    old = {s: signal.signal(s, lambda number, frame: seen.append(number)) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield seen
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def run_logged(
    command: Sequence[str],
    *,
    log: Path,
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
    stop: Sequence[int] = (),
    tick: Callable[[float], None] | None = None,
    grace: float = GRACE_SECONDS,
    limit: float | None = None,
    keep: Sequence[int] = (),
) -> Outcome:
    """Runs `command` with its output appended to `log`; calls `tick(seconds)` twice a second. `keep`: descriptors that it inherits.

    When `stop` (see stop_requests) is not empty, or after `limit` seconds, the group gets SIGINT, after `grace` seconds SIGTERM, then SIGKILL. The
    child gets SIGTERM by itself when this process dies.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with open(log, "ab") as out:
        out.write(f"\n$ {shlex.join(command)}\n".encode(errors="surrogateescape"))
        out.flush()
        child = subprocess.Popen(
            list(command), stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=env, cwd=cwd,
            start_new_session=True, preexec_fn=_die_with_parent, pass_fds=keep,
        )  # fmt: skip
        try:
            while child.poll() is None and not stop and not (limit and time.monotonic() - started > limit):
                if tick:
                    tick(time.monotonic() - started)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(0.5)
            running = child.poll() is None
            if running:
                _end(child, grace)
        finally:
            _signal_group(child.pid, signal.SIGKILL)  # what the command left behind in its own group
            child.wait()
    return Outcome(child.returncode, time.monotonic() - started, running and bool(stop), running and not stop)


def _die_with_parent() -> None:
    if sys.platform == "linux":  # others have no such call; there a killed suite leaves its command running
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _end(child: subprocess.Popen, grace: float) -> None:
    for number, wait in ((signal.SIGINT, grace), (signal.SIGTERM, min(grace, 15.0))):
        _signal_group(child.pid, number)
        try:
            child.wait(wait)
            return
        except subprocess.TimeoutExpired:
            print(f"still running {wait:.0f} s after {signal.Signals(number).name}", file=sys.stderr)


def _signal_group(pgid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pgid, number)
