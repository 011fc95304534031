"""The model on one rank: a megatron-core GPT over packed sequences that ends at the last hidden states.

Shape letters: T packed tokens on this rank, H hidden size, d head size, V vocabulary.

The vocabulary matrix is reached only through `LossHead`: the caller hands a function of (hidden states, weight shard) to
`forward`, so that losses decide which rows meet the matrix, and megatron-core's hooks on the output layer still fire.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from megatron.core import parallel_state as mpu
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from slime.backends.megatron_utils.attention import PackedLayout
from slime.backends.megatron_utils.hf_config import ModelShape, rope_inv_freq
from slime.backends.megatron_utils.layer_spec import block_spec
from slime.backends.megatron_utils.recompute import RecomputingBlock
from slime.backends.megatron_utils.settings import Settings

Head = Callable[[Tensor, Tensor], Tensor]
_SHARDED = {ColumnParallelLinear: 0, VocabParallelEmbedding: 0, RowParallelLinear: 1}


class LossHead(ColumnParallelLinear):
    """The output layer: gives its weight shard [V / tp, H] to a function of the hidden states instead of multiplying."""

    def forward(self, hidden: Tensor, function: Head, weight: Tensor | None = None) -> Tensor:
        return function(hidden, self.weight if weight is None else weight)


class PackedGPTModel(GPTModel):
    """GPT over packed sequences: tokens in, last hidden states or a loss out."""

    def __init__(self, shape: ModelShape, **kwargs):
        super().__init__(**kwargs)
        self.shape = shape
        self.inv_freq = rope_inv_freq(shape)
        self.decoder.__class__ = RecomputingBlock  # same parameters, other recomputation
        if self.post_process:
            self.output_layer.__class__ = LossHead  # same parameters, other forward

    def forward(self, tokens_1T: Tensor, positions_1T: Tensor, layout: PackedLayout, head: Head | None = None) -> Tensor:
        """tokens, positions int64 [1, T] -> last hidden states [T, 1, H] ([T / tp, 1, H] under sequence parallelism; the
        selected rows only where `layout.last_layer_rows` is set), or `head(hidden, weight)` on the last stage."""
        hidden = self.embedding(input_ids=tokens_1T, position_ids=positions_1T) if self.pre_process else None
        hidden = self.decoder(
            hidden_states=hidden,
            attention_mask=None,
            packed_seq_params=replace(layout, turns=self._turns(positions_1T[0])),
        )
        if not self.post_process or head is None:
            return hidden
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        if weight is not None and self.pre_process:
            weight = _GradientToBuffer.apply(weight)
        return self.output_layer(hidden, head, weight)

    def _turns(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of each packed token's rotary angles, [T, d / 2] in the parameters' dtype."""
        self.inv_freq = self.inv_freq.to(positions_T.device)
        angles = positions_T.float()[:, None] * self.inv_freq[None, :]
        return angles.cos().to(self.config.params_dtype), angles.sin().to(self.config.params_dtype)


class _GradientToBuffer(torch.autograd.Function):
    """Adds the head's gradient of a tied embedding to the gradient buffer at once.

    Autograd would hold it, [V / tp, H], until the embedding's own gradient comes at the end of the backward pass.
    """

    @staticmethod
    def forward(ctx, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor | None:
        buffer = getattr(ctx.weight, "main_grad", None)
        if buffer is None:
            return grad
        buffer.add_(grad)
        return None


def transformer_config(shape: ModelShape, settings: Settings, dtype: torch.dtype | None = None) -> TransformerConfig:
    """megatron-core's configuration of this shape in this layout; `dtype` overrides the settings' one."""
    dtype = dtype or settings.dtype
    cuda = torch.cuda.is_available()
    te = settings.transformer_impl == "transformer_engine"
    kwargs = dict(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_kv_heads,
        kv_channels=shape.head_dim,
        layernorm_epsilon=shape.norm_eps,
        normalization="RMSNorm",
        qk_layernorm=shape.qk_norm,
        add_qkv_bias=shape.qkv_bias,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=settings.tensor_model_parallel_size,
        pipeline_model_parallel_size=settings.pipeline_model_parallel_size,
        context_parallel_size=settings.context_parallel_size,
        expert_model_parallel_size=settings.expert_model_parallel_size if shape.is_moe else 1,
        sequence_parallel=settings.sequence_parallel,
        recompute_granularity=settings.recompute_granularity,
        recompute_method=settings.recompute_method,
        recompute_num_layers=settings.recompute_num_layers,
        recompute_modules=settings.recompute_modules,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        transformer_impl=settings.transformer_impl,
        use_cpu_initialization=not cuda,
        perform_initialization=False,
        calculate_per_token_loss=True,
        variable_seq_lengths=True,
        batch_p2p_sync=cuda,
        moe_token_dispatcher_type="alltoall",
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=te,
    )
    if shape.is_moe:
        kwargs.update(
            num_moe_experts=shape.num_experts,
            expert_tensor_parallel_size=settings.expert_tp,
            moe_router_topk=shape.experts_per_token,
            moe_ffn_hidden_size=shape.moe_ffn_hidden_size,
            moe_router_pre_softmax=not shape.norm_topk_prob,
            moe_router_load_balancing_type="aux_loss" if settings.moe_aux_loss_coeff else "none",
            moe_aux_loss_coeff=settings.moe_aux_loss_coeff,
            moe_grouped_gemm=te,
        )
    return TransformerConfig(**kwargs)


def build_model(shape: ModelShape, settings: Settings, device: torch.device, dtype: torch.dtype | None = None):
    """This rank's part of the model, uninitialised: weights are loaded next. Returns PackedGPTModel on `device`."""
    config = transformer_config(shape, settings, dtype)
    model = PackedGPTModel(
        shape,
        config=config,
        transformer_layer_spec=block_spec(config, settings.transformer_impl),
        vocab_size=shape.padded_vocab(settings.make_vocab_size_divisible_by, settings.tensor_model_parallel_size),
        max_sequence_length=shape.max_positions,
        pre_process=mpu.is_pipeline_first_stage(),
        post_process=mpu.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=shape.tied,
        position_embedding_type="rope",
        rotary_base=shape.rope_theta,
        parallel_output=True,
    )
    _mark_parallel(model)
    return model.to(device)


def _mark_parallel(model: PackedGPTModel) -> None:
    """Marks sharded parameters as megatron-core does when it initialises them itself (the gradient norm counts by it)."""
    for module in model.modules():
        dim = next((d for kind, d in _SHARDED.items() if isinstance(module, kind)), None)
        weight = getattr(module, "weight", None)
        if dim is not None and weight is not None and not hasattr(weight, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(weight, True, dim, 1)


def wrap_for_training(model: PackedGPTModel, settings: Settings) -> DistributedDataParallel:
    """Adds bf16 conversion at the ends and gradient buffers; sets the hooks that the pipeline schedule calls."""
    config = model.config
    inner = Float16Module(config, model) if config.bf16 else model
    ddp = DistributedDataParallel(
        config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=settings.accumulate_allreduce_grads_in_fp32,
            use_distributed_optimizer=settings.use_distributed_optimizer,
            overlap_grad_reduce=settings.overlap_grad_reduce,
            overlap_param_gather=settings.overlap_param_gather,
            check_for_nan_in_grad=False,
        ),
        inner,
    )
    config.no_sync_func = ddp.no_sync
    if settings.overlap_grad_reduce:
        config.grad_sync_func = ddp.start_grad_sync
    if settings.overlap_param_gather:
        config.param_sync_func = ddp.start_param_sync
    config.finalize_model_grads_func = _finalize
    return ddp


def _finalize(model, num_tokens=None, **kwargs) -> None:
    """Joins gradients over DP, CP and tied embeddings; the loss is already divided by its batch-wide denominator."""
    finalize_model_grads(model, None, **kwargs)


def unwrap(model) -> PackedGPTModel:
    while not isinstance(model, PackedGPTModel):
        model = model.module
    return model
