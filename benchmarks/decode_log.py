"""Seconds of single decoding steps, read from what an SGLang server logs while it samples.

A server writes every --decode-log-interval steps how many requests run, how many positions its cache holds for them, and the
tokens it made a second since the last such line. One run of equally long responses is thus a whole curve of seconds over cached positions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

INTERVAL = 20
FLAGS = ("--decode-log-interval", str(INTERVAL))
_LINE = re.compile(r"Decode batch.*?#running-req: (\d+),.*?#token: (\d+),.*?gen throughput \(token/s\): ([\d.]+), #queue-req: (\d+)")


def step_seconds(lines: Iterable[str]) -> list[list[float]]:
    """[running requests, positions in the cache in the middle of an interval, seconds a step] of every steady interval.

    An interval is steady when as many requests run at its end as at the end of the one before and none waits: it then holds no prefill,
    no pause between two runs and no request that ended.
    """
    found, before = [], 0
    for line in lines:
        match = _LINE.search(line)
        if match is None:
            if "Prefill batch" in line:
                before = 0  # the interval that goes on now holds this prefill
            continue
        running, cached, rate, waiting = int(match[1]), int(match[2]), float(match[3]), int(match[4])
        if running == before and not waiting and rate > 0:
            found.append([running, cached - running * INTERVAL / 2, running / rate])
        before = running
    return found


def size(path: Path) -> int:
    """Bytes of a log, where the next run's lines will begin."""
    return path.stat().st_size if path.is_file() else 0


def read(path: Path, begin: int) -> list[list[float]]:
    """`step_seconds` of what was written since the log had `begin` bytes."""
    with path.open("rb") as file:
        file.seek(begin)
        return step_seconds(file.read().decode("utf-8", "replace").splitlines())
