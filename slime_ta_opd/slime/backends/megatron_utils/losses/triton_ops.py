"""Triton kernels behind `softmax_ops`: the same functions, without an f32 copy of the logits. Import only where Triton is.

One program walks over the columns of one row (of a part of it when there are few rows); every lane keeps a running maximum and
sums relative to it, so that a chunk is read once for its statistics, and the lanes join at the end. The statistics kernels work in
base 2. -inf logits are carried as LOW, which is finite, so that no inf - inf arises; NaN passes through to the sums.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

LOW = tl.constexpr(-1e30)
LN2 = tl.constexpr(math.log(2.0))
_LOG2E = 1.0 / math.log(2.0)
_LANES, _WIDTH = 256, 8  # a thread reads 8 neighbouring logits at a time and keeps one set of sums
_BLOCK = _LANES * _WIDTH
_WARPS = 8
_MIN_PROGRAMS = 1024
_ROW_PROGRAMS = 256  # with this many rows a row is not split


@triton.jit
def _load(ptr, column, columns, scale):
    """f32 logits x scale of a block; LOW beyond the last column and instead of -inf."""
    x = tl.load(ptr + column, mask=column < columns, other=-float("inf")).to(tl.float32) * scale
    return tl.where(x < LOW, LOW, x)


@triton.jit
def _row_stats_kernel(x_ptr, out_ptr, stride, columns, scale, plane, BLOCKS: tl.constexpr, LANES: tl.constexpr,
                      WIDTH: tl.constexpr):
    row, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    x_ptr += row * stride
    column = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :] + part * (BLOCKS * LANES * WIDTH)
    top = tl.full([LANES], LOW, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    moment = tl.zeros([LANES], tl.float32)
    ahead = _load(x_ptr, column, columns, scale)
    for _ in range(BLOCKS):
        x = ahead
        column += LANES * WIDTH
        ahead = _load(x_ptr, column, columns, scale)
        higher = tl.maximum(top, tl.max(x, 1))
        fall = top - higher
        keep = tl.exp2(fall)
        d = x - higher[:, None]
        e = tl.exp2(d)
        moment = (moment + total * fall) * keep + tl.sum(e * d, 1)
        total = total * keep + tl.sum(e, 1)
        top = higher
    best = tl.max(top)
    d = top - best
    e = tl.exp2(d)
    some = best > LOW * 0.5
    at = out_ptr + row * parts + part
    tl.store(at, tl.where(some, best * LN2, -float("inf")))
    tl.store(at + plane, tl.where(some, tl.sum(total * e), 0.0))
    tl.store(at + 2 * plane, tl.where(some, tl.sum((moment + total * d) * e) * LN2, 0.0))


@triton.jit
def _pair_stats_kernel(x_ptr, y_ptr, out_ptr, x_stride, y_stride, columns, scale, plane, BLOCKS: tl.constexpr,
                       LANES: tl.constexpr, WIDTH: tl.constexpr):
    row, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    x_ptr += row * x_stride
    y_ptr += row * y_stride
    column = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :] + part * (BLOCKS * LANES * WIDTH)
    top_x = tl.full([LANES], LOW, tl.float32)
    top_y = tl.full([LANES], LOW, tl.float32)
    sum_x = tl.zeros([LANES], tl.float32)
    sum_y = tl.zeros([LANES], tl.float32)
    moment_x = tl.zeros([LANES], tl.float32)
    reverse = tl.zeros([LANES], tl.float32)
    forward = tl.zeros([LANES], tl.float32)
    ahead_x = _load(x_ptr, column, columns, scale)
    ahead_y = _load(y_ptr, column, columns, scale)
    for _ in range(BLOCKS):
        x, y = ahead_x, ahead_y
        column += LANES * WIDTH
        ahead_x = _load(x_ptr, column, columns, scale)
        ahead_y = _load(y_ptr, column, columns, scale)
        higher_x, higher_y = tl.maximum(top_x, tl.max(x, 1)), tl.maximum(top_y, tl.max(y, 1))
        fall_x, fall_y = top_x - higher_x, top_y - higher_y
        keep_x, keep_y = tl.exp2(fall_x), tl.exp2(fall_y)
        dx, dy = x - higher_x[:, None], y - higher_y[:, None]
        ex, ey = tl.exp2(dx), tl.exp2(dy)
        gap = dx - dy
        reverse = (reverse + sum_x * (fall_x - fall_y)) * keep_x + tl.sum(ex * gap, 1)
        forward = (forward + sum_y * (fall_y - fall_x)) * keep_y - tl.sum(ey * gap, 1)
        moment_x = (moment_x + sum_x * fall_x) * keep_x + tl.sum(ex * dx, 1)
        sum_x = sum_x * keep_x + tl.sum(ex, 1)
        sum_y = sum_y * keep_y + tl.sum(ey, 1)
        top_x, top_y = higher_x, higher_y
    best_x, best_y = tl.max(top_x), tl.max(top_y)
    dx, dy = top_x - best_x, top_y - best_y
    ex, ey = tl.exp2(dx), tl.exp2(dy)
    some = (best_x > LOW * 0.5) & (best_y > LOW * 0.5)
    at = out_ptr + row * parts + part
    tl.store(at, tl.where(some, best_x * LN2, -float("inf")))
    tl.store(at + plane, tl.where(some, tl.sum(sum_x * ex), 0.0))
    tl.store(at + 2 * plane, tl.where(some, tl.sum((moment_x + sum_x * dx) * ex) * LN2, 0.0))
    tl.store(at + 3 * plane, tl.where(some, best_y * LN2, -float("inf")))
    tl.store(at + 4 * plane, tl.where(some, tl.sum(sum_y * ey), 0.0))
    tl.store(at + 5 * plane, tl.where(some, tl.sum((reverse + sum_x * (dx - dy)) * ex) * LN2, 0.0))
    tl.store(at + 6 * plane, tl.where(some, tl.sum((forward + sum_y * (dy - dx)) * ey) * LN2, 0.0))


@triton.jit
def _log_mixture(s, t, log_beta, log_rest):
    a, b = t + log_beta, s + log_rest
    return tl.maximum(a, b) + tl.log(1.0 + tl.exp(-tl.abs(a - b)))


@triton.jit
def _jsd_sums_kernel(x_ptr, y_ptr, log_x_ptr, log_y_ptr, out_ptr, x_stride, y_stride, columns, inv_temperature, log_beta,
                     log_rest, plane, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    row, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    x_ptr += row * x_stride
    y_ptr += row * y_stride
    log_x, log_y = tl.load(log_x_ptr + row), tl.load(log_y_ptr + row)
    column = part * (BLOCKS * BLOCK) + tl.arange(0, BLOCK)
    student = tl.zeros([BLOCK], tl.float32)
    teacher = tl.zeros([BLOCK], tl.float32)
    for _ in range(BLOCKS):
        s = _load(x_ptr, column, columns, inv_temperature) - log_x
        t = _load(y_ptr, column, columns, inv_temperature) - log_y
        m = _log_mixture(s, t, log_beta, log_rest)
        p, q = tl.exp(s), tl.exp(t)
        student += tl.where(p > 0, p * (s - m), p)
        teacher += tl.where(q > 0, q * (t - m), q)
        column += BLOCK
    at = out_ptr + row * parts + part
    tl.store(at, tl.sum(student))
    tl.store(at + plane, tl.sum(teacher))


@triton.jit
def _softmax_scale_kernel(x_ptr, log_ptr, coefficient_ptr, stride, columns, inv_temperature, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x_ptr += row * stride
    log_z, coefficient = tl.load(log_ptr + row), tl.load(coefficient_ptr + row)
    x = _load(x_ptr, column, columns, inv_temperature)
    y = tl.where(log_z == -float("inf"), 0.0, coefficient * tl.exp(x - log_z))
    tl.store(x_ptr + column, y.to(x_ptr.dtype.element_ty), mask=column < columns)


@triton.jit
def _pair_gradient_kernel(x_ptr, y_ptr, log_x_ptr, log_y_ptr, value_ptr, coefficient_ptr, x_stride, y_stride, columns,
                          inv_temperature, log_beta, log_rest, KIND: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x_ptr += row * x_stride
    y_ptr += row * y_stride
    coefficient = tl.load(coefficient_ptr + row)
    s = _load(x_ptr, column, columns, inv_temperature) - tl.load(log_x_ptr + row)
    t = _load(y_ptr, column, columns, inv_temperature) - tl.load(log_y_ptr + row)
    p = tl.exp(s)
    if KIND == "forward_kl":
        gradient = p - tl.exp(t)
    elif KIND == "reverse_kl":
        gradient = p * (s - t - tl.load(value_ptr + row))
    else:
        gradient = p * (s - _log_mixture(s, t, log_beta, log_rest) - tl.load(value_ptr + row)) * tl.exp(log_rest)
    tl.store(x_ptr + column, (coefficient * gradient).to(x_ptr.dtype.element_ty), mask=column < columns)


@triton.jit
def _scale_kernel(x_ptr, factor_ptr, factor_step, stride, columns, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """Row r times factor[r x factor_step]; nothing is read or written where the factor is 1."""
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(factor_ptr + row * factor_step).to(tl.float32)
    if factor != 1.0:
        x_ptr += row * stride
        column = tl.program_id(1).to(tl.int64) * (BLOCKS * BLOCK) + tl.arange(0, BLOCK)
        for _ in range(BLOCKS):
            x = tl.load(x_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
            tl.store(x_ptr + column, (x * factor).to(x_ptr.dtype.element_ty), mask=column < columns)
            column += BLOCK


def supported(*tensors: torch.Tensor) -> bool:
    """Rows contiguous, f32, bf16 or f16: what the kernels take. Anything else goes to the torch bodies."""
    return all(t.dtype in (torch.float32, torch.bfloat16, torch.float16) and t.stride(1) == 1 for t in tensors)


def _parts(rows: int, columns: int) -> tuple[int, int]:
    """(programs a row, blocks a program)."""
    blocks = triton.cdiv(columns, _BLOCK)
    parts = 1 if rows >= _ROW_PROGRAMS else min(blocks, triton.cdiv(_MIN_PROGRAMS, rows))
    each = triton.cdiv(blocks, parts)
    return triton.cdiv(blocks, each), each


def _out(x_CV: torch.Tensor, parts: int, planes: int) -> torch.Tensor:
    return torch.empty(planes, x_CV.shape[0], parts, dtype=torch.float32, device=x_CV.device)


def row_stats(x_CV: torch.Tensor, inv_temperature: float):
    """See `softmax_ops.row_stats`."""
    rows, columns = x_CV.shape
    parts, blocks = _parts(rows, columns)
    out = _out(x_CV, parts, 3)
    _row_stats_kernel[(rows, parts)](x_CV, out, x_CV.stride(0), columns, inv_temperature * _LOG2E, rows * parts,
                                     BLOCKS=blocks, LANES=_LANES, WIDTH=_WIDTH, num_warps=_WARPS)
    if parts == 1:
        return out.squeeze(2).unbind(0)
    top, total, moment = out.unbind(0)
    best = top.amax(1)
    d = torch.where(total != 0, top - best[:, None], 0.0)
    e = torch.where(total != 0, d.exp(), 0.0)
    return best, (total * e).sum(1), ((moment + total * d) * e).sum(1)


def pair_stats(x_CV: torch.Tensor, y_CV: torch.Tensor, inv_temperature: float):
    """See `softmax_ops.pair_stats`; a tuple in its order."""
    rows, columns = x_CV.shape
    parts, blocks = _parts(rows, columns)
    out = _out(x_CV, parts, 7)
    _pair_stats_kernel[(rows, parts)](x_CV, y_CV, out, x_CV.stride(0), y_CV.stride(0), columns, inv_temperature * _LOG2E,
                                      rows * parts, BLOCKS=blocks, LANES=_LANES, WIDTH=_WIDTH, num_warps=_WARPS)
    if parts == 1:
        return out.squeeze(2).unbind(0)
    top_x, sum_x, moment_x, top_y, sum_y, reverse, forward = out.unbind(0)
    best_x, best_y = top_x.amax(1), top_y.amax(1)
    here = sum_x != 0
    dx, dy = torch.where(here, top_x - best_x[:, None], 0.0), torch.where(here, top_y - best_y[:, None], 0.0)
    ex, ey = torch.where(here, dx.exp(), 0.0), torch.where(here, dy.exp(), 0.0)
    return (best_x, (sum_x * ex).sum(1), ((moment_x + sum_x * dx) * ex).sum(1), best_y, (sum_y * ey).sum(1),
            ((reverse + sum_x * (dx - dy)) * ex).sum(1), ((forward + sum_y * (dy - dx)) * ey).sum(1))


def jsd_sums(x_CV, y_CV, log_x_C, log_y_C, beta: float, inv_temperature: float):
    """See `softmax_ops.jsd_sums`."""
    rows, columns = x_CV.shape
    parts, blocks = _parts(rows, columns)
    out = _out(x_CV, parts, 2)
    _jsd_sums_kernel[(rows, parts)](x_CV, y_CV, log_x_C, log_y_C, out, x_CV.stride(0), y_CV.stride(0), columns,
                                    inv_temperature, math.log(beta), math.log1p(-beta), rows * parts, BLOCKS=blocks,
                                    BLOCK=_BLOCK, num_warps=_WARPS)
    return out.sum(2).unbind(0)


def softmax_scale_(x_CV: torch.Tensor, log_z_C: torch.Tensor, coefficient_C: torch.Tensor, inv_temperature: float):
    """See `softmax_ops.softmax_scale_`."""
    rows, columns = x_CV.shape
    _softmax_scale_kernel[(rows, triton.cdiv(columns, 2 * _BLOCK))](
        x_CV, log_z_C.contiguous(), coefficient_C.contiguous(), x_CV.stride(0), columns, inv_temperature, BLOCK=2 * _BLOCK,
        num_warps=_WARPS)
    return x_CV


def pair_gradient_(x_CV, y_CV, kind: str, log_x_C, log_y_C, value_C, coefficient_C, beta: float, inv_temperature: float):
    """See `softmax_ops.pair_gradient_`."""
    rows, columns = x_CV.shape
    value_C = log_x_C if value_C is None else value_C  # not read for forward_kl
    _pair_gradient_kernel[(rows, triton.cdiv(columns, _BLOCK))](
        x_CV, y_CV, log_x_C.contiguous(), log_y_C.contiguous(), value_C.contiguous(), coefficient_C.contiguous(),
        x_CV.stride(0), y_CV.stride(0), columns, inv_temperature, math.log(beta), math.log1p(-beta), KIND=kind, BLOCK=_BLOCK,
        num_warps=_WARPS)
    return x_CV


def scale_rows_(x_CV: torch.Tensor, factor_C: torch.Tensor) -> torch.Tensor:
    """See `softmax_ops.scale_rows_`; a row whose factor is 1 is neither read nor written."""
    return _scale_(x_CV, factor_C.contiguous(), 1)


def scale_(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """See `softmax_ops.scale_`; x is contiguous, and neither read nor written where the factor is 1."""
    _scale_(x.view(1, -1), factor.reshape(1), 0)
    return x


def _scale_(x_CV, factor_C, step):
    rows, columns = x_CV.shape
    if rows and columns:
        each = min(32, triton.cdiv(columns, _BLOCK))
        _scale_kernel[(rows, triton.cdiv(columns, each * _BLOCK))](
            x_CV, factor_C, step, x_CV.stride(0), columns, BLOCKS=each, BLOCK=_BLOCK, num_warps=_WARPS)
    return x_CV
