"""Parts of the last layer on its own: rows' attention against attention of all, the gated MLP against autograd, tied gradients."""

import mt_tiny
import numpy as np
import pytest
import torch

from slime.backends.megatron_utils.attention import row_attention, segment_attention
from slime.backends.megatron_utils.last_layer import swiglu
from slime.backends.megatron_utils.packing import Parallel, _row_queries, choose_rows, pack


def batches(cp: int, last_layer: str = "kept", kept: float = 0.12):
    data = mt_tiny.make_data(seed=4, samples=5, kept=kept)
    for rank in range(cp):
        parallel = Parallel(tp=2, cp=cp, cp_rank=rank, sequence_parallel=True)
        yield from pack(data, range(5), lambda d, i: choose_rows(d, i, "kept", False), max_tokens=200, parallel=parallel,
                        field_names=[], last_layer=last_layer)  # fmt: skip


@pytest.mark.parametrize("cp", [1, 2])
def test_rows_attend_as_they_do_among_all(cp):
    """Value and gradients, with fewer key heads than query heads, in the order of the rows asked for."""
    seen = 0
    for batch in batches(cp):
        layout = batch.layout
        if layout.row_queries is None:
            continue
        seen += 1
        rows = layout.last_layer_rows[torch.randperm(layout.last_layer_rows.numel(), generator=torch.Generator().manual_seed(1))]
        queries = _row_queries(rows.numpy(), layout.cu_seqlens_q.numpy(), layout.cu_seqlens_kv.numpy(), "cpu")
        tokens, keys = int(layout.cu_seqlens_q[-1]), int(layout.cu_seqlens_kv[-1])
        g = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(n, h, 8, generator=g, requires_grad=True) for n, h in ((tokens, 4), (keys, 2), (keys, 2)))
        bounds = (layout.cu_seqlens_q, layout.cu_seqlens_kv, layout.max_seqlen_q, layout.max_seqlen_kv)
        expected = segment_attention(q, k, v, *bounds, 0.3)[rows]
        found = row_attention(q[rows], k, v, queries, 0.3)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        weight = torch.randn(expected.shape, generator=g)
        for a, b in zip(*(torch.autograd.grad((x * weight).sum(), (q, k, v)) for x in (found, expected)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert seen


def test_queries_are_selected_only_where_rows_are_few_and_asked_for():
    assert all(b.layout.row_queries is None for b in batches(1, kept=0.9))
    assert all(b.layout.row_queries is None and b.layout.select_rows for b in batches(1, "mlp"))
    assert all(b.layout.row_queries is None and not b.layout.select_rows for b in batches(1, "all"))
    (batch,) = batches(1)
    rows = batch.layout.row_queries
    assert np.all(np.diff(batch.layout.last_layer_rows[rows.order].numpy()) >= 0)
    assert rows.segments[0][0] == 0 and rows.segments[-1][1] == rows.order.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 5, 4100])
def test_swiglu_is_autograds_to_the_bit(dtype, tokens):
    g = torch.Generator().manual_seed(tokens)
    both = torch.randn(tokens, 1, 12, generator=g).to(dtype)
    grad = torch.randn(tokens, 1, 6, generator=g).to(dtype)
    plain = both.clone().requires_grad_()
    gate, up = plain.chunk(2, dim=-1)
    expected = torch.nn.functional.silu(gate) * up
    expected.backward(grad)
    leaf = both.clone().requires_grad_()
    found = swiglu(leaf * 1.0)
    found.backward(grad)
    assert torch.equal(found, expected) and torch.equal(leaf.grad, plain.grad)


def test_the_heads_gradient_of_a_tied_embedding_goes_to_the_buffer_at_once():
    from slime.backends.megatron_utils.model import _GradientToBuffer

    table = torch.nn.Parameter(torch.randn(6, 3))
    hidden = table[torch.tensor([1, 4])]
    held = []
    hidden.register_hook(lambda grad: held.append(table.main_grad.clone()))
    table.main_grad = torch.zeros_like(table)
    out = hidden @ _GradientToBuffer.apply(table).t()
    out.sum().backward()
    head = torch.ones(2, 6).t() @ hidden.detach()
    torch.testing.assert_close(held[0], head)  # there before the trunk's backward pass
    plain = table.detach().clone().requires_grad_()
    (plain[torch.tensor([1, 4])] @ plain.t()).sum().backward()
    torch.testing.assert_close(table.grad + table.main_grad, plain.grad)
    del table.main_grad
    table.grad = None
    (table[torch.tensor([1, 4])] @ _GradientToBuffer.apply(table).t()).sum().backward()
    torch.testing.assert_close(table.grad, plain.grad)
