"""megatron-core on a machine without CUDA. Everything CPU-only of the training backend is in this module.

megatron-core asks for CUDA in three ways: calls of `torch.cuda` (current device, random state, streams), literal
`device="cuda"` and `.cuda()`, and comparisons with tensor type names. `install()` answers the first for the whole
process; `cpu_runtime()` answers the others while its block runs. Both do nothing where CUDA is present.
"""

from __future__ import annotations

import contextlib
import threading

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")
_installed = False
_depth = threading.local()


def device(local_rank: int = 0) -> torch.device:
    """The device a trainer rank computes on."""
    return torch.device("cuda", local_rank) if torch.cuda.is_available() else CPU


def install() -> None:
    """Lets `torch.cuda` helpers that megatron-core calls answer for the CPU. Harmless when called twice."""
    global _installed
    if _installed or torch.cuda.is_available():
        return
    import megatron.core.tensor_parallel.random as mcore_random
    import megatron.core.transformer.moe.token_dispatcher as mcore_dispatcher

    torch.cuda.current_device = lambda: CPU
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.get_rng_state = torch.cuda.random.get_rng_state = lambda device="cuda": torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, device="cuda": torch.set_rng_state(state)
    torch.cuda.manual_seed = torch.manual_seed
    torch.cuda.current_stream = torch.cuda.default_stream = lambda device=None: _STREAM
    torch.cuda.Stream = _Stream
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    mcore_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    mcore_dispatcher.maybe_move_tensor_to_cpu = _split_sizes
    _installed = True


@contextlib.contextmanager
def cpu_runtime():
    """Block in which megatron-core's requests for CUDA tensors are answered with CPU ones. May be nested."""
    if torch.cuda.is_available() or getattr(_depth, "value", 0):
        yield
        return
    install()
    _depth.value = 1
    try:
        with _CudaToCpu():
            yield
    finally:
        _depth.value = 0


def _split_sizes(tensor, as_numpy: bool = False, record_stream: bool = False):
    """Token counts as the collectives want them; megatron-core converts only what was on a GPU."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


class _Stream:
    """Stands in for a CUDA stream: work on the CPU is already in order."""

    def __init__(self, *args, **kwargs):
        pass

    def wait_stream(self, stream):
        pass

    def wait_event(self, event):
        pass

    def record_event(self, event=None):
        return self

    def synchronize(self):
        pass


_STREAM = _Stream()


class _CudaToCpu(TorchFunctionMode):
    """Turns CUDA devices in tensor calls into the CPU, and names CPU tensor types as megatron-core compares them."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if kwargs:
            if _is_cuda(kwargs.get("device")):
                kwargs = {**kwargs, "device": CPU}
            if kwargs.get("pin_memory"):
                kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], CPU, *args[2:])
        return func(*args, **kwargs)


def _is_cuda(value) -> bool:
    return isinstance(value, (str, torch.device)) and str(value).startswith("cuda")
