"""AdamW's state in host memory (--optimizer-cpu-offload): 12 bytes a parameter that visit the device once a step, in chunks.

A chunk is copied in on one stream, stepped by torch's fused AdamW on the compute stream, which then writes the model's weights, and
copied out on a third stream. Three chunks are under way at once, so that both directions of the link are busy. Host memory is
one page-locked buffer a kind of state, in which neighbours of the optimizer's order lie side by side: a chunk is one copy a kind.

The numbers are those of the state on the device: clipping and AdamW are elementwise, and chunks end where the processor's vectors
do (the CPU kernel rounds the rest of a tensor, which is no whole vector, in another way).

Where the model itself is fp32, its weights are the main weights: they stay, and the moments alone are moved.
"""

from __future__ import annotations

import itertools
import socket
import types
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from megatron.core.optimizer import DistributedOptimizer
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor
from torch.optim.adamw import adamw
from torch.overrides import TorchFunctionMode

from slime.backends.megatron_utils import distributed
from slime.backends.megatron_utils.host_chunks import CHUNK_BYTES, KINDS, SLOTS, STATE_BYTES
from slime.utils import memory
from ta_opd.errors import ConfigError

ALIGN = 16  # elements: whole vectors of any processor
MOMENTS = KINDS[1:]


class MainWeightsOnHost(TorchFunctionMode):
    """While megatron-core builds an optimizer: fp32 copies of half-precision weights take no device memory, and hold no values."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.float and args[0].dtype != torch.float32:
            return torch.empty(args[0].shape, dtype=torch.float32, device="cpu")
        return func(*args, **(kwargs or {}))


@dataclass
class Piece:
    """One tensor of the optimizer: this rank's part (`span` of the flat parameter, None: all) of a model parameter."""

    main: Tensor
    model: Tensor
    span: slice | None
    group: int
    offset: int = 0  # in the host buffers

    @property
    def in_place(self) -> bool:
        """The model's weights are the main weights."""
        return self.model.dtype == torch.float32

    def weights(self) -> Tensor:
        """[numel], the model's dtype."""
        flat = self.model.data.view(-1)
        return flat if self.span is None else flat[self.span]

    def gradient(self) -> Tensor:
        """The gradient buffer's part, in its own dtype and the shape that megatron-core takes norms of."""
        grad = self.model.main_grad
        return grad if self.span is None else grad.view(-1)[self.span]


@dataclass
class Chunk:
    """`start` to `stop` of the host buffers: parts (piece, begin, end) of one parameter group."""

    group: int
    in_place: bool
    start: int
    stop: int
    parts: list[tuple[Piece, int, int]] = field(default_factory=list)


class HostState:
    """The state of one of megatron-core's optimizers over torch's AdamW; replaces its step, its loading, its norm's input and its copies.

    chunk_bytes: of state, at least that of ALIGN parameters. Main weights hold no values before `reload_model_params`.
    Raises ConfigError where the host lets no such memory be page-locked (`check_host_memory` says before whether there is any).
    """

    def __init__(self, part, chunk_bytes: int | None = None):
        self.part = part
        self.clip = 1.0  # what the next step multiplies gradients by
        self.pieces = _pieces(part)
        kinds, size = _place(self.pieces)
        width = (chunk_bytes or CHUNK_BYTES) // STATE_BYTES // ALIGN * ALIGN
        self.chunks = list(_cut(self.pieces, max(width, ALIGN)))
        self.width = max((c.stop - c.start for c in self.chunks), default=0)
        self.device = self.pieces[0].model.device if self.pieces else torch.device("cpu")
        self.streams = [torch.cuda.Stream(self.device) for _ in self.pieces[:1] * 2]  # cpu_runtime.py answers where there are none
        self.host = _host_buffers(kinds, size, self.device)
        self._unlock = weakref.finalize(self, _unlock, list(self.host.values())) if self.device.type == "cuda" else None
        for piece in self.pieces:
            if not piece.in_place:
                piece.main.data = self._view("main", piece)
            part.optimizer.state[piece.main].update(step=torch.tensor(0.0), **{k: self._view(k, piece) for k in MOMENTS})
        part.prepare_grads = types.MethodType(_nothing_to_prepare, part)
        part.get_main_grads_for_grad_norm = self.gradients
        part.optimizer.step = self.step
        part.optimizer.load_state_dict = self.load
        part._copy_main_params_to_model_params = _written_by_the_step

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.host.values())

    def load(self, state: dict) -> None:
        """Takes the place of torch's `load_state_dict`, which would first put the moments where the weights are: they go straight into the
        host buffers. state: {"state": {number: {"exp_avg", "exp_avg_sq", "step"}}, "param_groups": [{"params": numbers, ...}]}."""
        adam = self.part.optimizer
        for group, given in zip(adam.param_groups, state["param_groups"], strict=True):
            group.update({**given, "params": group["params"]})
        numbers = itertools.chain.from_iterable(given["params"] for given in state["param_groups"])
        for number, piece in zip(numbers, self.pieces, strict=True):
            held, given = adam.state[piece.main], state["state"].get(number, {})
            for kind in MOMENTS:
                if kind in given and given[kind].data_ptr() != held[kind].data_ptr():
                    held[kind].copy_(given[kind].reshape(held[kind].shape))
            held["step"] = torch.tensor(float(given.get("step", 0.0)))  # of its own: a checkpoint's is one for all

    def gradients(self) -> list[Tensor]:
        """What megatron-core takes the norm of: gradients without its duplicates; of a bf16 gradient its norm, [1] float32."""
        group = getattr(self.part, "tp_group", None)
        counted = [p for p in self.pieces if param_is_not_shared(p.main) and param_is_not_tensor_parallel_duplicate(p.main, group)]
        grads = (p.gradient() for p in counted)
        return [g if g.dtype == torch.float32 else torch.norm(g, dtype=torch.float32).reshape(1) for g in grads]

    @torch.no_grad()
    def step(self) -> None:
        """One step with gradients times `clip`; when it returns, the host buffers may be read."""
        if not self.chunks:
            return
        compute = torch.cuda.current_stream(self.device)
        inward, outward = self.streams
        stages = [dict(zip(self.host, torch.empty(len(self.host), self.width, device=self.device), strict=True)) for _ in range(SLOTS)]
        narrow = any(p.model.main_grad.dtype != torch.float32 for p in self.pieces)
        widened = torch.empty(self.width, device=self.device) if narrow else None
        inward.wait_stream(compute)  # the stages' memory may have been used there
        copied_out = [None] * SLOTS
        for number, chunk in enumerate(self.chunks):
            slot = number % SLOTS
            size, stage = chunk.stop - chunk.start, stages[slot]
            kinds = MOMENTS if chunk.in_place else KINDS
            with torch.cuda.stream(inward):
                if copied_out[slot] is not None:
                    inward.wait_event(copied_out[slot])
                for kind in kinds:
                    stage[kind][:size].copy_(self.host[kind][chunk.start : chunk.stop], non_blocking=True)
                copied_in = inward.record_event()
            compute.wait_event(copied_in)
            self._update(chunk, stage, widened)
            updated = compute.record_event()
            with torch.cuda.stream(outward):
                outward.wait_event(updated)
                for kind in kinds:
                    self.host[kind][chunk.start : chunk.stop].copy_(stage[kind][:size], non_blocking=True)
                copied_out[slot] = outward.record_event()
        for piece in self.pieces:
            self.part.optimizer.state[piece.main]["step"] += 1
        outward.synchronize()  # the last copy out is behind all other work; the stages may be freed as well

    def _update(self, chunk: Chunk, stage: dict[str, Tensor], widened: Tensor | None) -> None:
        """Clips, steps and writes the model's weights of one chunk."""
        mains, grads, moments = [], [], {k: [] for k in MOMENTS}
        for piece, begin, end in chunk.parts:
            here = slice(piece.offset + begin - chunk.start, piece.offset + end - chunk.start)
            grad = piece.gradient().view(-1)[begin:end]
            grads.append(grad if grad.dtype == torch.float32 else widened[here].copy_(grad))
            mains.append(piece.weights()[begin:end] if chunk.in_place else stage["main"][here])
            for kind in MOMENTS:
                moments[kind].append(stage[kind][here])
        if self.clip < 1.0:
            for grad in grads:
                grad.mul_(self.clip)
        adam = self.part.optimizer
        group = adam.param_groups[chunk.group]
        done = float(adam.state[chunk.parts[0][0].main]["step"])  # one for all: megatron-core's checkpoints hold one
        steps = list(torch.full((len(mains),), done, device=self.device).unbind())
        adamw(mains, grads, *moments.values(), [], steps, fused=True, foreach=False, amsgrad=False, maximize=False, lr=group["lr"],
              beta1=group["betas"][0], beta2=group["betas"][1], weight_decay=group["weight_decay"], eps=group["eps"])  # fmt: skip
        if not chunk.in_place:
            for (piece, begin, end), main in zip(chunk.parts, mains, strict=True):
                piece.weights()[begin:end].copy_(main)

    def _view(self, kind: str, piece: Piece) -> Tensor:
        return self.host[kind][piece.offset : piece.offset + piece.main.numel()].view(piece.main.shape)


def _pieces(part) -> list[Piece]:
    """In the order of the optimizer's parameters."""
    models: dict[Tensor, tuple[Tensor, slice | None]] = {}
    if isinstance(part, DistributedOptimizer):
        for groups, shards in ((part.model_float16_groups, part.shard_fp32_from_float16_groups), (part.model_fp32_groups, part.shard_fp32_groups)):
            for model, main in zip(sum(groups, []), sum(shards, []), strict=True):
                span = part._get_model_param_range_map(model)["param"]
                models[main] = (model, slice(span.start, span.end))
    elif hasattr(part, "float16_groups"):
        for model, main in zip(sum(part.float16_groups, []), sum(part.fp32_from_float16_groups, []), strict=True):
            models[main] = (model, None)
    return [Piece(p, *models.get(p, (p, None)), i) for i, group in enumerate(part.optimizer.param_groups) for p in group["params"]]


def _cut(pieces: list[Piece], width: int) -> Iterator[Chunk]:
    """Chunks of at most `width` elements; pieces are cut at multiples of ALIGN."""
    chunk: Chunk | None = None
    for piece in pieces:
        begin, numel = 0, piece.main.numel()
        while begin < numel:
            start = piece.offset + begin
            if chunk is None or (chunk.group, chunk.in_place) != (piece.group, piece.in_place) or start - chunk.start >= width:
                if chunk is not None:
                    yield chunk
                chunk = Chunk(piece.group, piece.in_place, start, start)
            end = min(numel, begin + width - (start - chunk.start))
            chunk.parts.append((piece, begin, end))
            chunk.stop = piece.offset + end
            begin = end
    if chunk is not None:
        yield chunk


def _place(pieces: list[Piece]) -> tuple[tuple[str, ...], int]:
    """Sets every piece's offset; (kinds of state that are held, elements of each)."""
    size = 0
    for piece in pieces:
        piece.offset = size
        size += -(-piece.main.numel() // ALIGN) * ALIGN
    return (KINDS if any(not p.in_place for p in pieces) else MOMENTS), size


def check_host_memory(parts: Iterable) -> None:
    """Before any rank takes memory (collective): ConfigError on all where the ranks of one node want more than it has left."""
    need = 0
    for part in parts:
        kinds, size = _place(_pieces(part))
        need += 4 * size * len(kinds)
    everyone = distributed.gather_objects((socket.gethostname(), need, memory.available()))
    for node in sorted({name for name, *_ in everyone}):
        wants = [want for name, want, _ in everyone if name == node]
        free = min(left for name, _, left in everyone if name == node)
        if sum(wants) > free:
            raise ConfigError(
                f"--optimizer-cpu-offload: expected {sum(wants) / 2**30:.1f} GiB of host memory for the state of the {len(wants)} ranks on {node}, "
                f"got {free / 2**30:.1f} GiB that are free; take fewer ranks a node, shard the state (--use-distributed-optimizer), or keep it "
                "on the device"
            )


def _host_buffers(kinds: tuple[str, ...], size: int, device: torch.device) -> dict[str, Tensor]:
    """Zeros [size] float32 a kind; page-locked where `device` is a GPU. Raises ConfigError where the system locks no more.

    Registered and not `pin_memory=True`: torch's pinned allocator rounds up to a power of two, up to twice the memory.
    """
    buffers = {kind: torch.zeros(size) for kind in kinds}
    for flat in buffers.values():
        if device.type == "cuda" and flat.numel():
            code = int(torch.cuda.cudart().cudaHostRegister(flat.data_ptr(), flat.nbytes, 0))
            if code:
                raise ConfigError(
                    f"--optimizer-cpu-offload: expected {flat.nbytes / 2**30:.1f} GiB of host memory to be page-locked, got CUDA error {code}; "
                    "raise the limit on locked memory (ulimit -l, the container's memlock), or keep the state on the device"
                )
    return buffers


def _unlock(buffers: list[Tensor]) -> None:
    for flat in buffers:
        if flat.numel():
            torch.cuda.cudart().cudaHostUnregister(flat.data_ptr())


def _nothing_to_prepare(part) -> bool:
    """Gradients stay in their buffers until the step; no scaler, so that there is no overflow to find."""
    return False


def _written_by_the_step() -> None:
    pass
