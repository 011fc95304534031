"""What a worker of `pool` runs: cases that build a trainer in some layout and return plain numbers to compare."""

from __future__ import annotations

import argparse

import mt_tiny
import numpy as np
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


def raw_gradients(trainer, own) -> dict[str, np.ndarray]:
    """The step's gradient before clipping by HF name (rank 0); leaves the model as it was."""
    from slime.backends.megatron_utils import cpu_runtime, weights
    from slime.backends.megatron_utils.model import unwrap

    with cpu_runtime.cpu_runtime():
        trainer.model.zero_grad_buffer()
        trainer.stepper.gradients(own, own["steps"][0])
    model = unwrap(trainer.model)
    held = {p: p.data for p in model.parameters()}
    for p in held:
        p.data = p.main_grad.clone()
    try:
        return {n: t.numpy().copy() for bucket in weights.hf_weight_buckets(model, 1 << 20) for n, t in bucket}
    finally:
        for p, data in held.items():
            p.data = data


def train(rank, ranks, port, model, data, steps: int = 3, grads: bool = True, **changes) -> dict:
    """Log-probs before; gradient of the first step; metrics of `steps` steps on the same batch; weights after (rank 0)."""
    trainer, _ = make_trainer(rank, ranks, port, model, **changes)
    own = mt_tiny.shard(data, trainer.dp_rank, trainer.dp_size)
    logps = trainer.compute_log_probs(own)
    out = {"log_probs": dict(zip(own["sample_indices"], logps, strict=True))}
    if grads and not changes.get("use_distributed_optimizer"):
        out["gradients"] = raw_gradients(trainer, own)
    out["metrics"] = [trainer.train(step, own) for step in range(steps)]
    out["weights"] = export(trainer)
    return out
