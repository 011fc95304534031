"""Runs a file of kernel checks in a process of its own: on the GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def run_checks(file: Path) -> None:
    """Fails with what pytest printed unless the checks of `file` pass and there are any."""
    interpret = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)], capture_output=True, text=True,
                         cwd=Path(__file__).parents[2], env=os.environ | interpret)  # fmt: skip
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
