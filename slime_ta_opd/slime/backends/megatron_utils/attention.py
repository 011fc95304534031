"""Causal attention over packed sequences, on GPU and CPU, with context parallelism.

Shape letters: T packed tokens on this rank, S keys that this rank attends to, R rows, h query heads, g key/value heads,
d head size, N sequence segments.

A segment is a run of queries with its own run of keys; query i of n attends to keys 0 .. m-n+i of its m (bottom-right
causal). The last layer may ask for some rows only: queries of these against all keys, by a mask. Without context
parallelism a segment is a sequence. With it every sequence is cut into 2 x CP chunks, rank r holds chunks r and 2CP-1-r,
keys and values are all-gathered, and each held chunk is a segment whose keys are the sequence up to the chunk's end.
"""

from __future__ import annotations

import functools
import inspect
import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from slime.backends.megatron_utils.trunk_ops import norm_rotate, rotate

# All but cuDNN, which builds a plan for every new pair of lengths: with rows that differ from batch to batch that took longer than the step.
_MASKED_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class RowQueries:
    """Which keys each needed row attends to.

    order: int64 [R], rows by packed index, segment after segment. keys_seen: int64 [R] in that order, how many of its
    segment's keys a row attends to. segments: (first row, end row, first key, end key) of each segment that has rows,
    rows counted in that order.
    """

    order: Tensor
    keys_seen: Tensor
    segments: list[tuple[int, int, int, int]]


@dataclass
class PackedLayout(PackedSeqParams):
    """Where the segments of a packed micro-batch lie.

    cu_seqlens_q, cu_seqlens_kv: int32 [N+1]; max_seqlen_q, max_seqlen_kv: ints. kv_index: int64 [S], for context
    parallelism, which row of the all-gathered keys ([CP x T]) each attended key is. last_layer_rows: int64 [R] or None,
    rows whose last-layer output is needed (see last_layer.RowSelectingLayer); select_rows: whether the last layer gives only
    these. row_queries: how they attend where queries are computed for them only; None where for all tokens. turns: cosine and sine [T, d / 2] of each
    token's rotary angles, set by the model; megatron-core gets no angles, and attention turns queries and keys itself. qkv_format is not
    "thd": megatron-core then keeps [T, 1, h, d].
    """

    qkv_format: str = "packed"
    kv_index: Tensor | None = None
    last_layer_rows: Tensor | None = None
    select_rows: bool = True
    row_queries: RowQueries | None = None
    turns: tuple[Tensor, Tensor] | None = None


class PackedAttention(MegatronModule):
    """Core attention for megatron-core's layer spec: torch's varlen kernel on GPU, SDPA per segment on CPU."""

    def __init__(
        self,
        config,
        layer_number,
        attn_mask_type,
        attention_type,
        attention_dropout=None,
        softmax_scale=None,
        cp_comm_type=None,
        pg_collection=None,
    ):
        super().__init__(config=config)
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.cp_group = pg_collection.cp
        self.norms: tuple | None = None  # of queries and keys, where attention applies them (see DeferredNorm)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        attn_mask_type=None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedLayout | None = None,
    ) -> Tensor:
        """query [T, 1, h, d], key and value [T, 1, g, d] -> [T, 1, h x d]."""
        layout = packed_seq_params
        k_Sgd, v_Sgd = self._keys(key, value, layout)
        out = segment_attention(
            self._turn(query, 0, layout.turns), k_Sgd, v_Sgd, layout.cu_seqlens_q, layout.cu_seqlens_kv, layout.max_seqlen_q, layout.max_seqlen_kv,
            self.scale,
        )  # fmt: skip
        return out.reshape(out.size(0), 1, -1)

    def forward_rows(self, query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout) -> Tensor:
        """The same for the queries of `layout.last_layer_rows`: query [R, 1, h, d], key and value [T, 1, g, d] -> [R, 1, h x d]."""
        turns = tuple(x.index_select(0, layout.last_layer_rows) for x in layout.turns)
        out = row_attention(self._turn(query, 0, turns), *self._keys(key, value, layout), layout.row_queries, self.scale)
        return out.reshape(out.size(0), 1, -1)

    def _turn(self, heads: Tensor, which: int, turns: tuple[Tensor, Tensor]) -> Tensor:
        """Queries (0) or keys (1) [T, 1, h, d] as they meet: normalised, where that was deferred, and turned; [T, h, d]."""
        if self.norms is None:
            return rotate(heads.squeeze(1), *turns)
        return norm_rotate(heads.squeeze(1), self.norms[which].weight, self.norms[which].eps, *turns)

    def _keys(self, key: Tensor, value: Tensor, layout: PackedLayout) -> tuple[Tensor, Tensor]:
        """Turned keys, and values, that this rank's segments attend to, [S, g, d] each."""
        key, value = self._turn(key, 1, layout.turns), value.squeeze(1)
        if self.cp_group.size() == 1:
            return key, value
        both = _AllGather.apply(torch.cat([key, value], dim=-1), self.cp_group)
        return both.index_select(0, layout.kv_index).chunk(2, dim=-1)


def segment_attention(
    q_Thd: Tensor, k_Sgd: Tensor, v_Sgd: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, scale: float
) -> Tensor:
    """Bottom-right causal attention of each segment's queries to its keys; [T, h, d]."""
    if q_Thd.is_cuda and q_Thd.dtype in (torch.bfloat16, torch.float16):
        kernel, options = _varlen_kernel()
        return kernel(q_Thd, k_Sgd.contiguous(), v_Sgd.contiguous(), cu_q, cu_k, max_q, max_k, scale=scale, **options)
    outs = []
    q_bounds, k_bounds = cu_q.tolist(), cu_k.tolist()
    for i in range(len(q_bounds) - 1):
        q = q_Thd[q_bounds[i] : q_bounds[i + 1]].transpose(0, 1)
        k, v = (x[k_bounds[i] : k_bounds[i + 1]].transpose(0, 1) for x in (k_Sgd, v_Sgd))
        n, m = q.size(1), k.size(1)
        mask = None if n == m else torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)
        out = F.scaled_dot_product_attention(
            q[None], k[None], v[None], attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=k.size(0) != q.size(0)
        )
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


def row_attention(q_Rhd: Tensor, k_Sgd: Tensor, v_Sgd: Tensor, rows: RowQueries, scale: float) -> Tensor:
    """Attention of each row to the keys it sees; [R, h, d] in the order of the queries given."""
    q_Rhd = q_Rhd.index_select(0, rows.order)
    repeat = q_Rhd.size(1) // k_Sgd.size(1)
    outs = []
    with sdpa_kernel(_MASKED_KERNELS):
        for first, end, key, key_end in rows.segments:
            q, k, v = (x.transpose(0, 1)[None] for x in (q_Rhd[first:end], k_Sgd[key:key_end], v_Sgd[key:key_end]))
            if q.is_cuda and repeat > 1:  # the kernels that take a mask want as many key heads as query heads
                k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
            mask = torch.arange(key_end - key, device=q.device) < rows.keys_seen[first:end, None]
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=k.size(1) != q.size(1))
            outs.append(out[0].transpose(0, 1))
    return torch.cat(outs).index_select(0, torch.argsort(rows.order))


@functools.lru_cache(maxsize=1)
def _varlen_kernel():
    """torch's packed FlashAttention and the options that make it causal; the signature differs between versions."""
    from torch.nn.attention.varlen import varlen_attn

    names = inspect.signature(varlen_attn).parameters
    options = {"window_size": (-1, 0)} if "window_size" in names else {"is_causal": True}
    if "enable_gqa" in names:
        options["enable_gqa"] = True
    return varlen_attn, options


class _AllGather(torch.autograd.Function):
    """[T, ...] on every rank of a group -> [size x T, ...] in rank order; backward sums and returns the own part."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        out = x.new_empty((group.size() * x.size(0), *x.shape[1:]))
        dist.all_gather_into_tensor(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        own = grad.new_empty((grad.size(0) // ctx.group.size(), *grad.shape[1:]))
        dist.reduce_scatter_tensor(own, grad.contiguous(), group=ctx.group)
        return own, None
