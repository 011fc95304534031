"""Time and memory of a piece of GPU (or, for trying a benchmark out, CPU) work; tables; one JSON file a benchmark."""

from __future__ import annotations

import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
GIB = 2.0**30


@dataclass
class Cost:
    """ms: median; spread: (largest - smallest) / median; extra: peak bytes above what was allocated before; None on CPU."""

    ms: float
    spread: float
    extra: int | None
    peak: int | None


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def poison(num_bytes: int) -> None:
    """Leave NaN in memory that the next allocations get: an output that is not written shows."""
    if torch.cuda.is_available():
        free()
        available = torch.cuda.mem_get_info()[0]
        blocks = [torch.full((64 << 20,), torch.nan, device="cuda") for _ in range(min(num_bytes, available // 2) >> 28)]
        del blocks


def measure(work: Callable[[], object], *, before: Callable[[], object] | None = None, warmup: int = 2, repeats: int = 5) -> Cost:
    """Median over repeats of one call; `before` runs untimed ahead of each. Results of `work` are dropped."""
    cuda = torch.cuda.is_available()
    times, extra, peak = [], 0, 0
    for turn in range(warmup + repeats):
        if before is not None:
            before()
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            work()
            end.record()
            torch.cuda.synchronize()
            ms = start.elapsed_time(end)
            if turn >= warmup:  # the first call also allocates the libraries' workspaces
                peak = max(peak, torch.cuda.max_memory_allocated())
                extra = max(extra, torch.cuda.max_memory_allocated() - held)
        else:
            began = time.perf_counter()
            work()
            ms = (time.perf_counter() - began) * 1e3
        if turn >= warmup:
            times.append(ms)
    middle = statistics.median(times)
    return Cost(middle, (max(times) - min(times)) / middle, extra if cuda else None, peak if cuda else None)


def gib(num_bytes: int | None) -> float | None:
    return None if num_bytes is None else round(num_bytes / GIB, 3)


def table(rows: list[dict]) -> str:
    """Rows of one set of columns as aligned text."""
    if not rows:
        return "(nothing measured)"
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names] + [[_cell(row.get(name)) for name in names] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def _cell(value) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 100 else f"{value:.0f}" if isinstance(value, float) else str(value)


def machine() -> dict:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    triton = sys.modules.get("triton")
    return {"device": name, "torch": torch.__version__, "triton": getattr(triton, "__version__", None),
            "python": platform.python_version()}


def write(name: str, result: dict, out: Path | None = None) -> Path:
    path = (out or RESULTS) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    words = sys.argv[1:]
    if "--out" in words:  # where the file went says nothing about the numbers
        at = words.index("--out")
        words = words[:at] + words[at + 2 :]
    command = " ".join(["python", "benchmarks/" + Path(sys.argv[0]).name, *words])
    path.write_text(json.dumps({"command": command, "machine": machine(), **result}, indent=1) + "\n")
    return path


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm; inf where something is not finite."""
    got, expected = got.detach().float(), expected.detach().float()
    if not bool(torch.isfinite(got).all()):
        return float("inf")
    return float(torch.linalg.vector_norm(got - expected) / torch.linalg.vector_norm(expected).clamp(min=1e-30))
