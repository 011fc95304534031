"""Which tokens each run of a group keeps: ta_opd's metrics and selection, in worker processes that share a table with the device's process.

The table lies in a file that is mapped into memory, so that a task is a few numbers, whatever the batch; the file is on no disk but in the
page cache, and needs no /dev/shm. Workers are forked before the device is touched and never touch it. Shapes: R runs, L rows of one run, K.
"""

from __future__ import annotations

import ctypes
import signal
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from ta_opd.metrics import token_metrics
from ta_opd.selection import SelectionConfig, select_tokens
from ta_opd.topk import TopK

SIDES = ("student", "teacher")
MEANS = ("Hs_topk", "KLf_union", "Cmass", "sampled_reverse_kl")


@dataclass(frozen=True)
class Rule:
    """How one run chooses."""

    selector: str
    budget: float
    seed: int
    rollout: int


def choose(rule: Rule, arrays: Mapping[str, np.ndarray], lengths: Sequence[int]) -> tuple[np.ndarray, dict]:
    """(weights [L], means of the batch). arrays: `ids` and `logps` [L, K], `target` and `logp` [L] of each side, as "student ids"."""
    student, teacher = (TopK(arrays[f"{side} ids"], arrays[f"{side} logps"]) for side in SIDES)
    lengths_N, sampled = np.asarray(lengths), arrays["student target"]
    metrics = token_metrics(student, teacher, sampled_ids=sampled, student_logprobs=arrays["student logp"], teacher_logprobs=arrays["teacher logp"],
                            response_lengths=lengths_N)  # fmt: skip
    config = SelectionConfig(mask=rule.selector, ratio=rule.budget, seed=rule.seed)
    valid = np.ones(len(sampled), bool)
    found = select_tokens(metrics, valid, lengths_N, config, rollout_id=rule.rollout, student=student, teacher=teacher, sampled_ids=sampled)
    means = {name: float(np.mean(metrics[name])) for name in MEANS}
    kept = {f"{name}_kept": float(np.mean(metrics[name][found.keep])) for name in ("Cmass", "KLf_union", "sampled_reverse_kl")} if found.keep.any() else {}
    return found.weights, {**means, **kept, "Cmass_sd": float(np.std(metrics["Cmass"])), "tokens": len(valid), "kept": int(found.keep.sum())}


class Table:
    """One row of arrays a run, each [L, ...], in a file."""

    def __init__(self, path: str, runs: int, rows: int, k: int):
        self.key = (path, runs, rows, k)
        shapes = {"ids": (np.int32, (rows, k)), "logps": (np.float32, (rows, k)), "target": (np.int32, (rows,)), "logp": (np.float32, (rows,))}
        kind = np.dtype([(f"{side} {name}", *shape) for side in SIDES for name, shape in shapes.items()])
        if not Path(path).is_file():
            with open(path, "wb") as file:
                file.truncate(runs * kind.itemsize)
        self.rows = np.memmap(path, kind, "r+", shape=(runs,))

    def put(self, run: int, side: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Arrays [n, L', ...] of the runs from `run` on."""
        for name, values in arrays.items():
            self.rows[f"{side} {name}"][run : run + len(values), : values.shape[1]] = values

    def of(self, run: int, count: int) -> dict[str, np.ndarray]:
        return {name: np.asarray(self.rows[name][run, :count]) for name in self.rows.dtype.names}


_table = lru_cache(maxsize=1)(Table)


def _work(key: tuple, run: int, rule: Rule, lengths: list[int]) -> tuple[np.ndarray, dict]:
    return choose(rule, _table(*key).of(run, sum(lengths)), lengths)


def _start_worker() -> None:
    """A worker leaves signals to its parent and ends with it."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _ready() -> None:
    """A task that makes the pool fork."""


class Chooser:
    """workers: processes, forked at once, so make it before CUDA starts; 0: everything here, when it is asked for. Close it (or use `with`)."""

    def __init__(self, workers: int, runs: int, rows: int, k: int):
        self._folder = tempfile.TemporaryDirectory(prefix="behaviour-")
        self._table = Table(str(Path(self._folder.name) / "table"), runs, rows, k)
        self._pool = ProcessPoolExecutor(workers, mp_context=get_context("fork"), initializer=_start_worker) if workers else None
        if self._pool is not None:
            self._pool.submit(_ready).result()

    def put(self, run: int, side: str, arrays: Mapping[str, np.ndarray]) -> None:
        self._table.put(run, side, arrays)

    def submit(self, run: int, rule: Rule, lengths: list[int]) -> Future:
        """The choice of a run whose arrays of both sides have been put."""
        if self._pool is not None:
            return self._pool.submit(_work, self._table.key, run, rule, lengths)
        done: Future = Future()
        done.set_result(choose(rule, self._table.of(run, sum(lengths)), lengths))
        return done

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        del self._table
        self._folder.cleanup()

    def __enter__(self) -> Chooser:
        return self

    def __exit__(self, *_) -> None:
        self.close()
