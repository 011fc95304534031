"""Import hooks for CPU processes. Standard library only: the sitecustomize of server children loads this file by path."""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys
from collections.abc import Callable


class _AfterImport(importlib.abc.MetaPathFinder):
    """Runs `action(module)` right after module `name` has been imported (at once if it already is)."""

    def __init__(self, name: str, action: Callable):
        self.name, self.action, self.busy = name, action, False

    def find_spec(self, name, path=None, target=None):
        if name != self.name or self.busy:
            return None
        self.busy = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.busy = False
        if spec is None or spec.loader is None:
            return None
        run, action = spec.loader.exec_module, self.action

        def exec_module(module):
            run(module)
            action(module)

        spec.loader.exec_module = exec_module
        return spec


_installed: set[str] = set()


def after_import(name: str, action: Callable) -> None:
    """Have `action(module)` run once `name` is imported. A second call for the same name and action does nothing."""
    key = f"{name}:{action.__name__}"
    if key in _installed:
        return
    _installed.add(key)
    if name in sys.modules:
        action(sys.modules[name])
    else:
        sys.meta_path.insert(0, _AfterImport(name, action))


def _define_torchvision_schema(extension) -> None:
    if extension._has_ops() or hasattr(extension, "_schema_library"):
        return  # this file may be loaded twice in one process: by name and, in server children, by path
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for op in ("nms", "qnms"):
        library.define(op + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    extension._schema_library = library  # a torch.library.Library drops its schemas when it is collected


def install_torchvision_schema() -> None:
    """Lets `import torchvision` (and what of transformers needs it) succeed beside a CPU build of torch.

    The torchvision wheel on PyPI is a CUDA build whose extension does not load there; its Python part then fails only
    because the schemas of two operators are missing. Nothing happens where the extension loads. May be called twice.
    """
    after_import("torchvision.extension", _define_torchvision_schema)


def install_triton_stub() -> None:
    """Installs SGLang's own stand-in for triton where triton is absent (SGLang does so itself on macOS only)."""
    if "triton" in sys.modules or importlib.util.find_spec("triton") is not None:
        return
    for folder in sys.path:
        file = os.path.join(folder, "sglang", "_triton_stub.py")
        if os.path.isfile(file):
            spec = importlib.util.spec_from_file_location("_sglang_triton_stub", file)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            module.install()
            return


def _seed_every_request(module) -> None:
    """Makes SGLang honour `sampling_seed`; it does so by itself only with attention backends that need a GPU."""
    real = module.get_exec

    class Deterministic:
        enable_deterministic_inference = True

        def __getattr__(self, name):
            return getattr(real().deterministic, name)

    class Execution:
        deterministic = Deterministic()

        def __getattr__(self, name):
            return getattr(real(), name)

    module.get_exec = Execution


def _sample_with_seed(module) -> None:
    """SGLang draws by seed with a triton kernel; this draws by inverting the cumulative distribution, one number a row."""
    import torch

    mask = (1 << 32) - 1

    def mix(x):  # 32-bit finalizer of MurmurHash3 (public domain), in int64 arithmetic
        x = (x ^ (x >> 16)) * 0x85EBCA6B & mask
        x = (x ^ (x >> 13)) * 0xC2B2AE35 & mask
        return x ^ (x >> 16)

    def multinomial_with_seed(logprobs, seed, positions):
        """logprobs [n, m], seed [n], positions [n] -> sampled column [n, 1] int64."""
        seed, position = seed.to(torch.int64), positions.to(torch.int64)
        high = mix(mix(mix(seed & mask) ^ (seed >> 32 & mask)) ^ position)
        low = mix(high ^ 0x9E3779B9)
        uniform = (high.double() * 2.0**32 + low.double() + 0.5) / 2.0**64
        cumulative = torch.softmax(logprobs.double(), dim=-1).cumsum_(dim=-1)
        total = cumulative[:, -1].contiguous()
        index = torch.searchsorted(cumulative, (uniform * total).unsqueeze(1), right=True)
        last = torch.searchsorted(cumulative, total.unsqueeze(1).contiguous())  # the last column of non-zero probability
        return torch.minimum(index, last)

    module.multinomial_with_seed = multinomial_with_seed


def install_seeded_sampling() -> None:
    """Every request is sampled from its own `sampling_seed`, so that a run on CPU repeats itself."""
    after_import("sglang.srt.sampling.sampling_batch_info", _seed_every_request)
    after_import("sglang.srt.layers.sampler", _sample_with_seed)


def _wake_often(module) -> None:
    def maybe_sleep(self):
        self.poller.poll(10)

    module.IdleSleeper.maybe_sleep = maybe_sleep


def _keep_garbage(module) -> None:
    for value in vars(module).values():
        if isinstance(value, type) and "empty_cache" in vars(value):
            value.empty_cache = lambda self: None


def install_quick_flush() -> None:
    """A cache flush (one after every weight sync) costs a millisecond instead of a second: on CPU SGLang walks the whole heap
    with the garbage collector then, and an idle scheduler looks only once a second for a flush that had to wait."""
    after_import("sglang.srt.managers.scheduler_components.idle_sleeper", _wake_often)
    after_import("sglang.srt.platforms.cpu", _keep_garbage)
