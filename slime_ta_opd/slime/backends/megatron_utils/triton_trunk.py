"""Triton kernels behind `trunk_ops`: the same functions, every value read and written once. Import only where Triton is.

Products are rounded to the tensor's dtype where the torch bodies store them, and sums are taken of the rounded values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_DTYPES = (torch.bfloat16, torch.float16)
_VALUES = 2048  # of a program's block
_TOKENS = 8  # whose part of a weight's gradient one program adds up
_WARPS = 4


def takes_heads(x_Thd: Tensor) -> bool:
    """Whether `rotate` can: bf16 or f16, neighbours in the last dimension, of which a half is a power of two."""
    half = x_Thd.size(-1) // 2
    return x_Thd.dtype in _DTYPES and x_Thd.stride(-1) == 1 and half >= 8 and half & (half - 1) == 0


def takes_gated(both: Tensor) -> bool:
    """Whether `swiglu` and its gradient can: bf16 or f16, contiguous."""
    return both.dtype in _DTYPES and both.is_contiguous()


def _heads_a_program(heads: int, size: int) -> int:
    return min(triton.next_power_of_2(heads), max(2 * _VALUES // size, 1))


@triton.jit
def _rotate_kernel(x_ptr, cos_ptr, sin_ptr, out_ptr, x_token, x_head, heads, sign, HALF: tl.constexpr, HEADS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, HALF)[None, :]
    dtype = out_ptr.dtype.element_ty
    cos = tl.load(cos_ptr + token * HALF + column).to(tl.float32)
    sin = tl.load(sin_ptr + token * HALF + column).to(tl.float32) * sign
    inside = head < heads
    at = x_ptr + token * x_token + head * x_head + column
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    left = (first * cos).to(dtype).to(tl.float32) - (second * sin).to(dtype).to(tl.float32)
    right = (second * cos).to(dtype).to(tl.float32) + (first * sin).to(dtype).to(tl.float32)
    to = out_ptr + (token * heads + head) * (2 * HALF) + column
    tl.store(to, left.to(dtype), mask=inside)
    tl.store(to + HALF, right.to(dtype), mask=inside)


def rotate(x_Thd: Tensor, cos_Tc: Tensor, sin_Tc: Tensor, back: bool) -> Tensor:
    """See `trunk_ops.rotate`; `back` turns the other way, which is the gradient."""
    tokens, heads, size = x_Thd.shape
    out = torch.empty((tokens, heads, size), dtype=x_Thd.dtype, device=x_Thd.device)
    group = _heads_a_program(heads, size)
    _rotate_kernel[(tokens, triton.cdiv(heads, group))](
        x_Thd, cos_Tc.contiguous(), sin_Tc.contiguous(), out, x_Thd.stride(0), x_Thd.stride(1), heads, -1.0 if back else 1.0,
        HALF=size // 2, HEADS=group, num_warps=_WARPS,
    )  # fmt: skip
    return out


@triton.jit
def _norm_rotate_kernel(x_ptr, weight_ptr, cos_ptr, sin_ptr, out_ptr, scale_ptr, x_token, x_head, heads, eps,
                        HALF: tl.constexpr, HEADS: tl.constexpr):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    number = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    head, column = number[:, None], tl.arange(0, HALF)[None, :]
    dtype = out_ptr.dtype.element_ty
    cos = tl.load(cos_ptr + token * HALF + column).to(tl.float32)
    sin = tl.load(sin_ptr + token * HALF + column).to(tl.float32)
    inside = head < heads
    at = x_ptr + token * x_token + head * x_head + column
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / (2 * HALF) + eps)
    tl.store(scale_ptr + token * heads + number, scale, mask=number < heads)
    first = (first * scale[:, None] * tl.load(weight_ptr + column).to(tl.float32)).to(dtype).to(tl.float32)
    second = (second * scale[:, None] * tl.load(weight_ptr + HALF + column).to(tl.float32)).to(dtype).to(tl.float32)
    left = (first * cos).to(dtype).to(tl.float32) - (second * sin).to(dtype).to(tl.float32)
    right = (second * cos).to(dtype).to(tl.float32) + (first * sin).to(dtype).to(tl.float32)
    to = out_ptr + (token * heads + head) * (2 * HALF) + column
    tl.store(to, left.to(dtype), mask=inside)
    tl.store(to + HALF, right.to(dtype), mask=inside)


def norm_rotate(x_Thd: Tensor, weight_d: Tensor, eps: float, cos_Tc: Tensor, sin_Tc: Tensor) -> tuple[Tensor, Tensor]:
    """See `trunk_ops.norm_rotate`; also 1 / RMS of every head, f32 [T, h]."""
    tokens, heads, size = x_Thd.shape
    out = torch.empty((tokens, heads, size), dtype=x_Thd.dtype, device=x_Thd.device)
    scale_Th = torch.empty((tokens, heads), dtype=torch.float32, device=x_Thd.device)
    group = _heads_a_program(heads, size)
    _norm_rotate_kernel[(tokens, triton.cdiv(heads, group))](
        x_Thd, weight_d.contiguous(), cos_Tc.contiguous(), sin_Tc.contiguous(), out, scale_Th, x_Thd.stride(0), x_Thd.stride(1), heads,
        eps, HALF=size // 2, HEADS=group, num_warps=_WARPS,
    )  # fmt: skip
    return out, scale_Th


@triton.jit
def _norm_rotate_backward_kernel(grad_ptr, x_ptr, weight_ptr, scale_ptr, cos_ptr, sin_ptr, out_ptr, part_ptr, grad_token, grad_head,
                                 x_token, x_head, tokens, heads, HALF: tl.constexpr, HEADS: tl.constexpr,
                                 TOKENS: tl.constexpr):  # fmt: skip
    number = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    head, column = number[:, None], tl.arange(0, HALF)[None, :]
    dtype = out_ptr.dtype.element_ty
    weight_first = tl.load(weight_ptr + column).to(tl.float32)
    weight_second = tl.load(weight_ptr + HALF + column).to(tl.float32)
    sum_first = tl.zeros([HALF], tl.float32)
    sum_second = tl.zeros([HALF], tl.float32)
    for i in range(TOKENS):
        token = tl.program_id(0).to(tl.int64) * TOKENS + i
        inside = (head < heads) & (token < tokens)
        cos = tl.load(cos_ptr + token * HALF + column, mask=token < tokens, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + token * HALF + column, mask=token < tokens, other=0.0).to(tl.float32)
        at = grad_ptr + token * grad_token + head * grad_head + column
        left = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        right = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
        first = ((left * cos).to(dtype).to(tl.float32) + (right * sin).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
        second = ((right * cos).to(dtype).to(tl.float32) - (left * sin).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
        scale = tl.load(scale_ptr + token * heads + number, mask=(number < heads) & (token < tokens), other=0.0)[:, None]
        at = x_ptr + token * x_token + head * x_head + column
        x_first = tl.load(at, mask=inside, other=0.0).to(tl.float32) * scale
        x_second = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32) * scale
        sum_first += tl.sum(first * x_first, 0)
        sum_second += tl.sum(second * x_second, 0)
        first *= weight_first
        second *= weight_second
        mean = ((tl.sum(first * x_first, 1) + tl.sum(second * x_second, 1)) / (2 * HALF))[:, None]
        to = out_ptr + (token * heads + head) * (2 * HALF) + column
        tl.store(to, (scale * (first - x_first * mean)).to(dtype), mask=inside)
        tl.store(to + HALF, (scale * (second - x_second * mean)).to(dtype), mask=inside)
    to = part_ptr + (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * (2 * HALF) + tl.arange(0, HALF)
    tl.store(to, sum_first)
    tl.store(to + HALF, sum_second)


def norm_rotate_backward(grad: Tensor, x_Thd: Tensor, weight_d: Tensor, scale_Th: Tensor, cos_Tc: Tensor, sin_Tc: Tensor):
    """Gradients of x and weight from that of `norm_rotate`'s result."""
    tokens, heads, size = x_Thd.shape
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    out = torch.empty((tokens, heads, size), dtype=x_Thd.dtype, device=x_Thd.device)
    group = _heads_a_program(heads, size)
    grid = (triton.cdiv(tokens, _TOKENS), triton.cdiv(heads, group))
    parts = torch.empty((grid[0] * grid[1], size), dtype=torch.float32, device=x_Thd.device)
    _norm_rotate_backward_kernel[grid](
        grad, x_Thd, weight_d.contiguous(), scale_Th, cos_Tc.contiguous(), sin_Tc.contiguous(), out, parts, grad.stride(0), grad.stride(1),
        x_Thd.stride(0), x_Thd.stride(1), tokens, heads, HALF=size // 2, HEADS=group, TOKENS=_TOKENS, num_warps=_WARPS,
    )  # fmt: skip
    return out, parts.sum(0).to(weight_d.dtype)


@triton.jit
def _swiglu_kernel(both_ptr, out_ptr, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    dtype = out_ptr.dtype.element_ty
    gate = tl.load(both_ptr + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(both_ptr + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(out_ptr + row * width + column, (silu * up).to(dtype), mask=inside)


def swiglu(both: Tensor) -> Tensor:
    """See `trunk_ops.swiglu`; both: contiguous [..., 2F]."""
    width = both.size(-1) // 2
    out = both.new_empty((*both.shape[:-1], width))
    _swiglu_kernel[(out.numel() // width, triton.cdiv(width, _VALUES))](both, out, width, BLOCK=_VALUES, num_warps=_WARPS)
    return out


@triton.jit
def _swiglu_backward_kernel(both_ptr, grad_ptr, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    dtype = both_ptr.dtype.element_ty
    at = both_ptr + row * 2 * width + column
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + width, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
    part = 1.0 / (1.0 + tl.exp(-gate))
    silu = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    inner = (up * grad).to(dtype).to(tl.float32)
    tl.store(at, (inner * part * (1.0 + gate * (1.0 - part))).to(dtype), mask=inside)
    tl.store(at + width, (silu * grad).to(dtype), mask=inside)


def swiglu_backward_(both: Tensor, grad: Tensor) -> Tensor:
    """Writes the gradient of `swiglu` over its input and returns that; grad: [..., F]."""
    width = grad.size(-1)
    _swiglu_backward_kernel[(grad.numel() // width, triton.cdiv(width, _VALUES))](
        both, grad.contiguous(), width, BLOCK=_VALUES, num_warps=_WARPS
    )
    return both
