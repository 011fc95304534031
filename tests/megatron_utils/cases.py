"""What a worker of `pool` runs: cases that build a trainer in some layout and return plain numbers to compare."""

from __future__ import annotations

import argparse

import numpy as np
import tiny
import torch
import torch.distributed as dist

_state: dict = {}


def join(rank: int, ranks: int, port: int) -> None:
    """Leaves the process group of another size or port and joins this one."""
    from slime.backends.megatron_utils import distributed

    if _state.get("world") == (ranks, port):
        return
    if dist.is_initialized():
        distributed.destroy_model_parallel()
        dist.destroy_process_group()
    distributed.init_world(rank, ranks, "127.0.0.1", port, minutes=5)
    _state["world"] = (ranks, port)


def make_args(model, **changes) -> argparse.Namespace:
    base = dict(
        hf_checkpoint=str(model), opd_loss_type="topk_reverse_kl", max_tokens_per_gpu=64, lr=1e-3, fp32=True, adam_eps=1e-5,
        weight_decay=0.1, adam_beta1=0.9, adam_beta2=0.95, clip_grad=0.5, opd_log_valid_kl="off", seed=7,
    )  # fmt: skip
    return argparse.Namespace(**{**base, **changes})


def make_trainer(rank: int, ranks: int, port: int, model, **changes):
    from slime.backends.megatron_utils.trainer import MegatronTrainer

    trainer = MegatronTrainer(make_args(model, **changes), rank, ranks, rank, "127.0.0.1", port)
    return trainer, trainer.init()


def export(trainer) -> dict[str, np.ndarray]:
    """HF weights as rank 0 gets them (empty elsewhere)."""
    return {n: t.float().numpy().copy() for bucket in trainer.hf_weight_buckets(1 << 16) for n, t in bucket}


def gradients(trainer) -> dict[str, np.ndarray]:
    """The main gradients by HF name, gathered like weights."""
    from slime.backends.megatron_utils import weights
    from slime.backends.megatron_utils.model import unwrap

    model = unwrap(trainer.model)
    held = {p: p.data for p in model.parameters()}
    for p in model.parameters():
        p.data = p.main_grad.clone()
    try:
        return {n: t.numpy().copy() for bucket in weights.hf_weight_buckets(model, 1 << 20) for n, t in bucket}
    finally:
        for p, data in held.items():
            p.data = data


def train(rank, ranks, port, model, data, steps: int = 3, **changes) -> dict:
    """`steps` optimizer steps on the same batch: metrics, gradients of the first step, final weights (rank 0)."""
    trainer, _ = make_trainer(rank, ranks, port, model, **changes)
    own = tiny.shard(data, trainer.dp_rank, trainer.dp_size)
    out = {"log_probs": (trainer.dp_rank, trainer.compute_log_probs(own)), "metrics": []}
    for step in range(steps):
        out["metrics"].append(trainer.train(step, own))
        if step == 0 and not changes.get("use_distributed_optimizer"):
            out["gradients"] = gradients(trainer)
    out["weights"] = export(trainer)
    return out
