"""Small helpers without a better home: import by path, tokenizer loading, free ports, sizes for people."""

from __future__ import annotations

import importlib
import importlib.util
import os
import socket
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from ta_opd.errors import ConfigError


def load_function(path: str, flag: str) -> Callable[..., Any]:
    """The function named by `package.module.function`, `package.module:function` or `file.py:function`."""
    module_name, _, name = path.rpartition(":") if ":" in path else path.rpartition(".")
    try:
        if module_name.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(module_name).stem, module_name)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(module_name)
        return getattr(module, name)
    except (ImportError, AttributeError, OSError, ValueError) as error:
        raise ConfigError(f"{flag}: expected package.module.function or file.py:function, got {path!r}: {error}") from error


@lru_cache(maxsize=8)
def load_tokenizer(path: str, trust_remote_code: bool = False):
    """The tokenizer of an HF directory, from disk only."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as s:
        s.bind((host, 0))
        return s.getsockname()[1]


def human_bytes(n: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(n) < 1024 or unit == "TiB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    raise AssertionError("unreachable")


def human_seconds(seconds: float) -> str:
    """45 s, 12 min, 3 h 05 min."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def quiet_environment() -> None:
    """Keeps libraries from reaching for the network or printing banners; child processes inherit it."""
    for key, value in {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
                       "RAY_DEDUP_LOGS": "1", "RAY_USAGE_STATS_ENABLED": "0"}.items():  # fmt: skip
        os.environ.setdefault(key, value)
