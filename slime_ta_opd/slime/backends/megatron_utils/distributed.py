"""Process groups of a trainer rank: made from explicit addresses, so that any launcher (Ray, torchrun, tests) can start one.

Small Python objects (metrics, counts, names) travel through a gloo group on every device, so that logging never waits
for a GPU stream.
"""

from __future__ import annotations

import datetime
import gc
import socket
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from slime.backends.megatron_utils.settings import Settings

_state: dict[str, Any] = {}


def init_world(
    rank: int, world_size: int, master_addr: str, master_port: int, minutes: int = 30, listener: socket.socket | None = None
) -> None:
    """Joins the default group (NCCL on GPU, gloo on CPU). A group that exists already is kept if it fits.

    listener: rank 0's socket that listens on the master port already, so that nobody else can take the port in between.
    """
    if dist.is_initialized():
        if (dist.get_rank(), dist.get_world_size()) != (rank, world_size):
            raise RuntimeError(
                f"torch.distributed: expected rank {rank} of {world_size}, but this process is already rank "
                f"{dist.get_rank()} of {dist.get_world_size()}"
            )
        return
    timeout = datetime.timedelta(minutes=minutes)
    held = {} if listener is None else {"master_listen_fd": listener.detach()}
    store = dist.TCPStore(master_addr, master_port, world_size, is_master=rank == 0, timeout=timeout, **held)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def init_model_parallel(settings: Settings) -> None:
    """Creates megatron-core's groups for the layout; keeps those of this process if they are of the same layout.

    Raises RuntimeError where they are of another one: every gloo group holds threads, so groups are not piled up. Leave the
    world (`leave_world`) first.
    """
    wanted = {
        "tensor_model_parallel_size": settings.tensor_model_parallel_size,
        "pipeline_model_parallel_size": settings.pipeline_model_parallel_size,
        "context_parallel_size": settings.context_parallel_size,
        "expert_model_parallel_size": settings.expert_model_parallel_size,
        "expert_tensor_parallel_size": settings.expert_tp,
    }
    if mpu.is_initialized():
        if _state.get("layout") != wanted:
            raise RuntimeError(f"megatron-core: this process already has groups of layout {_state.get('layout')}, not {wanted}")
    else:
        mpu.initialize_model_parallel(**wanted, distributed_timeout_minutes=settings.distributed_timeout_minutes)
        _state["layout"] = wanted
        if torch.cuda.is_available():
            _state["objects"] = dist.new_group(backend="gloo")
    model_parallel_cuda_manual_seed(settings.seed)


def leave_world() -> None:
    """Destroys all process groups of this process, with their threads."""
    if mpu.is_initialized():
        mpu.destroy_model_parallel()
    _state.clear()
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()


def gather_objects(value: Any) -> list[Any]:
    """`value` of every rank, in rank order, on every rank."""
    out: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(out, value, group=_state.get("objects"))
    return out


def max_over_ranks(value: int) -> int:
    return max(gather_objects(value))


def first_error(error: BaseException | None) -> BaseException | None:
    """The error of the lowest rank that has one, on every rank: so that all ranks stop for the same reason."""
    return next((e for e in gather_objects(error) if e is not None), None)
