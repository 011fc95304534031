"""What SGLang and transformers need to import and serve where there is no CUDA; a no-op where there is.

Server processes get it through `child_environment`: the folder `site` on their PYTHONPATH holds a sitecustomize that
every spawned child runs. A process of our own that builds a transformers model calls `install_torchvision_schema`.
"""

from __future__ import annotations

import os
from pathlib import Path

from slime.backends.sglang_utils.cpu_support.hooks import install_torchvision_schema, install_triton_stub

__all__ = ["SITE", "child_environment", "install_torchvision_schema", "install_triton_stub"]

SITE = Path(__file__).parent / "site"


def child_environment(base: dict[str, str] | None = None, threads: int | None = None) -> dict[str, str]:
    """`base` (default: this process's environment) with what a CPU server and its children need.

    threads: threads of the matrix products (default: what `base` says, else half the cores, at least 1).
    """
    env = dict(os.environ if base is None else base)
    old = [p for p in env.get("PYTHONPATH", "").split(os.pathsep) if p and p != str(SITE)]
    env["PYTHONPATH"] = os.pathsep.join([str(SITE), *old])
    env["SGLANG_USE_CPU_ENGINE"] = "1"
    env["TORCHDYNAMO_DISABLE"] = "1"  # torch.compile would look for the triton that is not there
    env["CUDA_VISIBLE_DEVICES"] = ""
    if threads is not None:
        env["OMP_NUM_THREADS"] = str(threads)
    env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 2) // 2)))
    return env
