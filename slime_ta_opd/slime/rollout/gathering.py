"""Finished responses wait for one another (--teacher-batch-tokens) where the teacher shares its device with the student.

There every scored token takes time from sampling, and one response of 1,280 tokens alone is scored at two thirds of the rate of a full
batch (H200, 4B: 43,000 tokens a second by the clock against 63,000). A device of its own has nothing to save.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

LONGEST_WAIT = 1.0  # seconds


class Gathering:
    """Lets responses through in batches of at least `tokens` (0: at once), of any size once nothing is sampled any more.

    Belongs to one event loop. Nobody waits longer than `wait` seconds.
    """

    def __init__(self, tokens: int, wait: float = LONGEST_WAIT):
        self.tokens, self.wait = tokens, wait
        self._sampling = self._held = 0
        self._gate: asyncio.Event | None = None
        self._timer: asyncio.TimerHandle | None = None

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Around the sampling of one response; the end of the last one lets everybody through."""
        self._sampling += 1
        try:
            yield
        finally:
            self._sampling -= 1
            if not self._sampling:
                self._open()

    async def enter(self, tokens: int) -> None:
        """Returns when the batch that this response of `tokens` belongs to is to be scored."""
        self._held += tokens
        if self._held >= self.tokens or not self._sampling:
            self._open()
            return
        if self._gate is None:
            self._gate = asyncio.Event()
            self._timer = asyncio.get_running_loop().call_later(self.wait, self._open)
        await self._gate.wait()

    def _open(self) -> None:
        if self._gate is not None:
            self._timer.cancel()
            self._gate.set()
            self._gate = None
        self._held = 0
