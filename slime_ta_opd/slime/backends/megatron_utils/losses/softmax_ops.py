"""Per-row softmax statistics and gradients of one chunk of logits on one rank.

Each function has a torch body for any device; on CUDA with Triton it runs a kernel that makes no f32 copy of the chunk.
All work on logits z = logits x inv_temperature, in f32 (f64 for f64 logits). No communication here.
"""

from __future__ import annotations

import torch


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
    z_CV = _scaled(logits_CV, inv_temperature)
    empty_C = log_z_C == -torch.inf
    out_CV = (z_CV - torch.where(empty_C, 0.0, log_z_C)[:, None]).exp_()
    out_CV.mul_(torch.where(empty_C, 0.0, coefficient_C)[:, None])
    return logits_CV.copy_(out_CV)


def scale_(tensor: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Multiply in place by a scalar tensor; no pass over memory when it is 1 (known on CPU, found by the kernel on CUDA)."""
    if tensor.device.type == "cpu" and float(factor) == 1.0:
        return tensor
    return tensor.mul_(factor.to(tensor.dtype))
