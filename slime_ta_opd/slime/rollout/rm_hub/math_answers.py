"""Checks of mathematical answers through math-verify: equal in value, however they are written.

math-verify works in a child process (math_worker.py), since an answer can be an expression that takes for ever.
"""

from __future__ import annotations

import atexit
import json
import logging
import select
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from ta_opd.errors import ServiceError

logger = logging.getLogger(__name__)
_TAIL = 4000  # characters; the answer stands at the end
_CPU_SECONDS = 5.0  # processor time of one answer
_START_SECONDS, _WAIT_SECONDS = 300.0, 60.0


def math_match(response: str, label: str | None, metadata: dict[str, Any] | None = None) -> float:
    """1.0 where the last answer of the response (boxed, or the last expression) equals the label in value; else 0.0.

    A response that cannot be parsed, or not compared within _CPU_SECONDS of processor time, is wrong. Of a long response only
    the end is read. ServiceError where math-verify cannot be started.
    """
    if label is None or not response.strip():
        return 0.0
    boxed = response.rfind("\\boxed")
    with _lock:
        return _child.check(response[boxed : boxed + _TAIL] if boxed >= 0 else response[-_TAIL:], label)


class _Child:
    """The process, started when it is first needed and after each end. It ends by itself when this process does."""

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None

    def check(self, answer: str, label: str) -> float:
        if self.process is None or self.process.poll() is not None:
            self._start()
        try:
            self.process.stdin.write(json.dumps([answer, label]).encode() + b"\n")
            self.process.stdin.flush()
            reply = self._line(_WAIT_SECONDS)
        except OSError:
            reply = b""
        if not reply:
            logger.info("math: %r cannot be compared with %r in reasonable time or memory; counted as wrong", answer[-80:], label[:80])
            self.end()
        return float(reply == b"1\n")

    def _start(self) -> None:
        self.end()
        script = str(Path(__file__).with_name("math_worker.py"))
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([sys.executable, "-P", script, str(_CPU_SECONDS)], stdin=pipe, stdout=pipe, stderr=pipe)
        if self._line(_START_SECONDS) != b"ready\n":
            self.process.kill()
            said = self.process.stderr.read().decode("utf-8", "replace").strip().splitlines()
            self.end()
            raise ServiceError(f"math answers: math-verify did not start ({said[-1] if said else 'it said nothing'}); is it installed?")

    def _line(self, seconds: float) -> bytes:
        """The child's next line; nothing where it ended, or does not answer in time."""
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        return self.process.stdout.readline() if ready else b""

    def end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


_child, _lock = _Child(), threading.Lock()
atexit.register(_child.end)
