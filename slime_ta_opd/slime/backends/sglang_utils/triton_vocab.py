"""Triton kernels behind `vocab_rows`: rows of logits are read once, whatever K is. Import only where Triton is.

Columns are taken in groups. The first kernel writes each group's maximum, and for each of its blocks the maximum and the sum of
exponentials relative to it. Any of a row's K largest values lies in one of the K groups with the largest maxima (were it in none of
them, K groups would each hold a value at least as large), so the second kernel, one program a row, finds those groups and then
looks at their columns only: K x _GROUP of 151,936.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOW = tl.constexpr(-3e38)  # stands for -inf until the end, so that a value that was taken (-inf) is below all others
_CANDIDATES = 4096  # at most: columns that the second kernel keeps in registers
_BLOCK = 4096  # columns of one program of the first
_MOST_GROUPS = 8192
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _group(k: int) -> int:
    """Columns of a group: fewer for a larger k, so that the groups that are looked at stay few columns in all."""
    return min(128, _CANDIDATES // triton.next_power_of_2(k))


def takes(rows_RV: Tensor, k: int) -> bool:
    """Whether these kernels serve `rows_RV` [R, V] and `k`: 1 to 256 of a vocabulary not much smaller than a block."""
    R, V = rows_RV.shape
    served = R > 0 and rows_RV.dtype in _DTYPES and rows_RV.stride(1) == 1 and 0 <= k <= 256 and V >= _BLOCK // 2
    return served and triton.cdiv(V, _group(max(k, 1))) <= _MOST_GROUPS


@triton.jit
def _groups_kernel(x_ptr, maxima_ptr, top_ptr, sum_ptr, stride, columns, groups, GROUP: tl.constexpr, GROUPS: tl.constexpr,
                   SUMS: tl.constexpr):  # fmt: skip
    row, block, blocks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    group = block * GROUPS + tl.arange(0, GROUPS)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = tl.load(x_ptr + row * stride + column, mask=column < columns, other=-float("inf")).to(tl.float32)
    maxima = tl.max(x, 1)
    tl.store(maxima_ptr + row * groups + group, maxima, mask=group < groups)
    if SUMS:
        top = tl.maximum(tl.max(maxima), LOW)
        tl.store(top_ptr + row * blocks + block, top)
        tl.store(sum_ptr + row * blocks + block, tl.sum(tl.exp(x - top)))


@triton.jit
def _largest_kernel(x_ptr, maxima_ptr, log_z_ptr, values_ptr, ids_ptr, stride, columns, groups, TAKE: tl.constexpr, GROUP: tl.constexpr,
                    K: tl.constexpr, GROUPS: tl.constexpr, SUMS: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    number, slot = tl.arange(0, GROUPS), tl.arange(0, K)
    maxima = tl.load(maxima_ptr + row * groups + number, mask=number < groups, other=-float("inf"))
    maxima = tl.where(number < groups, tl.maximum(maxima, LOW), -float("inf"))
    best = tl.full([K], groups, tl.int32)  # a group past the last one has no columns
    for i in range(TAKE):
        top, at = tl.max(maxima, 0, return_indices=True)
        best = tl.where(slot == i, tl.where(top >= LOW, at, groups), best)  # fewer groups than k: the rest stay past the last one
        maxima = tl.where(number == at, -float("inf"), maxima)
    column = tl.reshape(best[:, None] * GROUP + tl.arange(0, GROUP)[None, :], [K * GROUP])
    x = tl.load(x_ptr + row * stride + column, mask=column < columns, other=-float("inf")).to(tl.float32)
    x = tl.where(column < columns, tl.maximum(x, LOW), -float("inf"))
    place = tl.arange(0, K * GROUP)
    values = tl.full([K], -float("inf"), tl.float32)
    ids = tl.zeros([K], tl.int32)
    for i in range(TAKE):
        value, at = tl.max(x, 0, return_indices=True)
        taken = place == at
        ids = tl.where(slot == i, tl.sum(tl.where(taken, column, 0)), ids)
        values = tl.where(slot == i, value, values)
        x = tl.where(taken, -float("inf"), x)
    values = tl.where(values > LOW, values, -float("inf"))
    if SUMS:
        values -= tl.load(log_z_ptr + row)
    tl.store(values_ptr + row * TAKE + slot, values, mask=slot < TAKE)
    tl.store(ids_ptr + row * TAKE + slot, ids.to(tl.int64), mask=slot < TAKE)


def _scan(rows_RV: Tensor, k: int, sums: bool) -> tuple[Tensor, Tensor | None]:
    """(maxima of the groups [R, groups], log of the sum of exponentials [R] or None)"""
    R, V = rows_RV.shape
    group = _group(max(k, 1))
    groups, blocks = triton.cdiv(V, group), triton.cdiv(V, _BLOCK)
    empty = lambda n: torch.empty((R, n), dtype=torch.float32, device=rows_RV.device)  # noqa: E731
    maxima, top, total = empty(groups), empty(blocks if sums else 0), empty(blocks if sums else 0)
    _groups_kernel[(R, blocks)](rows_RV, maxima, top, total, rows_RV.stride(0), V, groups, GROUP=group, GROUPS=_BLOCK // group, SUMS=sums,
                                num_warps=8)  # fmt: skip
    if not sums:
        return maxima, None
    highest = top.amax(1, keepdim=True)
    return maxima, (highest[:, 0] + (total * (top - highest).exp()).sum(1).log())


def _select(rows_RV: Tensor, maxima: Tensor, log_z_R: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    R, V = rows_RV.shape
    values = torch.empty((R, k), dtype=torch.float32, device=rows_RV.device)
    ids = torch.empty((R, k), dtype=torch.int64, device=rows_RV.device)
    if k:
        _largest_kernel[(R,)](rows_RV, maxima, log_z_R, values, ids, rows_RV.stride(0), V, maxima.shape[1], TAKE=k, GROUP=_group(k),
                              K=triton.next_power_of_2(k), GROUPS=triton.next_power_of_2(maxima.shape[1]), SUMS=log_z_R is not None,
                              num_warps=4)  # fmt: skip
    return values, ids


def log_probs(logits_RV: Tensor, tokens_R: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fields of `vocab_rows.Rows`."""
    maxima, log_z_R = _scan(logits_RV, k, True)
    values_RK, ids_RK = _select(logits_RV, maxima, log_z_R, k)
    return logits_RV.gather(1, tokens_R[:, None])[:, 0].float() - log_z_R, values_RK, ids_RK, log_z_R


def largest(rows_RV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `vocab_rows.largest`."""
    values_RK, ids_RK = _select(rows_RV, _scan(rows_RV, k, False)[0], None, k)
    return values_RK.to(rows_RV.dtype), ids_RK
