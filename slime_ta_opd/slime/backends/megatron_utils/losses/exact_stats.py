"""Full-vocabulary entropy, divergences and compatibility of student and teacher, from hidden states; no gradient."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from slime.backends.megatron_utils.losses.linear_head import auto_chunk_rows, chunk_bytes_on
from slime.backends.megatron_utils.losses.softmax_ops import pair_stats
from slime.backends.megatron_utils.losses.vocab_parallel import (
    VocabShard,
    gather_columns,
    log_sum,
    merge_pair,
    top_columns,
)
from ta_opd.errors import ConfigError


@dataclass
class ExactStats:
    """One entry a row, natural logarithms, f32 unless said; the same on every rank of the group.

    H  entropy of the student; KLf = KL(teacher || student); KLr = KL(student || teacher);
    C  teacher's mass on the student's top-K ids (arXiv 2605.26844, eq. 4)
    *_ids_RK int64 and *_logps_RK: top-K of each side, most probable first (-1 and -inf beyond the vocabulary);
    teacher_at_student_RK: teacher's log-probs at student_ids_RK; *_logp_R at the target (-inf where it is no common id), None when
    none was given.
    """

    H: torch.Tensor
    KLf: torch.Tensor
    KLr: torch.Tensor
    C: torch.Tensor
    student_ids_RK: torch.Tensor
    student_logps_RK: torch.Tensor
    teacher_ids_RK: torch.Tensor
    teacher_logps_RK: torch.Tensor
    teacher_at_student_RK: torch.Tensor
    student_logp_R: torch.Tensor | None = None
    teacher_logp_R: torch.Tensor | None = None


def _chunk(student_CV, teacher_CV, shard, k, target_C, inv_t) -> ExactStats:
    stats = merge_pair(pair_stats(student_CV, teacher_CV, inv_t), shard.group)
    log_x_C, log_y_C = log_sum(stats.max_x, stats.sum_x), log_sum(stats.max_y, stats.sum_y)
    log_sum_x_C, log_sum_y_C = stats.sum_x.log(), stats.sum_y.log()
    student_ids, student_z = top_columns(student_CV, k, shard)
    teacher_ids, teacher_z = top_columns(teacher_CV, k, shard)
    wanted = student_ids if target_C is None else torch.cat([student_ids, target_C[:, None]], 1)
    teacher_at = gather_columns(teacher_CV, wanted, shard) * inv_t - log_y_C[:, None]
    at_student = torch.where(student_ids >= 0, teacher_at[:, :k], -torch.inf)
    student_logp = teacher_logp = None
    if target_C is not None:
        both = target_C < shard.total
        student_logp = gather_columns(student_CV, target_C[:, None], shard)[:, 0] * inv_t - log_x_C
        student_logp, teacher_logp = (torch.where(both, logp, -torch.inf) for logp in (student_logp, teacher_at[:, k]))
    return ExactStats(
        H=log_sum_x_C - stats.moment_x / stats.sum_x,
        KLf=stats.forward / stats.sum_y + log_sum_x_C - log_sum_y_C,
        KLr=stats.reverse / stats.sum_x + log_sum_y_C - log_sum_x_C,
        C=at_student.exp().sum(1),
        student_ids_RK=student_ids,
        student_logps_RK=student_z * inv_t - log_x_C[:, None],
        teacher_ids_RK=teacher_ids,
        teacher_logps_RK=teacher_z * inv_t - log_y_C[:, None],
        teacher_at_student_RK=at_student,
        student_logp_R=student_logp,
        teacher_logp_R=teacher_logp,
    )


@torch.no_grad()
def exact_stats(student_hidden_RH, student_weight_VH, teacher_hidden_RH, teacher_weight_VH, *, k: int, tp_group=None,
                vocab_size: int | None = None, teacher_vocab_size: int | None = None, temperature: float = 1.0,
                target_R=None, chunk_rows: int | None = None) -> ExactStats:
    """Statistics of R rows (R may be 0), chunked over rows, vocabulary-parallel over `tp_group`.

    The two hidden sizes may differ; both weights are shards of the same id range (`vocab_parallel.reshard_vocab`). Where the
    vocabularies differ in size, both softmaxes are over the common ids. Raises ConfigError on row counts or k that do not fit.
    """
    num_rows = student_hidden_RH.shape[0]
    if teacher_hidden_RH.shape[0] != num_rows or k < 1:
        raise ConfigError(f"expected k >= 1 and as many teacher rows as student rows, got k {k}, {num_rows} student rows, "
                          f"{teacher_hidden_RH.shape[0]} teacher rows")
    shard = VocabShard.of(student_weight_VH.shape[0], vocab_size, tp_group).common_with(teacher_vocab_size)
    student_VH, teacher_VH = student_weight_VH[: shard.valid], teacher_weight_VH[: shard.valid]
    if teacher_VH.shape[0] != shard.valid:
        raise ConfigError(f"expected a teacher LM-head shard of {shard.valid} rows from id {shard.start}, got "
                          f"{teacher_VH.shape[0]}; align it with vocab_parallel.reshard_vocab, or give teacher_vocab_size")
    rows = chunk_rows or auto_chunk_rows(num_rows, shard.valid, student_hidden_RH.element_size(),
                                         chunk_bytes_on(student_hidden_RH) // 2)
    parts = []
    for lo in range(0, max(1, num_rows), rows):
        part = slice(lo, lo + rows)
        student_CV, teacher_CV = student_hidden_RH[part] @ student_VH.t(), teacher_hidden_RH[part] @ teacher_VH.t()
        parts.append(_chunk(student_CV, teacher_CV, shard, k, None if target_R is None else target_R[part], 1.0 / temperature))
    columns = ([getattr(p, f.name) for p in parts] for f in fields(ExactStats))
    return ExactStats(*(None if values[0] is None else torch.cat(values) for values in columns))
