"""Runs at the start of every Python process of a CPU server (see slime.backends.sglang_utils.cpu_support)."""

import importlib.machinery
import importlib.util
import os
import sys

_here = os.path.dirname(os.path.abspath(__file__))


def _run_file(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if os.environ.get("SGLANG_USE_CPU_ENGINE") == "1":
    _hooks = _run_file("_cpu_support_hooks", os.path.join(os.path.dirname(_here), "hooks.py"))
    _hooks.install_triton_stub()
    _hooks.install_torchvision_schema()
    _hooks.install_quick_flush()
    if os.environ.get("SLIME_SEEDED_SAMPLING") == "1":
        _hooks.install_seeded_sampling()

# This file hides a sitecustomize further down the path (of the interpreter or the user): run that one too.
_spec = importlib.machinery.PathFinder.find_spec("sitecustomize", [p for p in sys.path if os.path.abspath(p) != _here])
if _spec is not None and _spec.origin:
    _run_file("_next_sitecustomize", _spec.origin)
