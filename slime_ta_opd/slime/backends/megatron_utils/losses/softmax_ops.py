"""Per-row softmax statistics and gradients of one chunk of logits on one rank.

Each function has a torch body for any device; on CUDA with Triton it runs a kernel that makes no f32 copy of the chunk.
All work on logits z = logits x inv_temperature, in f32 (f64 for f64 logits). No communication here.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from slime.backends.megatron_utils.kernels import kernel_module

KERNELS = True  # False: the torch bodies on CUDA too (to compare)


def _kernels(*tensors: torch.Tensor):
    """The Triton module when it can take these tensors, else None."""
    ops = kernel_module("losses.triton_ops") if KERNELS and tensors[0].is_cuda else None
    return ops if ops is not None and tensors[0].numel() and ops.supported(*tensors) else None


def _scaled(logits_CV: torch.Tensor, inv_temperature: float) -> torch.Tensor:
    z_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
    return z_CV if inv_temperature == 1.0 else z_CV * inv_temperature


def _finite(max_C: torch.Tensor) -> torch.Tensor:
    return torch.where(max_C == -torch.inf, 0.0, max_C)


def row_stats(logits_CV: torch.Tensor, inv_temperature: float = 1.0):
    """(max z, sum e^(z - max), sum e^(z - max) (z - max)) per row, f32 [C] each; z = -inf counts as absent.

    The third gives the entropy: H = log(sum) - moment / sum. A row with no finite z has (-inf, 0, 0).
    """
    if logits_CV.shape[1] == 0:
        empty_C = torch.zeros(logits_CV.shape[0], dtype=torch.promote_types(logits_CV.dtype, torch.float32),
                              device=logits_CV.device)
        return torch.full_like(empty_C, -torch.inf), empty_C, empty_C.clone()
    if ops := _kernels(logits_CV):
        return ops.row_stats(logits_CV, inv_temperature)
    z_CV = _scaled(logits_CV, inv_temperature)
    max_C = z_CV.amax(1)
    z_CV = z_CV - _finite(max_C)[:, None]
    e_CV = z_CV.exp()
    moment_C = torch.where(e_CV > 0, e_CV * z_CV, 0.0).sum(1)
    return max_C, e_CV.sum(1), moment_C


def softmax_scale_(logits_CV: torch.Tensor, log_z_C: torch.Tensor, coefficient_C: torch.Tensor,
                   inv_temperature: float = 1.0) -> torch.Tensor:
    """Overwrite the logits with coefficient x exp(z - log_z); 0 where z is -inf or log_z is -inf. Returns them."""
    if logits_CV.shape[1] == 0:
        return logits_CV
    if ops := _kernels(logits_CV):
        return ops.softmax_scale_(logits_CV, log_z_C, coefficient_C, inv_temperature)
    z_CV = _scaled(logits_CV, inv_temperature)
    empty_C = log_z_C == -torch.inf
    out_CV = (z_CV - torch.where(empty_C, 0.0, log_z_C)[:, None]).exp_()
    out_CV.mul_(torch.where(empty_C, 0.0, coefficient_C)[:, None])
    return logits_CV.copy_(out_CV)


def scale_(tensor: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Multiply in place by a scalar tensor; no pass over memory when it is 1 (known on CPU, found by the kernel on CUDA)."""
    if tensor.device.type == "cpu" and float(factor) == 1.0:
        return tensor
    if (ops := _kernels(tensor)) and tensor.is_contiguous():
        return ops.scale_(tensor, factor)
    return tensor.mul_(factor.to(tensor.dtype))


class PairStats(NamedTuple):
    """Of two chunks of logits x (student) and y (teacher), f32 [C] each; KL(x || y) = reverse / sum_x - log sum_x + log sum_y.

    sums of e^(x - max_x), of e^(y - max_y); moment_x = sum e^(x - max_x) (x - max_x);
    reverse = sum e^(x - max_x) ((x - max_x) - (y - max_y)); forward = sum e^(y - max_y) ((y - max_y) - (x - max_x)).
    """

    max_x: torch.Tensor
    sum_x: torch.Tensor
    moment_x: torch.Tensor
    max_y: torch.Tensor
    sum_y: torch.Tensor
    reverse: torch.Tensor
    forward: torch.Tensor


def pair_stats(student_CV: torch.Tensor, teacher_CV: torch.Tensor, inv_temperature: float = 1.0) -> PairStats:
    """Statistics of both softmaxes and of their divergences in one read of both chunks; all logits must be finite."""
    if student_CV.shape[1] == 0:
        empty_C = torch.zeros(student_CV.shape[0], dtype=torch.promote_types(student_CV.dtype, torch.float32),
                              device=student_CV.device)
        none_C = torch.full_like(empty_C, -torch.inf)
        return PairStats(none_C, empty_C, empty_C, none_C, empty_C, empty_C, empty_C)
    if ops := _kernels(student_CV, teacher_CV):
        return PairStats(*ops.pair_stats(student_CV, teacher_CV, inv_temperature))
    x_CV, y_CV = _scaled(student_CV, inv_temperature), _scaled(teacher_CV, inv_temperature)
    max_x, max_y = x_CV.amax(1), y_CV.amax(1)
    x_CV, y_CV = x_CV - max_x[:, None], y_CV - max_y[:, None]
    ex_CV, ey_CV = x_CV.exp(), y_CV.exp()
    moment_x = (ex_CV * x_CV).sum(1)
    gap_CV = x_CV.sub_(y_CV)
    return PairStats(max_x, ex_CV.sum(1), moment_x, max_y, ey_CV.sum(1), (ex_CV * gap_CV).sum(1), -(ey_CV * gap_CV).sum(1))


def _log_mixture(s_CV: torch.Tensor, t_CV: torch.Tensor, beta: float) -> torch.Tensor:
    return torch.logaddexp(t_CV + math.log(beta), s_CV + math.log1p(-beta))


def jsd_sums(student_CV, teacher_CV, log_z_x_C, log_z_y_C, beta: float, inv_temperature: float = 1.0):
    """This rank's part of (KL(p || m), KL(q || m)), m = beta q + (1 - beta) p, f32 [C] each."""
    if student_CV.shape[1] == 0:
        return torch.zeros_like(log_z_x_C), torch.zeros_like(log_z_x_C)
    if ops := _kernels(student_CV, teacher_CV):
        return ops.jsd_sums(student_CV, teacher_CV, log_z_x_C, log_z_y_C, beta, inv_temperature)
    s_CV = _scaled(student_CV, inv_temperature) - log_z_x_C[:, None]
    t_CV = _scaled(teacher_CV, inv_temperature) - log_z_y_C[:, None]
    m_CV = _log_mixture(s_CV, t_CV, beta)
    return (s_CV.exp() * (s_CV - m_CV)).sum(1), (t_CV.exp() * (t_CV - m_CV)).sum(1)


def pair_gradient_(student_CV, teacher_CV, kind: str, log_z_x_C, log_z_y_C, value_C, coefficient_C, beta: float = 0.5,
                   inv_temperature: float = 1.0) -> torch.Tensor:
    """Overwrite the student's logits with coefficient x d divergence / d z. With log-probs s, t and p = e^s, q = e^t:

    reverse_kl: p (s - t - value), value = KL(p || q); forward_kl: p - q;
    jsd: (1 - beta) p (s - m - value), value = KL(p || m). Returns the logits.
    """
    if student_CV.shape[1] == 0:
        return student_CV
    if ops := _kernels(student_CV, teacher_CV):
        return ops.pair_gradient_(student_CV, teacher_CV, kind, log_z_x_C, log_z_y_C, value_C, coefficient_C, beta,
                                  inv_temperature)
    s_CV = _scaled(student_CV, inv_temperature) - log_z_x_C[:, None]
    t_CV = _scaled(teacher_CV, inv_temperature) - log_z_y_C[:, None]
    p_CV = s_CV.exp()
    if kind == "reverse_kl":
        grad_CV = s_CV.sub_(t_CV).sub_(value_C[:, None]).mul_(p_CV)
    elif kind == "forward_kl":
        grad_CV = p_CV.sub_(t_CV.exp_())
    else:
        grad_CV = s_CV.sub(_log_mixture(s_CV, t_CV, beta)).sub_(value_C[:, None]).mul_(p_CV).mul_(1.0 - beta)
    return student_CV.copy_(grad_CV.mul_(coefficient_C[:, None]))


def scale_rows_(tensor_CV: torch.Tensor, factor_C: torch.Tensor) -> torch.Tensor:
    """Multiply rows in place; rows whose factor is 1 are not touched on CUDA."""
    if ops := _kernels(tensor_CV):
        return ops.scale_rows_(tensor_CV, factor_C)
    return tensor_CV.mul_(factor_C.to(tensor_CV.dtype)[:, None])
