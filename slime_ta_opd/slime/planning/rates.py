"""Rates that predictions rest on, each with where it comes from.

A file of rates is JSON: {"gpus": {kind: {...}}, "rates": {name: {"value", "unit", "status", "source", "how"}}}. status is `measured`
(by a benchmark, on its own), `calibrated` (taken from a run that predictions are also compared with) or `assumed`.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path

from ta_opd.errors import ConfigError, DataError

STATUSES = ("measured", "calibrated", "assumed")
GPU_FIELDS = ("matmul", "memory", "bandwidth", "nvlink", "network")


@dataclass(frozen=True)
class Rate:
    name: str
    value: float
    unit: str
    status: str
    source: str
    how: str = ""


@dataclass(frozen=True)
class Gpu:
    """matmul: bf16 operations a second; memory bytes; bandwidth, nvlink, network: bytes a second (the last two one way a GPU)."""

    kind: str
    matmul: float
    memory: float
    bandwidth: float
    nvlink: float
    network: float
    notes: dict = field(default_factory=dict)

    def with_values(self, **values: float | None) -> Gpu:
        given = {name: value for name, value in values.items() if value is not None}
        for name, value in given.items():
            if name not in GPU_FIELDS or not 0 < value < math.inf:
                raise ConfigError(f"GPU {name}: expected a positive number, got {value!r}")
        return replace(self, **given, notes={**self.notes, **dict.fromkeys(given, "given")})


class Rates:
    """rates["name"] is the number; `used` collects what a prediction read, for its footnotes."""

    def __init__(self, rates: dict[str, Rate], gpus: dict[str, Gpu]):
        self.rates, self.gpus, self.used = rates, gpus, set()

    def __getitem__(self, name: str) -> float:
        if name not in self.rates:
            raise DataError(f"rates: expected an entry {name!r}, got none; known: {', '.join(sorted(self.rates))}")
        self.used.add(name)
        return self.rates[name].value

    def gpu(self, kind: str) -> Gpu:
        for name, gpu in self.gpus.items():
            if name.lower() == kind.lower():
                return gpu
        raise ConfigError(f"GPU {kind!r}: expected one of {', '.join(self.gpus)}; other kinds: take the nearest and set its numbers")

    def footnotes(self) -> list[Rate]:
        """The rates that were read, measured ones first."""
        return sorted((self.rates[n] for n in self.used), key=lambda r: (STATUSES.index(r.status), r.name))


def load_rates(path: str | Path) -> Rates:
    """Raises DataError on a file that is not one of rates, naming the entry."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"rates {path}: expected a JSON file of measured rates, found none")
    try:
        raw = json.loads(path.read_text())
        gpus = {kind: Gpu(kind, *(float(g[f]) for f in GPU_FIELDS), notes=g.get("notes", {})) for kind, g in raw["gpus"].items()}
        entries = raw["rates"].items()
    except (json.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"rates {path}: expected keys gpus and rates ({type(error).__name__}: {error})") from error
    rates = {}
    for name, entry in entries:
        missing = [k for k in ("value", "unit", "status", "source") if k not in entry]
        if missing or entry.get("status") not in STATUSES or not isinstance(entry.get("value"), (int, float)):
            raise DataError(f"rates {path}: entry {name!r}: expected value, unit, source and a status of {', '.join(STATUSES)}, got {entry}")
        rates[name] = Rate(name, float(entry["value"]), entry["unit"], entry["status"], entry["source"], entry.get("how", ""))
    return Rates(rates, gpus)
