"""What goes into a loss and what comes out.

Shape legend of this package: R rows to compute, C rows of one chunk, V vocabulary columns of this rank's shard,
H hidden size, K support ids of a row. A row is one response position whose next token is taught.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import torch

from ta_opd.errors import DataError

_NOT_PER_ROW = ("teacher_weight_VH",)
_INTEGER = ("target_R", "sample_R", "teacher_ids_RK", "student_ids_RK")


@dataclass
class Rows:
    """Row-aligned inputs of a loss; a loss names those it needs (`registry.LossSpec.needs`), the others stay None.

    target_R               int64, the sampled token
    weight_R               f32, direct supervision of the row (0 drops it)
    factor_R               f32, weight x 1/denominator of the reduction (`reduction.row_factors`). When it is given, the
                           loss computes its gradients in the forward pass and `TokenLoss.total` carries them
    sample_R               int64, index of the row's sample in this rank's batch
    student_logp_old_R     f32, log-prob of the target when it was sampled (or recomputed before the step)
    teacher_logp_R         f32, teacher's log-prob of the target
    advantage_R            f32, base advantage from a task reward; None means zero
    teacher_ids_RK         int, teacher's top-K ids, padded with -1
    teacher_logps_RK       f32, their log-probs, padded with -inf
    student_ids_RK         int, student's top-K ids, padded with -1
    teacher_at_student_RK  f32, teacher's log-probs at student_ids_RK, NaN where unknown
    teacher_hidden_RH      teacher's last hidden states (its own hidden size)
    teacher_weight_VH      teacher's LM-head shard: the same id range as the student's shard (`vocab_parallel.reshard_vocab`)
    """

    target_R: torch.Tensor | None = None
    weight_R: torch.Tensor | None = None
    factor_R: torch.Tensor | None = None
    sample_R: torch.Tensor | None = None
    student_logp_old_R: torch.Tensor | None = None
    teacher_logp_R: torch.Tensor | None = None
    advantage_R: torch.Tensor | None = None
    teacher_ids_RK: torch.Tensor | None = None
    teacher_logps_RK: torch.Tensor | None = None
    student_ids_RK: torch.Tensor | None = None
    teacher_at_student_RK: torch.Tensor | None = None
    teacher_hidden_RH: torch.Tensor | None = None
    teacher_weight_VH: torch.Tensor | None = None

    def require(self, names: frozenset[str] | set[str], num_rows: int, loss: str) -> None:
        """Raise DataError unless every named field is there, and every given field has `num_rows` rows."""
        missing = sorted(name for name in names if getattr(self, name) is None)
        if missing:
            raise DataError(f"{loss}: expected the row fields {sorted(names)}, got None for {missing}; "
                            "collect them during rollout, or choose a loss that does not need them")
        for spec in fields(self):
            tensor = getattr(self, spec.name)
            if tensor is None or spec.name in _NOT_PER_ROW:
                continue
            if tensor.shape[0] != num_rows:
                raise DataError(f"{loss}: expected {num_rows} rows in {spec.name}, got {tensor.shape[0]}")
            if spec.name in _INTEGER and tensor.is_floating_point():
                raise DataError(f"{loss}: expected integers in {spec.name}, got {tensor.dtype}")


@dataclass
class TokenLoss:
    """A loss before it is summed.

    loss_R  f32; differentiable with respect to hidden and weight when `Rows.factor_R` was None, detached otherwise
    stats   f32 tensors [R], detached, for logging
    total   f32 scalar, sum of factor_R x loss_R, differentiable; None when `Rows.factor_R` was None
    """

    loss_R: torch.Tensor
    stats: dict[str, torch.Tensor] = field(default_factory=dict)
    total: torch.Tensor | None = None
