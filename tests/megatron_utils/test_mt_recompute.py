"""Full recompute without the block's own output: gradients equal to the bit, products really left out, nothing held for it."""

import mt_tiny
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from slime.backends.megatron_utils.recompute import unused_sum

ONE, TP2, PP2 = dict(ranks=1), dict(ranks=2, tensor_model_parallel_size=2), dict(ranks=2, pipeline_model_parallel_size=2)
SP2 = {**TP2, "sequence_parallel": True}
FAMILY = {"untied": ("qwen3", False), "tied": ("qwen3", True), "qwen2": ("qwen2", False)}


@pytest.mark.parametrize(
    ("layout", "family", "method", "number", "last"),
    [
        pytest.param(ONE, "tied", "uniform", 1, "kept", id="one-tied"),
        pytest.param(ONE, "untied", "uniform", 2, "mlp", id="one-2-mlp"),
        pytest.param(ONE, "untied", "uniform", 4, "all", id="one-4-all"),
        pytest.param(ONE, "qwen2", "block", 3, "kept", id="one-block"),
        pytest.param(TP2, "tied", "uniform", 1, "kept", id="tp2-tied"),
        pytest.param(SP2, "untied", "uniform", 1, "kept", id="tp2_sp"),
        pytest.param(SP2, "tied", "uniform", 2, "mlp", id="tp2_sp-2-tied-mlp"),
        pytest.param(PP2, "tied", "uniform", 1, "kept", id="pp2-tied"),
        pytest.param(PP2, "untied", "uniform", 2, "all", id="pp2-2-all"),
    ],
)
def test_gradients_are_the_same_to_the_bit_and_the_last_product_is_left_out(pool, models, layout, family, method, number, last):
    data = mt_tiny.make_data(seed=4, samples=5, kept=0.12)
    results = pool.run("recompute_gradients", model=models(*FAMILY[family]), data=data, recompute_granularity="full",
                       recompute_method=method, recompute_num_layers=number, opd_last_layer_rows=last, **layout)  # fmt: skip
    for found in results:
        assert found["equal"] == dict.fromkeys(("all", "left out", "kept", "torch"), True)
        assert 0 < found["size"] < float("inf")
        assert found["saved"] == found["products"] > 0
    if last == "kept":
        assert results[-1]["row_queries"] > 0, "no micro-batch selects queries here"


def test_experts_are_computed_whole(pool, models):
    found = pool.run("recompute_gradients", 1, model=models("qwen3_moe"), data=mt_tiny.make_data(), recompute_granularity="full",
                     recompute_method="uniform", recompute_num_layers=1)[0]  # fmt: skip
    assert found["equal"]["left out"] and found["saved"] == found["products"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_stands_for_the_output_is_finite_and_holds_nothing(dtype):
    g = torch.Generator().manual_seed(0)
    residual, inner, weight = (torch.randn(*s, generator=g).to(dtype).requires_grad_() for s in ((6, 1, 8), (6, 1, 12), (8, 12)))
    grad = torch.randn(6, 1, 8, generator=g).to(dtype)
    expected = torch.autograd.grad(residual + inner @ weight.t(), (residual, inner, weight), grad)
    with FlopCounterMode(display=False) as counter:
        out = unused_sum(residual, inner, weight, None)
    assert counter.get_total_flops() == 0
    assert out.shape == residual.shape and out.dtype == dtype and torch.equal(out, torch.zeros_like(out))
    assert out.untyped_storage().nbytes() == out.element_size()
    assert {x.data_ptr() for x in out.grad_fn.saved_tensors} == {inner.data_ptr(), weight.data_ptr()}
    found = torch.autograd.grad(out, (residual, inner, weight), grad)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
