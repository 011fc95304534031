"""The Triton kernels against the torch bodies of `softmax_ops`. Run by test_triton_ops.py in a process of its own, because
Triton's interpreter is chosen when Triton is imported; by hand: TRITON_INTERPRET=1 pytest tests/losses/triton_checks.py
"""

from __future__ import annotations

import loss_cases as cases
import pytest
import torch

from slime.backends.megatron_utils.losses import softmax_ops, triton_ops
from slime.backends.megatron_utils.losses.registry import LOSS_TYPES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(3, 5000), (1, 130), (4, 2048), (2, 6145)]
EXTREME = 1e4


@pytest.fixture(autouse=True)
def torch_bodies(monkeypatch):
    monkeypatch.setattr(softmax_ops, "KERNELS", False)
    monkeypatch.setattr(triton_ops, "_ROW_PROGRAMS", 3)  # from 3 rows on, one program a row; fewer are split


def _logits(rows, columns, dtype, seed, scale=3.0):
    """A view with a padded row stride whose padding is NaN: a kernel that reads beyond the columns shows it."""
    g = torch.Generator().manual_seed(seed)
    out = torch.full((rows, columns + 24), torch.nan)
    out[:, :columns] = torch.randn(rows, columns, generator=g) * scale
    return out.to(dtype).to(DEVICE)[:, :columns]


def _copy(logits):
    whole = torch.full((logits.shape[0], logits.stride(0)), torch.nan, dtype=logits.dtype, device=logits.device)
    whole[:, : logits.shape[1]] = logits
    return whole[:, : logits.shape[1]]


def _close(got, expected, dtype=torch.float32):
    tolerance = 2e-5 if dtype == torch.float32 else 1e-2
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g.float().cpu(), e.float().cpu(), rtol=tolerance, atol=tolerance * 0.1, equal_nan=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("inv_t", [1.0, 1.7])
def test_row_stats_and_gradient(shape, dtype, inv_t):
    x = _logits(*shape, dtype, 0)
    x[0, 7:100] = -torch.inf
    x[-1, :3] = EXTREME
    found, expected = triton_ops.row_stats(x, inv_t), softmax_ops.row_stats(x, inv_t)
    _close(found, expected)
    log_z, coefficient = found[0] + found[1].log(), torch.linspace(-1, 1, shape[0], device=DEVICE)
    _close([triton_ops.softmax_scale_(_copy(x), log_z, coefficient, inv_t)],
           [softmax_ops.softmax_scale_(_copy(x), log_z, coefficient, inv_t)], dtype)


def test_row_stats_of_nothing_and_of_nan():
    x = _logits(3, 300, torch.float32, 1)
    x[0] = -torch.inf
    x[1, 5] = torch.nan
    top, total, moment = triton_ops.row_stats(x, 1.0)
    assert (top[0], total[0], moment[0]) == (-torch.inf, 0, 0)
    assert total[1].isnan() and total[2].isfinite()
    out = triton_ops.softmax_scale_(x, torch.tensor([-torch.inf, 0.0, 0.0], device=DEVICE), torch.ones(3, device=DEVICE), 1.0)
    assert bool((out[0] == 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("inv_t", [1.0, 0.6])
def test_pair(shape, dtype, inv_t):
    x, y = _logits(*shape, dtype, 2), _logits(*shape, dtype, 3)
    x[0, :2] += 40
    y[0, 100:120] += 60
    x[-1] += 500
    found, expected = softmax_ops.PairStats(*triton_ops.pair_stats(x, y, inv_t)), softmax_ops.pair_stats(x, y, inv_t)
    _close(found, expected)
    log_x, log_y = expected.max_x + expected.sum_x.log(), expected.max_y + expected.sum_y.log()
    sums = softmax_ops.jsd_sums(x, y, log_x, log_y, 0.3, inv_t)
    _close(triton_ops.jsd_sums(x, y, log_x, log_y, 0.3, inv_t), sums)
    coefficient = torch.linspace(-1, 1, shape[0], device=DEVICE)
    reverse = expected.reverse / expected.sum_x - expected.sum_x.log() + expected.sum_y.log()
    for kind, value in (("reverse_kl", reverse), ("forward_kl", None), ("jsd", sums[0])):
        args = (y, kind, log_x, log_y, value, coefficient, 0.3, inv_t)
        _close([triton_ops.pair_gradient_(_copy(x), *args)], [softmax_ops.pair_gradient_(_copy(x), *args)], dtype)


def test_pair_of_equals_is_zero():
    x = _logits(4, 3000, torch.bfloat16, 4)
    stats = softmax_ops.PairStats(*triton_ops.pair_stats(x, x.clone(), 1.0))
    assert bool((stats.reverse == 0).all()) and bool((stats.forward == 0).all())
    assert bool((stats.sum_x == stats.sum_y).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scale(dtype):
    x = _logits(5, 5000, dtype, 5)
    factor = torch.tensor([1.0, 0.0, -2.5, 1.0, 3.0], device=DEVICE)
    _close([triton_ops.scale_rows_(_copy(x), factor)], [softmax_ops.scale_rows_(_copy(x), factor)], dtype)
    flat = x.contiguous()
    for scalar in (1.0, 0.25):
        _close([triton_ops.scale_(flat.clone(), torch.tensor(scalar, device=DEVICE))], [flat * scalar], dtype)


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_losses_on_kernels(name, monkeypatch):
    """The whole loss, value and gradients, with every primitive a kernel (in the interpreter the kernels get CPU tensors)."""
    monkeypatch.setattr(softmax_ops, "_kernels", lambda *tensors: triton_ops if tensors[0].numel() else None)
    for case in (cases.Case(name), cases.Case(name, temperature=0.7, factor=False, chunk=4)):
        errors = cases.run_case(case, 0, 1, None)
        bad = {what: error for what, error in errors.items() if not error <= 3 * cases.TOLERANCE}
        assert not bad, f"{case.name}: {bad}"
