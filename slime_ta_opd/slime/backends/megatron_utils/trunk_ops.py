"""Elementwise operations of a layer in few passes over memory: rotary positions, with the norm of heads before, and the gated activation.

Each has a torch body for any device; on CUDA with Triton one kernel reads and writes every value once. All round where
autograd of the plain expression rounds.

Shape letters: T packed tokens, h heads, d head size, F MLP width of this rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from slime.backends.megatron_utils.kernels import kernel_module

KERNELS = True  # False: the torch bodies on CUDA too (to compare)


def _kernels(x: Tensor):
    """The Triton module where x is on a GPU, else None."""
    return kernel_module("triton_trunk") if KERNELS and x.is_cuda and x.numel() else None


def rotate(x_Thd: Tensor, cos_Tc: Tensor, sin_Tc: Tensor) -> Tensor:
    """Rotary positions: the two halves of every head turned by each token's angles; [T, h, d], contiguous.

    cos, sin: [T, d / 2] in the dtype of x; megatron-core's unfused rotation, which makes them in every layer, gives the same
    bits. Nothing is kept for backward but these two.
    """
    return _Rotate.apply(x_Thd, cos_Tc, sin_Tc)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return _rotated(grad, *ctx.saved_tensors, back=True), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    if (ops := _kernels(x)) and ops.takes_heads(x):
        return ops.rotate(x, cos, sin, back)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    (first, second), (to_first, to_second) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    plus, minus = (to_first, to_second) if back else (to_second, to_first)
    torch.mul(first, cos, out=to_first)
    torch.mul(second, cos, out=to_second)
    plus.add_((second if back else first) * sin)
    minus.sub_((first if back else second) * sin)
    return out


def norm_rotate(x_Thd: Tensor, weight_d: Tensor, eps: float, cos_Tc: Tensor, sin_Tc: Tensor) -> Tensor:
    """RMS norm of every head, then `rotate`; [T, h, d], contiguous."""
    if (ops := _kernels(x_Thd)) and ops.takes_heads(x_Thd) and weight_d.dtype == x_Thd.dtype:
        return _NormRotate.apply(x_Thd, weight_d, eps, cos_Tc, sin_Tc, ops)
    return rotate(F.rms_norm(x_Thd, (x_Thd.size(-1),), weight_d, eps), cos_Tc, sin_Tc)


class _NormRotate(torch.autograd.Function):
    """By the kernels of `ops`."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor, ops) -> Tensor:
        out, scale = ops.norm_rotate(x, weight, eps, cos, sin)
        ctx.save_for_backward(x, weight, scale, cos, sin)
        ctx.ops = ops
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return (*ctx.ops.norm_rotate_backward(grad, *ctx.saved_tensors), None, None, None, None)


def swiglu(both: Tensor) -> Tensor:
    """silu(gate) x up of [..., 2F] = [gate, up]. Keeps its input only and writes the gradient over it."""
    return _SwiGLU.apply(both)


class _SwiGLU(torch.autograd.Function):
    """The kernels that autograd would call, bit by bit; autograd would also keep silu(gate) and make [T, 5F] on the way back."""

    @staticmethod
    def forward(ctx, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        if (ops := _kernels(both)) and ops.takes_gated(both):
            return ops.swiglu(both)
        gate, up = both.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        (both,) = ctx.saved_tensors
        both = both.detach()
        if (ops := _kernels(both)) and ops.takes_gated(both):
            return ops.swiglu_backward_(both, grad)
        gate, up = both.chunk(2, dim=-1)
        for g, u, d in zip(*(x.split(_BACKWARD_ROWS) for x in (gate, up, grad)), strict=True):
            grad_up = F.silu(g).mul_(d)
            torch.mul(u, d, out=u)
            torch.ops.aten.silu_backward.grad_input(u, g, grad_input=g)
            u.copy_(grad_up)
        return both


_BACKWARD_ROWS = 4096  # rows whose temporary exists at a time
