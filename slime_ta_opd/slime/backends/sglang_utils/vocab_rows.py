"""What a server reads off rows of logits: the log-prob of one token, and the K largest with their ids.

On a GPU with Triton the logits are read once, in the dtype that the LM head wrote (`triton_vocab`); elsewhere PyTorch does the same in
float32 with `logsumexp` and `topk`. Shape suffixes: R rows, V vocabulary, K top-k width.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

KERNELS = True  # False: PyTorch everywhere


class Rows(NamedTuple):
    """Of R rows, in float32 (ids: int64)."""

    log_probs: Tensor  # of the token that was given [R]
    values: Tensor  # the largest log-probs [R, K], falling
    ids: Tensor  # theirs [R, K]
    log_z: Tensor  # logarithm of the sum of exponentials [R]: any log-prob is its logit less this


@functools.cache
def _kernels():
    try:
        from slime.backends.sglang_utils import triton_vocab
    except ImportError:
        return None
    return triton_vocab


def _usable(rows_RV: Tensor, k: int):
    kernels = _kernels() if KERNELS and rows_RV.is_cuda else None
    return kernels if kernels is not None and kernels.takes(rows_RV, k) else None


def log_probs(logits_RV: Tensor, tokens_R: Tensor, k: int) -> Rows:
    """Log-probs of tokens_R (int64, each in [0, V)) and the k largest of each row.

    logits_RV: floats, neighbours in the last dimension. Where logits are equal any of their ids may be taken. NaN in a row makes all its
    log-probs NaN.
    """
    kernels = _usable(logits_RV, k)
    if kernels is not None:
        return Rows(*kernels.log_probs(logits_RV, tokens_R, k))
    logits_RV = logits_RV.float()
    log_z_R = torch.logsumexp(logits_RV, -1)
    rows_RV = logits_RV - log_z_R[:, None]
    return Rows(rows_RV.gather(1, tokens_R[:, None])[:, 0], *rows_RV.topk(k, dim=-1), log_z_R)


def largest(rows_RV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(the k largest values [R, k] in falling order, their columns [R, k] int64), as `torch.topk` over the last dimension."""
    kernels = _usable(rows_RV, k)
    return kernels.largest(rows_RV, k) if kernels is not None else tuple(rows_RV.topk(k, dim=-1))
