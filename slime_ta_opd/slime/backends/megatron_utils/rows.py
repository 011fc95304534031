"""Picking rows out of packed hidden states, also where the sequence is split over tensor-parallel ranks.

Shape letters: T packed tokens, R rows, H hidden size, tp tensor-parallel size.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def gather_rows(hidden: Tensor, rows_R: Tensor, tp_group: dist.ProcessGroup | None) -> Tensor:
    """Rows of the packed hidden states, the same on every tensor-parallel rank.

    hidden: [T, ...], or with `tp_group` (sequence parallelism) this rank's [T / tp, ...]. rows_R: int64 indices into T.
    Returns [R, ...]. The incoming gradient must be complete on every rank of the group; no reduction is done to it.
    """
    if tp_group is None or tp_group.size() == 1:
        return hidden.index_select(0, rows_R)
    return _GatherRows.apply(hidden, rows_R, tp_group)


class _GatherRows(torch.autograd.Function):
    """Each rank writes the rows it holds, the rest stays zero, and one all-reduce of [R, ...] joins them."""

    @staticmethod
    def forward(ctx, hidden: Tensor, rows_R: Tensor, group: dist.ProcessGroup) -> Tensor:
        local = hidden.size(0)
        held = torch.nonzero(rows_R // local == group.rank()).squeeze(1)
        index = rows_R[held] - group.rank() * local
        out = hidden.new_zeros((rows_R.numel(), *hidden.shape[1:]))
        out[held] = hidden[index]
        dist.all_reduce(out, group=group)
        ctx.save_for_backward(held, index)
        ctx.local = local
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        held, index = ctx.saved_tensors
        grad_hidden = grad.new_zeros((ctx.local, *grad.shape[1:]))
        grad_hidden.index_add_(0, index, grad[held])
        return grad_hidden, None, None
