"""The Triton kernels of a layer against the torch bodies of `trunk_ops`. Run by test_mt_trunk_ops.py in a process of its own, because
Triton's interpreter is chosen when Triton is imported; by hand: TRITON_INTERPRET=1 pytest tests/megatron_utils/trunk_checks.py
"""

from __future__ import annotations

import pytest
import torch

from slime.backends.megatron_utils import triton_trunk, trunk_ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def torch_bodies(monkeypatch):
    monkeypatch.setattr(trunk_ops, "KERNELS", False)


def tolerance(dtype, rounding: float) -> dict[str, float]:
    """`rounding` on a GPU and in f16; the interpreter cuts bf16 off where a GPU rounds."""
    cut = dtype == torch.bfloat16 and DEVICE == "cpu"
    return {"rtol": 0.03 if cut else rounding, "atol": 0.05 if cut else 0.1 * rounding}


def _random(*shape, dtype, seed=0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 2).to(dtype).to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "size"), [(3, 16), (16, 128), (40, 64), (1, 256)])
@pytest.mark.parametrize("back", [False, True])
def test_rotation(heads, size, dtype, back):
    angles = torch.arange(5, device=DEVICE)[:, None] * torch.rand(size // 2, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    turns = angles.cos().to(dtype), angles.sin().to(dtype)
    joint = _random(5, heads, size + 8, dtype=dtype)
    for x in (joint[..., :size].contiguous(), joint[..., 8:]):  # heads apart in memory, as keys of a joint projection are
        assert triton_trunk.takes_heads(x)
        found = triton_trunk.rotate(x, *turns, back)
        assert found.is_contiguous()
        torch.testing.assert_close(found, trunk_ops._rotated(x, *turns, back), **tolerance(dtype, 0.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "heads", "size"), [(5, 3, 16), (9, 16, 128), (17, 40, 64), (2, 33, 128)])
def test_norm_and_rotation_and_their_gradients(tokens, heads, size, dtype):
    angles = torch.arange(tokens, device=DEVICE)[:, None] * torch.rand(size // 2, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    turns = angles.cos().to(dtype), angles.sin().to(dtype)
    joint, grad = _random(tokens, heads, size + 8, dtype=dtype), _random(tokens, heads, size, dtype=dtype, seed=2)
    weight = (1 + 0.1 * _random(size, dtype=dtype, seed=3)).requires_grad_()
    for start in (0, 8):
        x = joint.clone().requires_grad_()
        part = x[..., start : start + size]
        found, scale = triton_trunk.norm_rotate(part.detach(), weight.detach(), 1e-6, *turns)
        expected = trunk_ops.norm_rotate(part, weight, 1e-6, *turns)
        torch.testing.assert_close(found, expected.detach(), **tolerance(dtype, 2e-2))
        wanted = torch.autograd.grad(expected, (x, weight), grad)
        grad_x, grad_weight = triton_trunk.norm_rotate_backward(grad, part.detach(), weight.detach(), scale, *turns)
        for got, want in ((grad_x, wanted[0][..., start : start + size]), (grad_weight, wanted[1])):
            error = (got.float() - want.float()).abs().max() / want.float().abs().max()
            assert error < (0.03 if dtype == torch.bfloat16 else 0.004), error


def test_functions_reach_the_kernels_and_differentiate(monkeypatch):
    dtype = torch.float16
    turns = tuple(torch.rand(6, 8, generator=torch.Generator().manual_seed(1)).to(dtype).to(DEVICE) for _ in range(2))
    inputs = [_random(*shape, dtype=dtype, seed=i).requires_grad_() for i, shape in enumerate(((6, 2, 16), (16,), (6, 2, 16), (6, 1, 24)))]

    def results():
        x, weight, y, both = inputs
        outs = trunk_ops.norm_rotate(x, weight, 1e-6, *turns), trunk_ops.rotate(y, *turns), trunk_ops.swiglu(both * 1.0)
        grads = torch.autograd.grad(outs, inputs, [_random(*o.shape, dtype=dtype, seed=9) for o in outs])
        return [*outs, *grads], type(outs[0].grad_fn).__name__

    expected, by_torch = results()
    monkeypatch.setattr(trunk_ops, "_kernels", lambda x: triton_trunk)
    found, by_kernels = results()
    assert by_kernels == "_NormRotateBackward" != by_torch
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=5e-3, atol=5e-3)


def test_rotation_of_other_heads_is_left_to_torch():
    assert not triton_trunk.takes_heads(torch.zeros(2, 3, 24, dtype=torch.bfloat16))
    assert not triton_trunk.takes_heads(torch.zeros(2, 3, 16))
    assert not triton_trunk.takes_heads(torch.zeros(2, 16, 3, dtype=torch.bfloat16).transpose(1, 2))
    assert not triton_trunk.takes_gated(torch.zeros(4, 1, 32, dtype=torch.bfloat16)[..., ::2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "width"), [(3, 6), (2, 2048), (3, 2050), (1, 6144)])
def test_gated_activation_and_its_gradient(tokens, width, dtype):
    both, grad = _random(tokens, 1, 2 * width, dtype=dtype), _random(tokens, 1, width, dtype=dtype, seed=1)
    both[0, 0, :2] = torch.tensor([-200.0, 200.0])  # exp overflows
    leaf = both.clone().requires_grad_()
    expected = trunk_ops.swiglu(leaf * 1.0)
    expected.backward(grad)
    assert triton_trunk.takes_gated(both)
    close = tolerance(dtype, 1e-2 if dtype == torch.bfloat16 else 2e-3)
    torch.testing.assert_close(triton_trunk.swiglu(both), expected.detach(), **close)
    found = triton_trunk.swiglu_backward_(both, grad)
    assert found.data_ptr() == both.data_ptr()
    torch.testing.assert_close(found, leaf.grad, **close)
