"""Full recompute that leaves out what the backward pass does not read.

A checkpointed block of layers is computed again to get what backward needs. The block's own output is not among that: the
last product of its last MLP (its reduction over tensor parallel ranks, and the residual added to it) would only be thrown
away. Gradients need the product's input and weight, so the recomputation ends there. Exact, to the bit.

Shape letters: T packed tokens on this rank (rows where the last layer computes only these), H hidden size, F MLP width of this
rank, tp tensor-parallel size.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import checkpoint
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor
from torch.autograd.function import once_differentiable

from slime.backends.megatron_utils.attention import PackedLayout


class RecomputingBlock(TransformerBlock):
    """megatron-core's layers of a pipeline stage; with full recompute, a block's last layer knows when its output is not read.

    `leave_out` False: recompute everything (to compare).
    """

    leave_out = True

    def _checkpointed_forward(self, hidden_states: Tensor, packed_seq_params: PackedLayout, **unused) -> Tensor:
        """hidden states [T, 1, H] ([T / tp, 1, H] under sequence parallelism) -> the same after all layers of this stage."""
        config, layers = self.config, self.layers

        def run(first: int, end: int, hidden: Tensor) -> Tensor:
            again = torch.is_grad_enabled()  # the first pass runs without gradients
            for i in range(first, end):
                hidden, _ = layers[i](
                    hidden_states=hidden,
                    attention_mask=None,
                    packed_seq_params=packed_seq_params,
                    output_unused=again and i == end - 1 and self.leave_out,
                )
            return hidden

        hidden = hidden_states
        if config.recompute_method == "uniform":
            for first in range(0, len(layers), config.recompute_num_layers):
                end = min(first + config.recompute_num_layers, len(layers))
                hidden = checkpoint(partial(run, first, end), config.distribute_saved_activations, hidden)
            return hidden
        for i in range(len(layers)):  # "block": the first layers, each on its own
            if i < config.recompute_num_layers:
                hidden = checkpoint(partial(run, i, i + 1), config.distribute_saved_activations, hidden)
            else:
                hidden, _ = layers[i](hidden_states=hidden, attention_mask=None, packed_seq_params=packed_seq_params)
        return hidden


def unused_sum(residual: Tensor, inner: Tensor, weight: Tensor, tp_group: dist.ProcessGroup | None) -> Tensor:
    """Stands for residual + reduced(inner x weight') where only gradients are wanted: zeros of its shape that hold no memory.

    residual: [T, 1, H], or with `tp_group` (sequence parallelism) this rank's [T / tp, 1, H]. inner: [T, 1, F]. weight: [H, F].
    """
    return _UnusedSum.apply(residual, inner, weight, tp_group)


class _UnusedSum(torch.autograd.Function):
    """The products of megatron-core's own backward pass, in its order."""

    @staticmethod
    def forward(ctx, residual: Tensor, inner: Tensor, weight: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.save_for_backward(inner, weight)
        ctx.group = group
        return residual.new_zeros(()).expand(residual.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        inner, weight = ctx.saved_tensors
        whole = grad.contiguous()
        if ctx.group is not None and ctx.group.size() > 1:
            whole = grad.new_empty((grad.size(0) * ctx.group.size(), *grad.shape[1:]))
            dist.all_gather_into_tensor(whole, grad.contiguous(), group=ctx.group)
        grad_inner = whole.matmul(weight) if ctx.needs_input_grad[1] else None
        grad_weight = whole.flatten(0, -2).t().matmul(inner.flatten(0, -2)) if ctx.needs_input_grad[2] else None
        return grad, grad_inner, grad_weight, None
