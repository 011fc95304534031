"""The trainer's ranks as one object for the driver."""

from __future__ import annotations

import contextlib
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from slime.ray.placement import Placement
from slime.ray.train_actor import TrainActor
from ta_opd.errors import ServiceError, TaOpdError


def create_actor_group(args, placement: Placement) -> ActorGroup:
    """Starts the ranks (they import and build at once, while the servers start) and returns the group."""
    return ActorGroup(args, placement)


def get(refs: list[ray.ObjectRef]) -> list[Any]:
    """ray.get that raises the actor's own error, or says plainly that a process died."""
    try:
        return ray.get(refs)
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, TaOpdError):
            raise cause from None
        raise
    except RayActorError as error:
        raise ServiceError(f"an actor of this run died: {str(error).splitlines()[0]}. Its log is in Ray's session directory; "
                           "resume from the last checkpoint with --load") from error  # fmt: skip


class ActorGroup:
    def __init__(self, args, placement: Placement):
        self.args, self.placement = args, placement
        self.start_id = 0
        self.version = 0  # rollouts that the current weights were trained on
        self._start()

    def _start(self) -> None:
        nodes: dict[str, int] = {}
        self.actors = []
        threads = {"OMP_NUM_THREADS": "1"} if self.args.device == "cpu" else {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
        for rank, slot in enumerate(self.placement.layout.trainer):
            node = self.placement.slots[slot].node
            local = nodes[node] = nodes.get(node, -1) + 1
            options = self.placement.options(slot, env=threads)
            local_device = local if self.args.device == "cpu" else 0  # a rank sees its own GPU only
            self.actors.append(TrainActor.options(**options).remote(self.args, rank, self.args.world_size, local_device))
        address = ray.get(self.actors[0].address.remote())
        self._init = [a.init.remote(*address) for a in self.actors]

    def init(self) -> tuple[int, dict | None]:
        """Waits until every rank is built; returns (first rollout id, what the checkpoint kept)."""
        results = get(self._init)
        self.start_id, extra = results[0]
        self.version = self.start_id
        return self.start_id, extra

    def train(self, rollout_id: int, batch) -> dict[str, float]:
        results = get([a.train.remote(rollout_id, batch.shards) for a in self.actors])
        self.version = rollout_id + 1
        return {f"train/{k}": float(v) for k, v in results[0].items() if isinstance(v, (int, float))}

    def exact_metrics(self, batch) -> list[list[ray.ObjectRef]]:
        """One box a data-parallel rank with the full-vocabulary values of its samples (Megatron teacher)."""
        found = dict(get([a.exact_metrics.remote(batch.shards) for a in self.actors]))
        return [found[rank] for rank in sorted(found)]

    def update_weights(self, rollout, version: int) -> None:
        rollout.resync = lambda: self.update_weights(rollout, self.version)  # the trainer may be ahead of the engines
        engines = rollout.engines()
        get([a.update_weights.remote(engines, version) for a in self.actors])
        rollout.set_version(version)

    def save(self, rollout_id: int, extra: dict) -> None:
        get([a.save.remote(rollout_id, extra) for a in self.actors])

    def save_hf(self, directory: str) -> None:
        get([a.save_hf.remote(directory) for a in self.actors])

    def stop(self) -> None:
        for actor in self.actors:
            with contextlib.suppress(Exception):
                ray.get(actor.close.remote(), timeout=2)
        for actor in self.actors:
            ray.kill(actor)
