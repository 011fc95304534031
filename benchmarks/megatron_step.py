"""Forward and backward of the trainer's own step (megatron-core trunk, DDP gradient buffers) with different losses and rows."""

from __future__ import annotations

import socket
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import torch

from benchmarks import measure as m
from benchmarks.reference_trunk import Shape
from slime.backends.megatron_utils import cpu_runtime, distributed, trunk_ops
from slime.backends.megatron_utils.hf_config import model_shape
from slime.backends.megatron_utils.losses.registry import LossSpec, get_loss
from slime.backends.megatron_utils.losses.types import TokenLoss
from slime.backends.megatron_utils.model import build_model, wrap_for_training
from slime.backends.megatron_utils.recompute import RecomputingBlock
from slime.backends.megatron_utils.settings import Settings
from slime.backends.megatron_utils.step import Stepper, vocabulary_args

WAYS = {  # name: (rows of the loss, loss, rows of the last layer)
    "all, plain": ("all", "plain", "all"),
    "all, chunked": ("all", "chunked", "all"),
    "all, ours": ("all", "ours", "all"),
    "kept, plain": ("kept", "plain", "mlp"),
    "kept, ours, last layer whole": ("kept", "ours", "all"),
    "kept, ours, last layer's MLP on kept rows": ("kept", "ours", "mlp"),
    "kept, ours, last layer on kept rows": ("kept", "ours", "kept"),
}
DEFAULT = "kept, ours, last layer on kept rows"
WITHOUT = {  # name: (recompute leaves out the layers' outputs, Triton kernels of the layers), else as DEFAULT
    "kept, ours, layers' outputs recomputed": (False, True),
    "kept, ours, without the layers' Triton kernels": (True, False),
    "kept, ours, without both": (False, False),
}
PROMPT = 256


def hf_config(s: Shape) -> dict:
    return {"model_type": "qwen3", "num_hidden_layers": s.layers, "hidden_size": s.hidden, "intermediate_size": s.ffn,
            "num_attention_heads": s.heads, "num_key_value_heads": s.kv_heads, "head_dim": s.head_dim, "vocab_size": s.vocab,
            "rms_norm_eps": 1e-6, "max_position_embeddings": 40_960, "rope_theta": 1e6, "tie_word_embeddings": True,
            "hidden_act": "silu", "attention_bias": False}  # fmt: skip


def comparison_loss(name: str) -> LossSpec:
    """`plain` and `chunked` of loss_rows.py as a loss of the trainer."""
    from benchmarks import loss_rows

    def fn(hidden_RH, weight_VH, rows, args, tp_group=None):
        total = getattr(loss_rows, name)(hidden_RH, weight_VH, rows)
        return TokenLoss(torch.zeros_like(rows.factor_R), {}, total)

    return LossSpec(name, fn, get_loss("sampled_reverse_kl").needs, None, "logprob")


def step_batch(s: Shape, tokens: int, length: int, share: float) -> dict:
    """Samples that fill `tokens` packed tokens; `share` of all tokens is kept, the last response position always."""
    rng = np.random.default_rng(0)
    prompt = min(PROMPT, length // 4)
    number, response = tokens // length, length + 1 - prompt  # the last token is predicted, never fed
    kept = int(length * share)
    weights = []
    for _ in range(number):
        weight = np.zeros(response, np.float32)
        weight[rng.permutation(response - 1)[: kept - 1]] = weight[-1] = 1.0
        weights.append(weight)
    old = [(-5 * rng.random(response)).astype(np.float32) for _ in range(number)]
    return {
        "tokens": [rng.integers(0, s.vocab, length + 1).astype(np.int32) for _ in range(number)],
        "response_lengths": [response] * number, "loss_masks": [np.ones(response, np.float32)] * number, "opd_weights": weights,
        "rollout_log_probs": old, "teacher_log_probs": [x + 0.5 for x in old], "sample_indices": list(range(number)),
        "steps": [{"indices": list(range(number)), "kept_tokens": float(kept * number), "valid_tokens": response * number,
                   "num_samples": number}],
    }  # fmt: skip


@contextmanager
def one_rank(s: Shape, max_tokens: int, bf16: bool, grads_in_fp32: bool = True) -> Iterator[tuple]:
    """(model in megatron-core's DDP, settings, device) of the trainer on one rank, full recompute, random weights."""
    cpu_runtime.install()
    device = m.device()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with cpu_runtime.cpu_runtime():
        settings = Settings.from_args(Namespace(
            bf16=bf16, max_tokens_per_gpu=max_tokens, recompute_granularity="full", recompute_method="uniform",
            recompute_num_layers=1, accumulate_allreduce_grads_in_fp32=grads_in_fp32))
        distributed.init_world(0, 1, "127.0.0.1", port)
        distributed.init_model_parallel(settings)
        torch.manual_seed(0)
        model = build_model(model_shape(hf_config(s)), settings, device)
        for p in model.parameters():
            torch.nn.init.normal_(p, 0, 0.02) if p.dim() == 2 else torch.nn.init.ones_(p)
        model = wrap_for_training(model, settings)
        model.train()
        try:
            yield model, settings, device
        finally:
            distributed.leave_world()


def stepper_of(model, settings: Settings, loss: LossSpec, device: torch.device, **changes) -> Stepper:
    own = SimpleNamespace(**{**vars(settings), **changes})
    return Stepper(model=model, loss=loss, settings=own, args=vocabulary_args(Namespace(eps_clip=0.2), model), device=device)


@contextmanager
def switched(leave_out: bool, kernels: bool) -> Iterator[None]:
    """Block with these two switches of the trainer's layers."""
    held = RecomputingBlock.leave_out, trunk_ops.KERNELS
    RecomputingBlock.leave_out, trunk_ops.KERNELS = leave_out, kernels
    try:
        yield
    finally:
        RecomputingBlock.leave_out, trunk_ops.KERNELS = held


def megatron_steps(s: Shape, sizes: list[int], length: int, share: float = 0.10) -> list[dict]:
    """One row a way, size and dtype of the gradient buffers, which are allocated before and counted in the peak."""
    out: list[dict] = []
    for grads in ("fp32", "bf16"):
        with one_rank(s, max(sizes), m.device().type == "cuda", grads == "fp32") as (model, settings, device):
            for tokens in sizes:
                data = step_batch(s, tokens, length, share)
                without = WITHOUT if (grads, tokens) == ("fp32", sizes[0]) else ()  # what they save does not hang on either
                out += [_one_way(model, settings, device, data, name, {"tokens": tokens, "trunk": "megatron", "gradients": grads}) for name in (*WAYS, *without)]
        del model
        m.free()
    return out


def _one_way(model, settings: Settings, device: torch.device, data: dict, name: str, row: dict) -> dict:
    rows, loss, last = WAYS[DEFAULT if name in WITHOUT else name]
    spec = get_loss("sampled_reverse_kl") if loss == "ours" else comparison_loss(loss)
    stepper = stepper_of(model, settings, spec, device, opd_loss_rows=rows, opd_last_layer_rows=last)
    m.free()
    row |= {"way": name, "ms": None, "peak GiB": None}
    try:
        with switched(*WITHOUT.get(name, (True, True))):
            cost = m.measure(lambda: stepper.gradients(data, data["steps"][0]), before=model.zero_grad_buffer, warmup=1, repeats=3)
    except torch.cuda.OutOfMemoryError:
        return row
    return row | {"ms": cost.ms, "spread": cost.spread, "peak GiB": m.gib(cost.peak)}
