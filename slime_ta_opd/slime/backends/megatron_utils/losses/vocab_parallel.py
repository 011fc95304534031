"""Reductions over a vocabulary that is split over a tensor-parallel group.

Everything here works on plain tensors without autograd: the losses write their own gradients, because autograd does not
differentiate an all-reduce and a loss built from it has a right value and a wrong gradient. `group` None is one process.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from ta_opd.errors import ConfigError


def group_size(group) -> int:
    return 1 if group is None else group.size()


def group_rank(group) -> int:
    return 0 if group is None else group.rank()


def all_reduce_(tensor: torch.Tensor, group, op: str = "sum") -> torch.Tensor:
    """In-place all-reduce over the group ("sum" or "max"); returns the tensor. Nothing happens on one process."""
    if group_size(group) > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM, group=group)
    return tensor


@dataclass(frozen=True)
class VocabShard:
    """This rank's part of the vocabulary: ids start .. start + valid; rows valid .. size of the weight are padding."""

    start: int
    size: int
    valid: int
    total: int
    group: object = None

    @classmethod
    def of(cls, num_weight_rows: int, vocab_size: int | None, group=None) -> VocabShard:
        """Shard of a weight with `num_weight_rows` rows on each rank of `group`; `vocab_size` is the number of ids that
        exist (None: no padding). Raises ConfigError when the ranks together hold fewer rows than that."""
        padded = num_weight_rows * group_size(group)
        total = padded if vocab_size is None else int(vocab_size)
        if not 0 < total <= padded:
            raise ConfigError(f"expected a vocabulary of 1 to {padded} ids ({num_weight_rows} rows x {group_size(group)} "
                              f"tensor-parallel ranks), got {total}; pad the LM head to the vocabulary")
        start = num_weight_rows * group_rank(group)
        return cls(start, num_weight_rows, min(max(total - start, 0), num_weight_rows), total, group)

    def common_with(self, other_total: int | None) -> VocabShard:
        """The same shard, restricted to ids below `other_total` (a teacher with a smaller vocabulary)."""
        total = self.total if other_total is None else min(self.total, int(other_total))
        return VocabShard(self.start, self.size, min(max(total - self.start, 0), self.size), total, self.group)

    def local(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(column in this shard, is it here) of global ids of any shape; column 0 where it is not."""
        here = (ids >= self.start) & (ids < self.start + self.valid)
        return torch.where(here, ids - self.start, 0), here


def merge_softmax(max_C: torch.Tensor, sum_C: torch.Tensor, moment_C: torch.Tensor, group):
    """Join what `softmax_ops.row_stats` found on each rank: (max, sum, moment) over the group, relative to the joint max.

    Two all-reduces. A rank with no ids has (-inf, 0, 0).
    """
    if group_size(group) == 1:
        return max_C, sum_C, moment_C
    top_C = all_reduce_(max_C.clone(), group, "max")
    lower_C = torch.where(sum_C > 0, max_C - top_C, 0.0)
    scale_C = torch.where(sum_C > 0, lower_C.exp(), 0.0)
    joined = torch.stack([sum_C * scale_C, (moment_C + sum_C * lower_C) * scale_C])
    sum_C, moment_C = all_reduce_(joined, group).unbind(0)
    return top_C, sum_C, moment_C


def log_sum(max_C: torch.Tensor, sum_C: torch.Tensor) -> torch.Tensor:
    """max + log(sum); -inf where the sum is empty."""
    return torch.where(sum_C > 0, max_C + torch.log(sum_C), -torch.inf)


def gather_columns(logits_CV: torch.Tensor, ids_CK: torch.Tensor, shard: VocabShard) -> torch.Tensor:
    """Logits at global ids, f32 (f64 for f64 logits) [C, K]; 0 at ids outside the vocabulary. One all-reduce."""
    out_dtype = torch.promote_types(logits_CV.dtype, torch.float32)
    if shard.valid == 0:
        picked_CK = torch.zeros(ids_CK.shape, dtype=out_dtype, device=logits_CV.device)
    else:
        columns_CK, here_CK = shard.local(ids_CK)
        picked_CK = torch.where(here_CK, logits_CV.gather(1, columns_CK).to(out_dtype), 0.0)
    return all_reduce_(picked_CK, shard.group)


def add_at_columns_(logits_CV: torch.Tensor, ids_CK: torch.Tensor, values_CK: torch.Tensor, shard: VocabShard) -> None:
    """Add values at global ids, in place; ids that live on another rank (or nowhere, -1) are left out.

    Adding -inf takes an id out of a softmax; ids not here add 0 to column 0, which needs no copy to the host.
    """
    if shard.valid == 0 or ids_CK.shape[1] == 0:
        return
    columns_CK, here_CK = shard.local(ids_CK)
    logits_CV.scatter_add_(1, columns_CK, torch.where(here_CK, values_CK, 0.0).to(logits_CV.dtype))


def top_columns(logits_CV: torch.Tensor, k: int, shard: VocabShard) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest logits over the whole vocabulary: (ids int64 [C, k], logits f32 [C, k]), largest first; ties go to
    whichever torch.topk picks. Padded with id -1 and -inf when the vocabulary has fewer than k ids."""
    rows = logits_CV.shape[0]
    dtype = torch.promote_types(logits_CV.dtype, torch.float32)
    values = torch.full((rows, k), -torch.inf, dtype=dtype, device=logits_CV.device)
    ids = torch.full((rows, k), -1, dtype=torch.int64, device=logits_CV.device)
    here = min(k, shard.valid)
    if here and rows:
        top, column = logits_CV.topk(here, dim=1)
        values[:, :here], ids[:, :here] = top.to(dtype), column + shard.start
    size = group_size(shard.group)
    if size == 1:
        return ids, values
    all_values = [torch.empty_like(values) for _ in range(size)]
    all_ids = [torch.empty_like(ids) for _ in range(size)]
    dist.all_gather(all_values, values, group=shard.group)
    dist.all_gather(all_ids, ids, group=shard.group)
    values, order = torch.cat(all_values, 1).sort(dim=1, descending=True, stable=True)
    return torch.cat(all_ids, 1).gather(1, order)[:, :k], values[:, :k].contiguous()


def merge_pair(stats, group):
    """Join what `softmax_ops.pair_stats` found on each rank, relative to the joint maxima; two all-reduces."""
    if group_size(group) == 1:
        return stats
    top_x, top_y = all_reduce_(torch.stack([stats.max_x, stats.max_y]), group, "max").unbind(0)
    here = stats.sum_x > 0
    dx, dy = torch.where(here, stats.max_x - top_x, 0.0), torch.where(here, stats.max_y - top_y, 0.0)
    scale_x, scale_y = torch.where(here, dx.exp(), 0.0), torch.where(here, dy.exp(), 0.0)
    joined = torch.stack([
        stats.sum_x * scale_x,
        (stats.moment_x + stats.sum_x * dx) * scale_x,
        stats.sum_y * scale_y,
        (stats.reverse + stats.sum_x * (dx - dy)) * scale_x,
        (stats.forward + stats.sum_y * (dy - dx)) * scale_y,
    ])
    sum_x, moment_x, sum_y, reverse, forward = all_reduce_(joined, group).unbind(0)
    return type(stats)(top_x, sum_x, moment_x, top_y, sum_y, reverse, forward)


def reshard_vocab(weight_VH: torch.Tensor, num_rows: int, group) -> torch.Tensor:
    """Rows of an LM head split over the group, moved to shards of `num_rows` rows: rank r gets ids r x num_rows onward.

    For a teacher whose padded vocabulary is not the student's. Done once, when the teacher is loaded: the whole head is on
    every rank for a moment. Ids the head does not have get rows of zeros.
    """
    size = group_size(group)
    parts = [weight_VH]
    if size > 1:
        parts = [torch.empty_like(weight_VH) for _ in range(size)]
        dist.all_gather(parts, weight_VH.contiguous(), group=group)
    whole = torch.cat(parts)
    start = group_rank(group) * num_rows
    mine = whole[start : start + num_rows]
    out = weight_VH.new_zeros(num_rows, weight_VH.shape[1])
    out[: mine.shape[0]] = mine
    return out
