"""One Megatron rank as a Ray actor: a thin wrapper that owns the process, not the method."""

from __future__ import annotations

import socket
import warnings

import ray

from slime.ray.cluster import enter_directory


@ray.remote
class TrainActor:
    """Rank `rank` of `world_size`; the heavy imports happen in init(), inside the actor's own process."""

    def __init__(self, args, rank: int, world_size: int, local_rank: int):
        enter_directory()
        self.args, self.rank, self.world_size, self.local_rank = args, rank, world_size, local_rank
        self.sender = self.listener = None

    def address(self) -> tuple[str, int]:
        """Where rank 0 can be reached, for torch.distributed. The port is held from now on."""
        self.listener = socket.create_server((ray.util.get_node_ip_address(), 0))
        return self.listener.getsockname()

    def init(self, master_addr: str, master_port: int) -> tuple[int, dict | None]:
        """Builds model and optimizer; returns the first rollout id and what the checkpoint kept beside them."""
        warnings.filterwarnings("ignore", module="megatron")  # it names every optional package that is not installed
        from slime.backends.megatron_utils.trainer import MegatronTrainer

        self.trainer = MegatronTrainer(
            self.args, self.rank, self.world_size, self.local_rank, master_addr, master_port, listener=self.listener
        )
        start = self.trainer.init()
        return start, self.trainer.load_extra()

    def train(self, rollout_id: int, shards: list[list[ray.ObjectRef]]) -> dict:
        data = ray.get(shards[self.trainer.dp_rank][0])
        return self.trainer.train(rollout_id, data)

    def exact_metrics(self, shards: list[list[ray.ObjectRef]]) -> tuple[int, list[ray.ObjectRef]]:
        """Full-vocabulary H, D and C of this rank's samples under a Megatron teacher: (data-parallel rank, boxed result)."""
        data = ray.get(shards[self.trainer.dp_rank][0])
        found = self.trainer.exact_metrics(data)
        return self.trainer.dp_rank, [ray.put({**found, "sample_indices": data["sample_indices"]})]

    def update_weights(self, engines: dict, version: int) -> dict:
        """Sends the student's weights to the engines; every rank takes part in gathering the shards."""
        from slime.backends.sglang_utils.weight_sync import WeightSender

        if self.sender is None or self.sender.engines != engines:
            if self.sender is not None:
                self.sender.close()
            self.sender = WeightSender(self.args, engines, is_source=self.rank == 0)
        return self.sender.send(self.trainer.hf_weight_buckets(self.args.update_weight_buffer_size), version)

    def save(self, rollout_id: int, extra: dict) -> None:
        self.trainer.save(rollout_id, extra)

    def save_hf(self, directory: str) -> None:
        self.trainer.save_hf(directory)

    def close(self) -> None:
        if self.sender is not None:
            self.sender.close()
