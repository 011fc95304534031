"""What a suite remembers between calls: which step of which row is done, and who works in the directory now."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from ta_opd.errors import ConfigError, DataError

DONE, FAILED, INTERRUPTED, RUNNING, PENDING = "done", "failed", "interrupted", "running", "pending"


def write_json(path: Path, value: Any) -> None:
    """Writes the whole file or nothing."""
    partial = path.with_name(path.name + f".{os.getpid()}.partial")
    partial.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
    os.replace(partial, path)


def fingerprint(words: Sequence[str]) -> str:
    """16 hex digits of a command, to notice that a finished step was made with other settings."""
    return hashlib.sha256("\0".join(words).encode()).hexdigest()[:16]


def stamp(path: Path) -> str:
    """Changes when the file, or a file directly in the folder, does."""
    if path.is_dir():
        return f"{path}[" + ";".join(stamp(p) for p in sorted(path.iterdir()) if p.is_file()) + "]"
    return f"{path}:{path.stat().st_size}:{path.stat().st_mtime_ns}" if path.exists() else f"{path}:absent"


PATIENCE_SECONDS = 120.0  # for what a killed suite had started to stop its servers


@contextlib.contextmanager
def directory_lock(
    directory: Path, patience: float = PATIENCE_SECONDS, *, name: str = "suite.lock", elsewhere: str = "another TAG or OUTPUT_ROOT"
) -> Iterator[int]:
    """Holds `directory` for this process; gives the descriptor to hand to the commands that work in it.

    The kernel drops the lock with the last process that holds it, so a killed suite leaves nothing to clean up, and a command of it that
    is still stopping keeps the next suite waiting, at most `patience` seconds. Raises ConfigError when a live suite holds
    the directory. name: of the lock's file; elsewhere: what a user changes to work beside the holder.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / name, "a+") as file:
        _take(file, directory, patience, elsewhere)
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        file.flush()
        yield file.fileno()


def _take(file: TextIO, directory: Path, patience: float, elsewhere: str) -> None:
    deadline = time.monotonic() + patience
    waiting = False
    while True:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        file.seek(0)
        holder = file.read().strip() or "another process"
        if not _is_gone(holder) or time.monotonic() > deadline:
            what = f"what {holder} started and left" if _is_gone(holder) else holder
            raise ConfigError(f"{directory} is in use by {what}; wait for it, or choose {elsewhere}")
        if not waiting:
            print(f"waiting for what {holder} started to stop", flush=True)
            waiting = True
        time.sleep(0.2)


def _is_gone(holder: str) -> bool:
    """Whether `holder` names a process of this host that has ended."""
    found = re.fullmatch(r"process (\d+) on (\S+) since .*", holder)
    if not found or found[2] != socket.gethostname():
        return False
    try:
        os.kill(int(found[1]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # another user's
    return False


def _checked(rows: Any) -> dict[str, dict[str, dict[str, Any]]]:
    """`rows` when it has the form of Memory.rows. Raises ValueError."""
    steps = [step for row in rows.values() if isinstance(row, dict) for step in row.values()] if isinstance(rows, dict) else None
    if steps is None or len(rows) > len([r for r in rows.values() if isinstance(r, dict)]) or not all(isinstance(s, dict) and "status" in s for s in steps):
        raise ValueError(f"something else: {json.dumps(rows)[:80]}")
    return rows


class Memory:
    """State of all steps of a suite, one JSON file: {row: {step: {status, fingerprint, seconds, returncode, ...}}}."""

    def __init__(self, path: Path):
        """Raises DataError when the file is there and unreadable."""
        self.path = path
        self.rows: dict[str, dict[str, dict[str, Any]]] = {}
        if path.exists():
            try:
                self.rows = _checked(json.loads(path.read_text()))
            except ValueError as error:
                raise DataError(f"{path}: expected the JSON state of a suite, got {error}; move the file away to begin anew") from None
        for steps in self.rows.values():
            for step in steps.values():
                if step["status"] == RUNNING:  # we hold the lock, so whoever ran it is gone
                    step["status"] = INTERRUPTED

    def get(self, row: str, step: str) -> dict[str, Any]:
        return self.rows.get(row, {}).get(step, {"status": PENDING})

    def set(self, row: str, step: str, **values: Any) -> None:
        """Replaces the record of one step and saves the file."""
        self.rows.setdefault(row, {})[step] = values
        self.save()

    def forget(self, row: str) -> None:
        self.rows.pop(row, None)
        self.save()

    def status(self, row: str, expected: Sequence[str]) -> str:
        """Status of a row: that of the first of its `expected` steps that is not done."""
        return next((st for st in (self.get(row, name)["status"] for name in expected) if st != DONE), DONE)

    def seconds(self, row: str) -> float:
        return sum(s.get("seconds") or 0.0 for s in self.rows.get(row, {}).values())

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.rows)
