"""The trainer's ranks as one object for the driver."""

from __future__ import annotations

import contextlib
import os

import ray

from slime.backends.sglang_utils.weight_sync import choose_way
from slime.ray.calls import ProcessLost, get
from slime.ray.placement import Placement
from slime.ray.train_actor import TrainActor
from ta_opd.errors import ServiceError

SYNC_TRIES = 3


def create_actor_group(args, placement: Placement) -> ActorGroup:
    """Starts the ranks (they import and build at once, while the servers start) and returns the group."""
    return ActorGroup(args, placement)


def rank_environment(args) -> dict[str, str]:
    """Environment variables of a rank.

    Ranks that send weights over NCCL need what SGLang sets in its own processes unless the user has: two processes of which one takes
    its buffers from cuMem and the other does not cannot open each other's (NCCL: "invalid argument" at the first broadcast).
    """
    if args.device == "cpu":
        return {"OMP_NUM_THREADS": "1"}
    env = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    shared = args.colocate and not args.rollout_external_engine_addrs  # engines by URL are reached as if they were apart
    if choose_way(args.weight_sync, shared, args.device) == "distributed":
        env |= {name: os.environ.get(name, "0") for name in ("NCCL_CUMEM_ENABLE", "NCCL_NVLS_ENABLE")}
    return env


class ActorGroup:
    def __init__(self, args, placement: Placement):
        self.args, self.placement = args, placement
        self.start_id = 0
        self.version = 0  # rollouts that the current weights were trained on
        self._start()

    def _start(self) -> None:
        nodes: dict[str, int] = {}
        self.actors = []
        env = rank_environment(self.args)
        for rank, slot in enumerate(self.placement.layout.trainer):
            node = self.placement.slots[slot].node
            local = nodes[node] = nodes.get(node, -1) + 1
            options = self.placement.options(slot, env=env)
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
        """Sends the weights to every engine; one that died meanwhile is started again and all get them anew."""
        rollout.resync = lambda: self.update_weights(rollout, self.version)  # the trainer may be ahead of the engines
        for left in range(SYNC_TRIES - 1, -1, -1):
            engines = rollout.engines()
            try:
                get([a.update_weights.remote(engines, version) for a in self.actors])
                break
            except ServiceError as problem:
                if isinstance(problem, ProcessLost) or not left:
                    raise
                restarted = rollout.heal()  # none where an engine was only slow
                print(f"weight sync: {problem}; {'restarted ' + ', '.join(restarted) + ', ' if restarted else ''}sending again")
        rollout.set_version(version)

    def save(self, rollout_id: int, extra: dict) -> None:
        get([a.save.remote(rollout_id, extra) for a in self.actors])

    def save_hf(self, directory: str) -> None:
        get([a.save_hf.remote(directory) for a in self.actors])

    def stop(self) -> None:
        closing = []
        for actor in self.actors:
            with contextlib.suppress(Exception):
                closing.append(actor.close.remote())
        with contextlib.suppress(Exception):
            ray.wait(closing, num_returns=len(closing), timeout=2)
        for actor in self.actors:
            ray.kill(actor)
