"""Seconds by phase of a step, and the same as a Chrome trace."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import orjson


class Timer:
    """Adds up wall seconds by name; `take()` returns and clears them. Spans are kept for the trace when asked."""

    def __init__(self, process: str = "driver", keep_spans: bool = False):
        self.process, self.keep_spans = process, keep_spans
        self.seconds: dict[str, float] = {}
        self.spans: list[dict] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        begin = time.time()
        try:
            yield
        finally:
            self.add(name, begin, time.time())

    def add(self, name: str, begin: float, end: float) -> None:
        """Records a span measured elsewhere (begin and end in seconds since the epoch)."""
        self.seconds[name] = self.seconds.get(name, 0.0) + end - begin
        if self.keep_spans:
            self.spans.append({"name": name, "ph": "X", "pid": 0, "tid": self.process, "ts": begin * 1e6, "dur": (end - begin) * 1e6})

    def take(self) -> dict[str, float]:
        out, self.seconds = self.seconds, {}
        return out

    def take_spans(self) -> list[dict]:
        out, self.spans = self.spans, []
        return out


def write_trace(spans: list[dict], path: str | Path) -> None:
    """A file for chrome://tracing or Perfetto; one row a process."""
    rows = {name: i for i, name in enumerate(dict.fromkeys(s["tid"] for s in spans))}
    events = [{"name": "thread_name", "ph": "M", "pid": 0, "tid": i, "args": {"name": n}} for n, i in rows.items()]
    events += [{**s, "tid": rows[s["tid"]]} for s in spans]
    Path(path).write_bytes(orjson.dumps({"traceEvents": events}))
