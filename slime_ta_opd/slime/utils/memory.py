"""Memory of this machine: what is left of it, and how what replies took and freed goes back to the system (allocators would keep it,
between arrays that stay)."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

_CGROUPS = (  # limit, use, and its part that is cached files, of a container: version 2, version 1
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)
_ARENAS, _OURS = "MALLOC_ARENA_MAX", "SLIME_ONE_ARENA"


def one_arena() -> dict[str, str]:
    """Environment for a process that keeps the arrays of a rollout: one heap of glibc for all its threads.

    With a heap for each, those that parse leave gaps in all of them: 314 bytes resident a kept token where 285 are in use, against 296
    with one. {} where the user has set MALLOC_ARENA_MAX. Such a process's children inherit it: `own_arenas`.
    """
    return {} if _ARENAS in os.environ else {_ARENAS: "1", _OURS: "1"}


def own_arenas(env: dict[str, str]) -> None:
    """Takes out of `env` what `one_arena` has put there: a server computes in many threads."""
    if env.pop(_OURS, None):
        env.pop(_ARENAS, None)


@contextlib.contextmanager
def returned_after() -> Iterator[None]:
    """For work that takes much memory and keeps little of it, such as a rollout whose replies become arrays.

    Inside, Arrow allocates from the C library, whose freed memory can be returned, and not from a pool that keeps a copy for each
    thread. At the end the C library returns what is free (glibc; elsewhere nothing happens). Bytes resident at most: the arrays that
    are kept, and what the allocators round up.
    """
    try:
        import pyarrow as pa
    except ImportError:
        pa = None
    pool = pa.default_memory_pool() if pa is not None else None
    if pool is not None:
        pa.set_memory_pool(pa.system_memory_pool())
    try:
        yield
    finally:
        if pool is not None:
            pa.set_memory_pool(pool)
        return_unused()


def return_unused() -> None:
    """Has the C library return what is free, down to single pages (milliseconds)."""
    with contextlib.suppress(AttributeError, OSError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def available(cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that a process here can still take: of the machine, or of its container where that leaves less."""
    import psutil

    left = [psutil.virtual_memory().available]
    for limit, use, stat, cached in _CGROUPS:
        with contextlib.suppress(OSError, ValueError):  # not this version; "max" is no limit
            files = dict(line.split() for line in (cgroups / stat).read_text().splitlines())
            left.append(int((cgroups / limit).read_text()) - int((cgroups / use).read_text()) + int(files.get(cached, 0)))
    return max(min(left), 0)
