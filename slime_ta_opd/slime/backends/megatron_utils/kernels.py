"""Modules of Triton kernels, where Triton is installed."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType


@functools.cache
def kernel_module(name: str) -> ModuleType | None:
    """Module `name` below megatron_utils, which imports Triton; None where there is none."""
    try:
        return importlib.import_module(f"slime.backends.megatron_utils.{name}")
    except ImportError:
        return None
