"""The LM head and a loss on top of it, chunk by chunk over rows, vocabulary-parallel.

One chunk of logits exists at a time and is overwritten by its own gradient, so no [R, V] tensor is kept, in any dtype.

Two ways, the same gradients:
- the per-row factor of the objective is known (`factor_R`): loss and gradients are made in one pass, 3 products of
  rows x hidden x vocabulary, and `TokenLoss.total` = sum factor_R x loss_R carries them;
- it is not known: the forward pass keeps nothing and the backward pass recomputes each chunk, 4 products;
  `TokenLoss.loss_R` is differentiable.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable

from slime.backends.megatron_utils.losses.softmax_ops import scale_
from slime.backends.megatron_utils.losses.types import TokenLoss
from slime.backends.megatron_utils.losses.vocab_parallel import VocabShard, all_reduce_
from ta_opd.errors import ConfigError, NumericsError

# fn(logits_CV, lo, hi, scale_C) -> (loss_C, stats): loss of rows lo..hi. With scale_C, it also overwrites logits_CV with
# scale_C x (gradient of loss_C with respect to the unscaled logits).
ChunkLoss = Callable[[torch.Tensor, int, int, torch.Tensor | None], tuple[torch.Tensor, dict[str, torch.Tensor]]]

_ROW_TILE = 128
CHUNK_BYTES = {"cuda": 512 << 20, "cpu": 64 << 20}  # of logits; on CPU the torch bodies also make f32 copies of a chunk


def auto_chunk_rows(num_rows: int, num_columns: int, itemsize: int, chunk_bytes: int) -> int:
    """Rows of a chunk of at most `chunk_bytes` of logits (128 rows at least): equal chunks, in whole tiles of 128 rows."""
    most = max(_ROW_TILE, chunk_bytes // max(1, num_columns * itemsize))
    if num_rows <= most:
        return max(1, num_rows)
    even = -(-num_rows // -(-num_rows // most))
    return min(-(-even // _ROW_TILE) * _ROW_TILE, most)


def chunk_bytes_on(tensor: torch.Tensor) -> int:
    return CHUNK_BYTES["cuda" if tensor.is_cuda else "cpu"]


class _Head:
    """Walks over the chunks of one LM-head product."""

    def __init__(self, hidden_RH, weight_VH, shard: VocabShard, chunk_rows: int):
        self.hidden, self.weight, self.shard = hidden_RH.detach(), weight_VH.detach()[: shard.valid], shard
        self.chunk_rows = max(1, min(chunk_rows, hidden_RH.shape[0]))

    def chunks(self):
        """Yield (lo, hi, logits [C, valid]); the logits share one buffer, whose row stride is a multiple of 64."""
        num_rows, columns = self.hidden.shape[0], self.shard.valid
        stride = -(-columns // 64) * 64
        buffer = self.hidden.new_empty(self.chunk_rows, stride)[:, :columns]
        for lo in range(0, num_rows, self.chunk_rows):
            hi = min(lo + self.chunk_rows, num_rows)
            logits_CV = buffer[: hi - lo]
            if columns:
                torch.mm(self.hidden[lo:hi], self.weight.t(), out=logits_CV)
            yield lo, hi, logits_CV

    def run(self, chunk_loss: ChunkLoss, scale_R, want_hidden: bool, want_weight: bool):
        """Loss of every row, statistics, and with scale_R the gradients of sum(scale_R x loss_R)."""
        num_rows, size = self.hidden.shape[0], self.shard.size
        losses, stats = [], []
        grad_hidden = torch.zeros_like(self.hidden) if want_hidden else None
        grad_weight = self.hidden.new_empty(size, self.hidden.shape[1]) if want_weight else None
        if grad_weight is not None:
            grad_weight[self.shard.valid if num_rows else 0:].zero_()
        for lo, hi, logits_CV in self.chunks():
            loss_C, stats_C = chunk_loss(logits_CV, lo, hi, None if scale_R is None else scale_R[lo:hi])
            losses.append(loss_C)
            stats.append(stats_C)
            if self.shard.valid == 0:
                continue
            if want_hidden:
                torch.mm(logits_CV, self.weight, out=grad_hidden[lo:hi])
            if want_weight:
                part = grad_weight[: self.shard.valid]
                if lo == 0:
                    torch.mm(logits_CV.t(), self.hidden[lo:hi], out=part)
                else:
                    part.addmm_(logits_CV.t(), self.hidden[lo:hi])
        if want_hidden and num_rows:
            all_reduce_(grad_hidden, self.shard.group)
        loss_R = torch.cat(losses) if losses else self.hidden.new_zeros(0, dtype=torch.float32)
        return loss_R, _join(stats), grad_hidden, grad_weight


def _join(stats: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([part[name] for part in stats]) for name in stats[0]} if stats else {}


class _FactorKnown(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_RH, weight_VH, factor_R, chunk_loss, shard, chunk_rows, stats):
        head = _Head(hidden_RH, weight_VH, shard, chunk_rows)
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        loss_R, found, ctx.grad_hidden, ctx.grad_weight = head.run(chunk_loss, factor_R, want_hidden, want_weight)
        stats.update(found)
        ctx.mark_non_differentiable(loss_R)
        return (loss_R * factor_R).sum(), loss_R

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total, _):
        grads = (ctx.grad_hidden, ctx.grad_weight)
        if all(grad is None for grad in grads):
            raise NumericsError("expected one backward pass through a loss with known row factors, got a second one; "
                                "compute the loss again, or leave Rows.factor_R at None")
        ctx.grad_hidden = ctx.grad_weight = None
        return (*(None if grad is None else scale_(grad, grad_total) for grad in grads), None, None, None, None, None)


class _FactorUnknown(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_RH, weight_VH, chunk_loss, shard, chunk_rows, stats):
        head = _Head(hidden_RH, weight_VH, shard, chunk_rows)
        loss_R, found, _, _ = head.run(chunk_loss, None, False, False)
        stats.update(found)
        ctx.save_for_backward(hidden_RH, weight_VH)
        ctx.rest = (chunk_loss, shard, chunk_rows)
        return loss_R

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_R):
        chunk_loss, shard, chunk_rows = ctx.rest
        head = _Head(*ctx.saved_tensors, shard, chunk_rows)
        _, _, grad_hidden, grad_weight = head.run(chunk_loss, grad_R, *ctx.needs_input_grad[:2])
        return grad_hidden, grad_weight, None, None, None, None


def linear_loss(hidden_RH: torch.Tensor, weight_VH: torch.Tensor, chunk_loss: ChunkLoss, *, shard: VocabShard,
                factor_R: torch.Tensor | None = None, chunk_rows: int | None = None) -> TokenLoss:
    """Loss of the rows under the LM head `logits = hidden @ weight.T`, restricted to the ids that exist.

    hidden_RH [R, H] and weight_VH [V/tp, H] have one dtype; all ranks of the group hold the same rows (R may be 0: the
    gradients are then zero, and no rank waits for another). The gradient of hidden is summed over the group, that of
    weight is the shard's own, 0 in the padding. Raises ConfigError on dtypes or shapes that do not fit.
    """
    if hidden_RH.dim() != 2 or hidden_RH.shape[1] != weight_VH.shape[1] or hidden_RH.dtype != weight_VH.dtype:
        raise ConfigError(f"expected hidden [R, H] and weight [V, H] of one dtype, got {tuple(hidden_RH.shape)} "
                          f"{hidden_RH.dtype} and {tuple(weight_VH.shape)} {weight_VH.dtype}")
    rows = chunk_rows or auto_chunk_rows(hidden_RH.shape[0], shard.valid, hidden_RH.element_size(), chunk_bytes_on(hidden_RH))
    stats: dict[str, torch.Tensor] = {}
    if factor_R is None:
        loss_R = _FactorUnknown.apply(hidden_RH, weight_VH, chunk_loss, shard, rows, stats)
        return TokenLoss(loss_R, stats)
    if not torch.is_grad_enabled():
        loss_R, stats, _, _ = _Head(hidden_RH, weight_VH, shard, rows).run(chunk_loss, None, False, False)
        return TokenLoss(loss_R, stats, (loss_R * factor_R).sum())
    total, loss_R = _FactorKnown.apply(hidden_RH, weight_VH, factor_R, chunk_loss, shard, rows, stats)
    return TokenLoss(loss_R, stats, total)
