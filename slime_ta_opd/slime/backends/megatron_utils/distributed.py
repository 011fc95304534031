"""Process groups of a trainer rank: made from explicit addresses, so that any launcher (Ray, torchrun, tests) can start one.

Small Python objects (metrics, counts, names) travel through a gloo group on every device, so that logging never waits
for a GPU stream.
"""

from __future__ import annotations

import datetime
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from slime.backends.megatron_utils.settings import Settings

_objects: dict[str, dist.ProcessGroup | None] = {}


def init_world(rank: int, world_size: int, master_addr: str, master_port: int, minutes: int = 30) -> None:
    """Joins the default group (NCCL on GPU, gloo on CPU). A group that exists already is kept if it fits."""
    if dist.is_initialized():
        if (dist.get_rank(), dist.get_world_size()) != (rank, world_size):
            raise RuntimeError(
                f"torch.distributed: expected rank {rank} of {world_size}, but this process is already rank "
                f"{dist.get_rank()} of {dist.get_world_size()}"
            )
        return
    dist.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        init_method=f"tcp://{master_addr}:{master_port}",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(minutes=minutes),
    )


def init_model_parallel(settings: Settings) -> None:
    """Creates megatron-core's groups for the layout, replacing those of another layout in the same process."""
    destroy_model_parallel()
    mpu.initialize_model_parallel(
        tensor_model_parallel_size=settings.tensor_model_parallel_size,
        pipeline_model_parallel_size=settings.pipeline_model_parallel_size,
        context_parallel_size=settings.context_parallel_size,
        expert_model_parallel_size=settings.expert_model_parallel_size,
        expert_tensor_parallel_size=settings.expert_tp,
        distributed_timeout_minutes=settings.distributed_timeout_minutes,
    )
    if torch.cuda.is_available():
        _objects["group"] = dist.new_group(backend="gloo")
    model_parallel_cuda_manual_seed(settings.seed)


def destroy_model_parallel() -> None:
    """Forgets megatron-core's groups, so that another layout can be set up in this process."""
    if mpu.is_initialized():
        mpu.destroy_model_parallel()
    group = _objects.pop("group", None)
    if group is not None:
        dist.destroy_process_group(group)


def gather_objects(value: Any) -> list[Any]:
    """`value` of every rank, in rank order, on every rank."""
    out: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(out, value, group=_objects.get("group"))
    return out


def max_over_ranks(value: int) -> int:
    return max(gather_objects(value))


def first_error(error: BaseException | None) -> BaseException | None:
    """The error of the lowest rank that has one, on every rank: so that all ranks stop for the same reason."""
    return next((e for e in gather_objects(error) if e is not None), None)
