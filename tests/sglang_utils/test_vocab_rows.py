"""Log-probs and top-K of rows of logits: the PyTorch body, and the Triton kernels in a process of their own."""

from pathlib import Path

import pytest
import torch

from slime.backends.sglang_utils import vocab_rows
from tests.helpers.triton_interpreter import needs_triton, run_checks


@needs_triton
def test_kernels_match_pytorch():
    run_checks(Path(__file__).with_name("vocab_checks.py"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_match_pytorch_on_a_gpu():
    run_checks(Path(__file__).with_name("vocab_checks.py"))
    rows = torch.randn(513, 152_064, device="cuda").bfloat16()[:, :151_936]
    tokens = torch.randint(0, 151_936, (513,), device="cuda")
    got, expected = vocab_rows.log_probs(rows, tokens, 16), torch.log_softmax(rows.double(), -1)
    torch.testing.assert_close(got[0].double(), expected.gather(1, tokens[:, None])[:, 0], rtol=1e-6, atol=4e-6)
    torch.testing.assert_close(got[1].double(), expected.topk(16, dim=-1).values, rtol=1e-6, atol=4e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [0, 1, 7])
def test_pytorch_body_against_float64(k, dtype):
    g = torch.Generator().manual_seed(k)
    rows = (torch.randn(5, 300, generator=g) * 4).to(dtype)[:, :290]
    tokens = torch.tensor([0, 289, 5, 5, 100])
    token_R, values_RK, ids_RK, log_z_R = vocab_rows.log_probs(rows, tokens, k)
    expected = torch.log_softmax(rows.double(), -1)
    torch.testing.assert_close(token_R.double(), expected[torch.arange(5), tokens], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(values_RK.double(), expected.topk(k, dim=-1).values, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(log_z_R.double(), torch.logsumexp(rows.double(), -1), rtol=1e-6, atol=1e-6)
    assert values_RK.shape == ids_RK.shape == (5, k)
    for found, wanted in zip(vocab_rows.largest(rows, k), rows.topk(k, dim=-1), strict=True):
        assert torch.equal(found, wanted)
