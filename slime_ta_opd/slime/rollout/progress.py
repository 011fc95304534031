"""Progress of something that takes longer than two seconds: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

_QUIET_SECONDS, _LINE_SECONDS = 2.0, 15.0


class Progress:
    """`with Progress("rollout 3", 64) as p: p.update()`; prints nothing for what is done within two seconds."""

    def __init__(self, text: str, total: int, unit: str = "sample"):
        self.text, self.total, self.done = text, total, 0
        self.begin = self.told = time.monotonic()
        terminal = sys.stderr.isatty()
        self.bar = tqdm(total=total, desc=text, unit=unit, delay=_QUIET_SECONDS, leave=False) if terminal else None

    def update(self, n: int = 1) -> None:
        self.done += n
        if self.bar is not None:
            self.bar.update(n)
            return
        now = time.monotonic()
        if now - self.told >= _LINE_SECONDS:
            self.told = now
            print(f"{self.text}: {self.done} of {self.total} after {now - self.begin:.0f} s", file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc) -> None:
        if self.bar is not None:
            self.bar.close()
