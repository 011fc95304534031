"""RMS norms of the layers that are not Transformer Engine's."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class RMSNorm(torch.nn.RMSNorm):
    """RMS norm that works with sequence parallelism: the weight is marked, so that its gradient is summed over TP."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **unused):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel


class DeferredNorm(RMSNorm):
    """The norm of queries or keys, applied by the attention together with their rotation (trunk_ops.norm_rotate)."""

    def forward(self, x: Tensor) -> Tensor:
        return x
