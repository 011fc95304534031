"""The layer specification: megatron-core's own layers with a norm, a core attention and a last layer of ours."""

from __future__ import annotations

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from slime.backends.megatron_utils.attention import PackedAttention
from slime.backends.megatron_utils.last_layer import RowSelectingLayer
from slime.backends.megatron_utils.norms import RMSNorm
from ta_opd.errors import ConfigError


def block_spec(config: TransformerConfig, implementation: str = "local") -> TransformerBlockSubmodules:
    """Specification of this pipeline stage's layers. `implementation`: "local" or "transformer_engine".

    Transformer Engine fuses the norm into the joint projection, so the last layer then computes its attention for all tokens
    (RowSelectingLayer). Raises ConfigError where Transformer Engine is asked for and not installed, or does not load.
    """
    experts = {"num_experts": config.num_moe_experts, "moe_grouped_gemm": config.moe_grouped_gemm}
    if implementation == "transformer_engine":
        try:
            from megatron.core.extensions.transformer_engine import HAVE_TE, TENorm
        except (ImportError, OSError) as error:  # compiled for another torch or CUDA
            raise ConfigError(f"--transformer-impl transformer_engine: Transformer Engine does not load ({error}); use local") from error
        if not HAVE_TE:
            raise ConfigError("--transformer-impl transformer_engine: Transformer Engine is not installed; install it or use local")
        if not torch.cuda.is_available():
            raise ConfigError("--transformer-impl transformer_engine: expected a CUDA device, found none; use local")
        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm, **experts)
        norm = TENorm
    else:
        spec = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm", **experts)
        norm = RMSNorm
        spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = norm
        if config.qk_layernorm:
            attention = spec.submodules.self_attention.submodules
            attention.q_layernorm = attention.k_layernorm = norm
    if config.num_moe_experts:
        # megatron-core 0.16 reads this name without defining it where Transformer Engine is absent
        moe_utils.te_general_gemm = getattr(moe_utils, "te_general_gemm", None)
        # the norm before experts is a module of its own in every implementation, and is named so in checkpoints
        spec.submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
    spec.submodules.self_attention.submodules.core_attention = PackedAttention
    spec.module = RowSelectingLayer
    layers = get_num_layers_to_build(config)
    return TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=norm)
