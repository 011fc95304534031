"""The Triton kernels of `triton_vocab` against PyTorch. Run by test_vocab_rows.py in a process of its own, because Triton's interpreter
is chosen when Triton is imported; by hand: TRITON_INTERPRET=1 pytest tests/sglang_utils/vocab_checks.py
"""

from __future__ import annotations

import pytest
import torch

from slime.backends.sglang_utils import triton_vocab

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _rows(R, V, dtype, seed, scale=3.0):
    """A view with a padded row stride whose padding is NaN: a kernel that reads beyond the columns shows it."""
    out = torch.full((R, V + 24), torch.nan)
    out[:, :V] = torch.randn(R, V, generator=torch.Generator().manual_seed(seed)) * scale
    return out.to(dtype).to(DEVICE)[:, :V]


def _check(rows, tokens, k):
    """Values against float64; ids are distinct and lead to the values (equal logits may change places)."""
    expected = torch.log_softmax(rows.double(), -1)
    token_R, values_RK, ids_RK, log_z_R = triton_vocab.log_probs(rows, tokens, k)
    best = expected.topk(k, dim=-1).values
    tolerance = {"rtol": 2e-6, "atol": 3e-6, "check_dtype": False}
    torch.testing.assert_close(token_R, expected.gather(1, tokens[:, None])[:, 0], **tolerance)
    torch.testing.assert_close(values_RK, best, **tolerance)
    torch.testing.assert_close(log_z_R, torch.logsumexp(rows.double(), -1), **tolerance)
    torch.testing.assert_close(expected.gather(1, ids_RK), best, **tolerance)
    plain_RK, columns_RK = triton_vocab.largest(rows, k)
    assert torch.equal(plain_RK, rows.topk(k, dim=-1).values) and plain_RK.dtype == rows.dtype and torch.equal(columns_RK, ids_RK)
    assert all(len(set(row)) == k for row in ids_RK.tolist())
    assert token_R.dtype == values_RK.dtype == torch.float32 and ids_RK.dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [1, 5, 16, 64])
@pytest.mark.parametrize("shape", [(3, 5003), (2, 9000), (1, 2048)])
def test_against_float64(shape, k, dtype):
    rows = _rows(*shape, dtype, k)
    _check(rows, torch.tensor([0, shape[1] - 1, 17][: shape[0]], device=DEVICE), k)


def test_the_largest_values_are_found_wherever_they_lie():
    """All in one group, all in the last columns, one a group, and in the first column of each block."""
    V, k = 12_345, 16
    rows = _rows(4, V, torch.float32, 0)
    rows[0, 256 : 256 + k] = torch.linspace(50, 60, k, device=DEVICE)
    rows[1, V - k :] = torch.linspace(60, 50, k, device=DEVICE)
    rows[2, 64 : 64 + 128 * k : 128] = torch.linspace(50, 60, k, device=DEVICE)
    rows[3, ::4096] = 55.0
    _check(rows, torch.tensor([256, V - 1, 64, 4096], device=DEVICE), k)


def test_equal_logits_minus_infinity_and_large_values():
    V = 6000
    rows = _rows(5, V, torch.float32, 1)
    rows[0] = 0.0
    rows[1, 100:] = -torch.inf
    rows[2] = -torch.inf
    rows[2, :3] = torch.tensor([1.0, 2.0, 3.0], device=DEVICE)
    rows[3] *= 1e4
    rows[4] -= 1e4
    tokens = torch.tensor([5, 99, 2, 7, 8], device=DEVICE)
    token_R, values_RK, ids_RK, _ = triton_vocab.log_probs(rows, tokens, 16)
    expected = torch.log_softmax(rows.double(), -1)
    torch.testing.assert_close(token_R, expected.gather(1, tokens[:, None])[:, 0], rtol=2e-6, atol=2e-3, check_dtype=False)
    torch.testing.assert_close(values_RK, expected.topk(16, dim=-1).values, rtol=2e-6, atol=2e-3, check_dtype=False)
    assert all(len(set(row)) == 16 and max(row) < V for row in ids_RK.tolist())
    assert torch.isinf(values_RK[2, 3:]).all() and torch.isfinite(values_RK[[0, 1, 3, 4]]).all()


def test_nan_spoils_its_row_and_no_other():
    rows = _rows(3, 5000, torch.float32, 2)
    rows[1, 4321] = torch.nan
    token_R, values_RK, ids_RK, _ = triton_vocab.log_probs(rows, torch.tensor([1, 2, 3], device=DEVICE), 8)
    assert torch.isnan(token_R[1]) and torch.isnan(values_RK[1]).all() and int(ids_RK.max()) < 5000 and int(ids_RK.min()) >= 0
    assert torch.isfinite(token_R[[0, 2]]).all() and torch.isfinite(values_RK[[0, 2]]).all()


def test_no_top_k_is_asked_for():
    rows = _rows(2, 5000, torch.bfloat16, 3)
    token_R, values_RK, ids_RK, _ = triton_vocab.log_probs(rows, torch.tensor([1, 2], device=DEVICE), 0)
    torch.testing.assert_close(token_R, torch.log_softmax(rows.float(), -1)[[0, 1], [1, 2]], rtol=2e-6, atol=3e-6)
    assert values_RK.shape == ids_RK.shape == (2, 0)


def test_what_is_left_to_pytorch():
    assert triton_vocab.takes(_rows(1, 5000, torch.float32, 0), 64)
    assert not triton_vocab.takes(_rows(1, 5000, torch.float32, 0).double(), 16)
    assert not triton_vocab.takes(_rows(1, 1000, torch.float32, 0), 16)
    assert not triton_vocab.takes(_rows(1, 5000, torch.float32, 0), 257)
    assert not triton_vocab.takes(torch.zeros(5000, 4, device=DEVICE).T, 16)
