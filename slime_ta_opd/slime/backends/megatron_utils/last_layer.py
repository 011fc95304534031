"""The last layer where only some rows are needed, and a gated MLP that keeps less for its backward pass.

Nothing after the last layer's attention mixes positions, so its queries, attention output, MLP and the final norm are
computed for the needed rows only (`PackedLayout.last_layer_rows`); keys and values are computed for all tokens. Exact.

Shape letters: T packed tokens (on all tensor-parallel ranks together), R needed rows, H hidden size, h query heads and
g key/value groups of this rank, d head size, F MLP width of this rank, tp tensor-parallel size.
"""

from __future__ import annotations

import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from slime.backends.megatron_utils.attention import PackedLayout
from slime.backends.megatron_utils.balancing import BalancedRouter
from slime.backends.megatron_utils.norms import DeferredNorm, RMSNorm
from slime.backends.megatron_utils.recompute import unused_sum
from slime.backends.megatron_utils.rows import gather_rows
from slime.backends.megatron_utils.trunk_ops import swiglu


class RowSelectingLayer(TransformerLayer):
    """A transformer layer that, as the model's last one, computes only the rows that are needed.

    The rows are `packed_seq_params.last_layer_rows` (int64 [R], R a multiple of TP under sequence parallelism); the output is
    [R, 1, H] in that order ([R / TP, 1, H] under sequence parallelism). Where `packed_seq_params.row_queries` is None, or the
    projection is fused with its norm (Transformer Engine), attention covers all tokens and only the MLP the needed rows.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if type(self.mlp) is MLP and not self.config.use_te_activation_func:
            self.mlp.__class__ = GatedMLP  # same parameters, other forward
        if type(getattr(self.mlp, "router", None)) is TopKRouter:
            self.mlp.router.__class__ = BalancedRouter  # same parameters, other balancing loss
        attention = self.self_attention
        if type(attention.q_layernorm) is type(attention.k_layernorm) is RMSNorm:
            attention.q_layernorm.__class__ = attention.k_layernorm.__class__ = DeferredNorm  # same parameters
            attention.core_attention.norms = (attention.q_layernorm, attention.k_layernorm)  # in a tuple: no modules of its own
        self.is_last = self.layer_number == self.config.num_layers
        self.can_select_queries = type(self.self_attention.linear_qkv) is ColumnParallelLinear
        if self.is_last and self.can_select_queries:
            self.self_attention.linear_qkv.__class__ = SplitProjection

    @property
    def can_leave_out(self) -> bool:
        """Whether the MLP's last product can be left out where the layer's output is not read. Experts are computed whole."""
        return type(self.mlp) is GatedMLP and not self.config.fp8 and not self.config.hidden_dropout

    def forward(self, *args, output_unused: bool = False, **kwargs):
        """As megatron-core's layer. `output_unused`: only gradients of the output are wanted, its values are never read."""
        layout = kwargs.get("packed_seq_params")
        if not self.is_last or not layout.select_rows or layout.last_layer_rows is None:
            hidden, _ = self._forward_attention(*args, **kwargs)
        elif layout.row_queries is not None and self.can_select_queries:
            hidden = self._attend_rows(kwargs["hidden_states"], layout)
        else:
            hidden, _ = self._forward_attention(*args, **kwargs)
            hidden = self._rows(hidden, layout.last_layer_rows)
        if output_unused and self.can_leave_out:
            inner = self.mlp.inner(self._forward_pre_mlp_layernorm(hidden))
            group = self.tp_group if self.config.sequence_parallel else None
            return unused_sum(hidden, inner, self.mlp.linear_fc2.weight, group), None
        return self._forward_mlp(hidden), None

    def _rows(self, hidden: Tensor, rows_R: Tensor) -> Tensor:
        """Rows of hidden states as this rank holds them: [R, 1, H], or [R / tp, 1, H] under sequence parallelism."""
        if not self.config.sequence_parallel:
            return gather_rows(hidden, rows_R, None)
        return scatter_to_sequence_parallel_region(gather_rows(hidden, rows_R, self.tp_group), group=self.tp_group)

    def _attend_rows(self, hidden: Tensor, layout: PackedLayout) -> Tensor:
        """Attention of the needed rows to all tokens, with its residual; returned as `_rows` returns rows."""
        attention, rows_R = self.self_attention, layout.last_layer_rows
        query, key, value = attention.linear_qkv(self.input_layernorm(hidden), rows_R, attention.hidden_size_per_attention_head)
        if attention.q_layernorm is not None:
            query = attention.q_layernorm(query)
        if attention.k_layernorm is not None:
            key = attention.k_layernorm(key)
        out = attention.linear_proj(attention.core_attention.forward_rows(query, key, value, layout))
        with self.bias_dropout_add_exec_handler():
            add = self.self_attn_bda(self.training, self.config.bias_dropout_fusion)
            return add(out, self._rows(hidden, rows_R), self.hidden_dropout)


class SplitProjection(ColumnParallelLinear):
    """megatron-core's joint projection; given rows, it computes queries for these and keys and values for all tokens."""

    def forward(self, hidden: Tensor, rows_R: Tensor | None = None, head_dim: int = 0):
        """hidden [T, 1, H] ([T / tp, 1, H] under sequence parallelism) -> query [R, 1, h, d], key and value [T, 1, g, d].

        Without `rows_R`: the joint projection, as megatron-core gives it.
        """
        if rows_R is None:
            return super().forward(hidden)
        if self.sequence_parallel:
            whole = gather_from_sequence_parallel_region(hidden, group=self.tp_group)
        else:
            whole = copy_to_tensor_model_parallel_region(hidden, group=self.tp_group)
        groups = self.config.num_query_groups // self.tp_group.size()
        queries = self.config.num_attention_heads // self.config.num_query_groups * head_dim
        (weight_q, weight_kv), (bias_q, bias_kv) = (_split_groups(x, groups, queries) for x in (self.weight, self.bias))
        query = F.linear(whole.index_select(0, rows_R), weight_q, bias_q).unflatten(-1, (-1, head_dim))
        key, value = F.linear(whole, weight_kv, bias_kv).unflatten(-1, (groups, 2 * head_dim)).split(head_dim, dim=-1)
        return query, key, value


def _split_groups(joint: Tensor | None, groups: int, queries: int) -> tuple[Tensor | None, Tensor | None]:
    """Rows of the joint projection, [q of a group, k, v] for each group -> (rows of all queries, rows of all keys and values)."""
    if joint is None:
        return None, None
    parts = joint.unflatten(0, (groups, -1))
    return parts[:, :queries].flatten(0, 1), parts[:, queries:].flatten(0, 1)


class GatedMLP(MLP):
    """megatron-core's MLP with `swiglu`; the same parameters and results."""

    def forward(self, hidden: Tensor, per_token_scale: Tensor | None = None, **unused):
        return self.linear_fc2(self.inner(hidden))

    def inner(self, hidden: Tensor) -> Tensor:
        """Input of the last product, [T, 1, F]; hidden: [T, 1, H] ([T / tp, 1, H] under sequence parallelism)."""
        return swiglu(self.linear_fc1(hidden)[0])
