"""Rotary positions against megatron-core's own, to the bit; Triton kernels on the GPU where there is one, else in its interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from slime.backends.megatron_utils.trunk_ops import rotate
from tests.helpers.triton_interpreter import needs_triton, run_checks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "heads", "size"), [(77, 3, 16), (300, 2, 128)])
def test_rotation_is_megatron_cores_to_the_bit(tokens, heads, size, dtype):
    from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(num_layers=1, hidden_size=heads * size, num_attention_heads=heads, apply_rope_fusion=False)
    g = torch.Generator().manual_seed(tokens)
    half = torch.arange(tokens).float()[:, None] * torch.rand(size // 2, generator=g)
    angles = torch.cat([half, half], dim=-1)[:, None, None, :]
    joint, grad = (torch.randn(tokens, 1, heads, n, generator=g).to(dtype) for n in (size + 4, size))
    for start in (0, 4):
        plain, ours = (joint.clone().requires_grad_() for _ in range(2))
        expected = apply_rotary_pos_emb(plain[..., start : start + size], angles, config=config, cp_group=object())
        expected.backward(grad)
        found = rotate(ours[..., start : start + size].squeeze(1), half.cos().to(dtype), half.sin().to(dtype))
        assert [x.numel() for x in found.grad_fn.saved_tensors] == [half.numel()] * 2
        found.backward(grad.squeeze(1))
        assert found.is_contiguous() and torch.equal(found, expected.squeeze(1)) and torch.equal(ours.grad, plain.grad)


@needs_triton
def test_kernels_agree_with_torch():
    run_checks(Path(__file__).with_name("trunk_checks.py"))
