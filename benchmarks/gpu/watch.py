"""Watches the machine beside a run: utilisation and memory of every GPU, or of this process's children on a CPU."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from dataclasses import dataclass, field

import psutil


@dataclass
class Watch:
    """Context; one sample every `interval` seconds: (time, [share of the last moment with a kernel running], [GiB held]).

    gpus: ids to watch, of all that the machine has; empty for this process's children.
    """

    gpus: list[str] = field(default_factory=list)
    interval: float = 0.25
    samples: list[tuple[float, list[float], list[float]]] = field(default_factory=list)

    def __enter__(self) -> Watch:
        self._stop = threading.Event()
        work = self._gpus if self.gpus and shutil.which("nvidia-smi") else self._children
        self._thread = threading.Thread(target=work, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join(5)

    def _gpus(self) -> None:
        words = ["nvidia-smi", f"--id={','.join(self.gpus)}", "--query-gpu=index,utilization.gpu,memory.used", "--format=csv,noheader,nounits", f"--loop-ms={int(self.interval * 1e3)}"]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        threading.Thread(target=lambda: (self._stop.wait(), process.terminate()), daemon=True).start()
        row: dict[int, tuple[float, float]] = {}
        for line in process.stdout:
            try:
                index, busy, used = (float(x) for x in line.split(","))
            except ValueError:
                continue
            if int(index) in row:
                self._add(row)
                row = {}
            row[int(index)] = (busy / 100, used / 1024)
        process.wait()

    def _add(self, row: dict[int, tuple[float, float]]) -> None:
        order = sorted(row)
        self.samples.append((time.time(), [row[i][0] for i in order], [row[i][1] for i in order]))

    def _children(self) -> None:
        while not self._stop.wait(self.interval):
            held = 0
            for child in psutil.Process().children(recursive=True):
                try:
                    held += child.memory_info().rss
                except psutil.Error:
                    continue
            self.samples.append((time.time(), [], [held / 2**30]))

    def between(self, begin: float, end: float) -> dict:
        """busy: mean share of time with a kernel running, a GPU (empty on CPU); peak and last: GiB held."""
        inside = [s for s in self.samples if begin <= s[0] <= end]
        if not inside:
            return {"samples": 0, "busy": [], "peak_gib": [], "last_gib": []}
        busy = [sum(column) / len(inside) for column in zip(*(s[1] for s in inside), strict=True)]
        peak = [max(column) for column in zip(*(s[2] for s in inside), strict=True)]
        return {"samples": len(inside), "busy": busy, "peak_gib": peak, "last_gib": inside[-1][2]}
