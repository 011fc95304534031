"""The servers behind one client: which to ask next, and which to leave alone for a while."""

from __future__ import annotations

import time
from dataclasses import dataclass

_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 15.0
# Requests of one prompt stay together while their replica has at most this many more in flight than another one has
_MORE_SHARE, _MORE = 0.5, 16
_MOST_PROMPTS = 100_000


@dataclass
class Replica:
    """One server. down_until: monotonic time before which it is not asked; stale: it serves former weights."""

    url: str
    in_flight: int = 0
    failures: int = 0
    down_until: float = 0.0
    stale: bool = False

    def failed(self) -> None:
        now = time.monotonic()
        if self.down_until > now:
            return  # one event ends all requests in flight; it counts once
        self.failures += 1
        self.down_until = now + min(_FIRST_PAUSE * 2 ** (self.failures - 1), _LONGEST_PAUSE)

    def answered(self) -> None:
        self.failures, self.down_until = 0, 0.0


class Replicas:
    """A set of replicas of one model."""

    def __init__(self, urls: list[str]):
        self.all = [Replica(url) for url in urls]
        self._turn = 0
        self._homes: dict[int, Replica] = {}  # where a prompt was sent: that replica has it in its cache

    def pick(self, avoid: Replica | None = None, prefer: str | None = None, key: int | None = None) -> Replica | None:
        """The healthy replica with the fewest requests in flight (taking turns among equals); None when all are away.

        `prefer` is taken if it is healthy; `avoid` only if nothing else is. Requests of one `key` go to one replica as long as
        that does not leave the others idle.
        """
        now = time.monotonic()
        healthy = [r for r in self.all if r.down_until <= now and not r.stale]
        if prefer is not None:
            for replica in healthy:
                if replica.url == prefer and replica is not avoid:
                    return replica
        choice = [r for r in healthy if r is not avoid] or healthy
        if not choice:
            return None
        self._turn += 1
        start = self._turn % len(choice)
        least = min(choice[start:] + choice[:start], key=lambda r: r.in_flight)
        if key is None:
            return least
        home = self._homes.get(key)
        if any(r is home for r in choice) and home.in_flight <= (1 + _MORE_SHARE) * least.in_flight + _MORE:
            return home
        if len(self._homes) >= _MOST_PROMPTS:
            self._homes.clear()
        self._homes[key] = least
        return least

    def forget_prompts(self) -> None:
        """The replicas' caches are empty."""
        self._homes.clear()

    def next_try(self) -> float:
        """Seconds until some replica may be asked again."""
        waits = [r.down_until - time.monotonic() for r in self.all if not r.stale]
        return max(0.05, min(waits, default=0.5))
