"""`topk_reverse_kl`, `topk_forward_kl`, `topk_jsd`: divergences over a top-K support and one bucket for everything else.

Student and teacher are compared on K + 1 events: each supported id, and "any other id". Merging ids into one event never
raises a divergence, so these are lower bounds of the full ones and are never negative. They are differentiable through every
candidate and through the bucket. The `_truncated` names leave the bucket out: such a sum is not a divergence, can be
negative, and can be lowered by moving mass off the support.

The student's bucket is summed over its own logits with the support taken out, never as 1 - sum, so it keeps its digits when
the support holds almost everything. The teacher's bucket is 1 - sum of the log-probs a server sent (f32): below TAIL_FLOOR
it is not known, is set to TAIL_FLOOR, and is counted in the statistic `teacher_tail_floored`.

Supported ids that are padding (-1), that the student does not have, or whose teacher log-prob is not known (NaN) belong to the
bucket on both sides.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from slime.backends.megatron_utils.losses.linear_head import linear_loss
from slime.backends.megatron_utils.losses.options import head_options, jsd_beta, option
from slime.backends.megatron_utils.losses.registry import register_loss
from slime.backends.megatron_utils.losses.softmax_ops import row_stats, softmax_scale_
from slime.backends.megatron_utils.losses.vocab_parallel import (
    add_at_columns_,
    gather_columns,
    log_sum,
    merge_softmax,
)

TAIL_FLOOR = 2.0**-24  # half a unit in the last place of a probability near 1


def _masked_product(p, x):
    """p x, and 0 where p is 0 (x may be infinite there)."""
    return torch.where(p > 0, p * torch.where(p > 0, x, 0.0), 0.0)


def reverse_kl(s_CB, t_CB, beta):
    """p (log p - log q) of log-probs s = log p, t = log q, both [C, B]: (terms, d terms / d s less p).

    A slope may differ by any multiple of p: where the events are complete it falls out of the gradient of the logits.
    """
    terms_CB = _masked_product(s_CB.exp(), s_CB - t_CB)
    return terms_CB, terms_CB


def truncated_reverse_kl(s_CB, t_CB, beta):
    """The same where the events are not complete: (terms, d terms / d s)."""
    p_CB = s_CB.exp()
    terms_CB = _masked_product(p_CB, s_CB - t_CB)
    return terms_CB, terms_CB + p_CB


def forward_kl(s_CB, t_CB, beta):
    """q (log q - log p): (terms, d terms / d s), both [C, B]."""
    q_CB = t_CB.exp()
    return _masked_product(q_CB, t_CB - s_CB), -q_CB


def jsd(s_CB, t_CB, beta):
    """beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p (generalised JSD, Agarwal et al. 2024)."""
    p_CB, q_CB = s_CB.exp(), t_CB.exp()
    m_CB = torch.logaddexp(t_CB + math.log(beta), s_CB + math.log1p(-beta))
    slope_CB = (1.0 - beta) * _masked_product(p_CB, s_CB - m_CB)
    return beta * _masked_product(q_CB, t_CB - m_CB) + slope_CB, slope_CB


def teacher_at(ids_RK, teacher_ids_RJ, teacher_logps_RJ):
    """Teacher log-probs at ids, looked up in the teacher's own top-J list: f32 [R, K], NaN where the list lacks the id."""
    found_RK = torch.full_like(ids_RK, torch.nan, dtype=teacher_logps_RJ.dtype)
    for id_R1, logp_R1 in zip(teacher_ids_RJ.split(1, 1), teacher_logps_RJ.split(1, 1), strict=True):  # [R, K, J] would be large
        found_RK = torch.where((ids_RK == id_R1) & (ids_RK >= 0), logp_R1, found_RK)
    return found_RK


def support_of(rows, args) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids int64 [R, K], teacher log-probs f32 [R, K]) of the support; id -1 where the entry goes to the bucket."""
    if option(args, "opd_topk_support", "teacher") == "student":
        ids_RK = rows.student_ids_RK.long()
        logps_RK = rows.teacher_at_student_RK.float()
        if rows.teacher_ids_RK is not None and rows.teacher_logps_RK is not None:
            listed_RK = teacher_at(ids_RK, rows.teacher_ids_RK.long(), rows.teacher_logps_RK.float())
            logps_RK = torch.where(logps_RK.isnan(), listed_RK, logps_RK)
    else:
        ids_RK, logps_RK = rows.teacher_ids_RK.long(), rows.teacher_logps_RK.float()
    known_RK = (ids_RK >= 0) & logps_RK.isfinite()
    return torch.where(known_RK, ids_RK, -1), torch.where(known_RK, logps_RK, -torch.inf)


class _TopKChunk:
    def __init__(self, rows, args, shard, inv_temperature, terms: Callable, beta: float, tail: bool):
        self.rows, self.shard, self.inv_temperature = rows, shard, inv_temperature
        self.terms, self.beta, self.tail = terms, beta, tail
        self.coef = float(option(args, "opd_kl_coef", 1.0))
        ids_RK, logps_RK = support_of(rows, args)
        mine_RK = (ids_RK >= 0) & (ids_RK < shard.total)
        self.ids_RK = torch.where(mine_RK, ids_RK, -1)
        self.teacher_RK = torch.where(mine_RK, logps_RK, -torch.inf)

    def _teacher_tail(self, teacher_CK, exists_C):
        """(log-mass of the teacher's bucket, 1 where it was floored); -inf where no id is left for the bucket."""
        rest_C = -torch.expm1(torch.logsumexp(teacher_CK.double(), 1))
        floored_C = exists_C & (rest_C < TAIL_FLOOR)
        tail_C = torch.where(exists_C, rest_C.clamp(min=TAIL_FLOOR).log(), -torch.inf)
        return tail_C, floored_C

    def __call__(self, logits_CV, lo, hi, scale_C):
        shard, inv_t = self.shard, self.inv_temperature
        ids_CK, teacher_CK = self.ids_RK[lo:hi], self.teacher_RK[lo:hi]
        wanted = ids_CK if self.rows.target_R is None else torch.cat([ids_CK, self.rows.target_R[lo:hi, None]], 1)
        picked = gather_columns(logits_CV, wanted, shard) * inv_t
        support_CK = torch.where(ids_CK >= 0, picked[:, : ids_CK.shape[1]], -torch.inf)

        add_at_columns_(logits_CV, ids_CK, torch.full_like(support_CK, -torch.inf), shard)
        max_C, sum_C, moment_C = merge_softmax(*row_stats(logits_CV, inv_t), shard.group)
        tail_z_C = log_sum(max_C, sum_C)
        log_z_C = torch.logaddexp(tail_z_C, torch.logsumexp(support_CK, 1))
        student_CK = support_CK - log_z_C[:, None]
        student_tail_C = tail_z_C - log_z_C

        exists_C = (ids_CK >= 0).sum(1) < shard.total
        teacher_tail_C, floored_C = self._teacher_tail(teacher_CK, exists_C)
        dtype = student_CK.dtype
        s_CB, t_CB = student_CK, teacher_CK.to(dtype)
        if self.tail:
            s_CB = torch.cat([s_CB, student_tail_C[:, None]], 1)
            t_CB = torch.cat([t_CB, teacher_tail_C.to(dtype)[:, None]], 1)
        terms_CB, slopes_CB = self.terms(s_CB, t_CB, self.beta)
        divergence_C = terms_CB.sum(1)

        tail_p_C = student_tail_C.exp()
        lower_C = torch.where(sum_C > 0, max_C - log_z_C, 0.0)
        tail_mean_C = torch.where(sum_C > 0, tail_p_C * lower_C + lower_C.exp() * moment_C, 0.0)
        stats = {
            "divergence": divergence_C,
            "entropy": -tail_mean_C - _masked_product(student_CK.exp(), student_CK).sum(1),
            "student_tail_mass": tail_p_C,
            "teacher_tail_mass": teacher_tail_C.exp().to(dtype),
            "teacher_tail_floored": floored_C.to(dtype),
            "support_size": (ids_CK >= 0).sum(1).to(dtype),
        }
        if self.rows.target_R is not None:
            stats["student_logp"] = picked[:, -1] - log_z_C
        if scale_C is not None:
            self._gradient_(logits_CV, ids_CK, student_CK, tail_p_C, tail_z_C, slopes_CB, scale_C.to(dtype))
        return self.coef * divergence_C, stats

    def _gradient_(self, logits_CV, ids_CK, student_CK, tail_p_C, tail_z_C, slopes_CB, scale_C):
        """With buckets b of slope d_b = dL/ds_b and D = sum d_b: dL/dz_k = d_k - p_k D on the support, and
        dL/dz_j = softmax over the tail_j (d_tail - p_tail D) off it."""
        k = ids_CK.shape[1]
        total_C = slopes_CB.sum(1)
        tail_slope_C = slopes_CB[:, k] if self.tail else 0.0
        weight_C = self.coef * self.inv_temperature * scale_C
        softmax_scale_(logits_CV, tail_z_C, weight_C * (tail_slope_C - tail_p_C * total_C), self.inv_temperature)
        support_CK = slopes_CB[:, :k] - student_CK.exp() * total_C[:, None]
        add_at_columns_(logits_CV, ids_CK, weight_C[:, None] * support_CK, self.shard)


def _topk_loss(hidden_RH, weight_VH, rows, args, tp_group, terms, beta=0.5, tail=True):
    head = head_options(weight_VH, args, tp_group)
    chunk = _TopKChunk(rows, args, head.shard, head.inv_temperature, terms, beta, tail)
    return linear_loss(hidden_RH, weight_VH, chunk, shard=head.shard, factor_R=rows.factor_R,
                       chunk_rows=head.chunk_rows)


_NEEDS = {"needs": {"teacher_ids_RK", "teacher_logps_RK"}, "needs_student": {"student_ids_RK", "teacher_at_student_RK"},
          "teacher": "topk"}


@register_loss("topk_reverse_kl", **_NEEDS)
def topk_reverse_kl(hidden_RH, weight_VH, rows, args, tp_group=None):
    """opd_kl_coef x KL(student || teacher) over the support (opd_topk_support: teacher | student) and the bucket.

    Statistics: divergence (without the coefficient), entropy, student_tail_mass, teacher_tail_mass, teacher_tail_floored,
    support_size, and student_logp when `target_R` is given.
    """
    return _topk_loss(hidden_RH, weight_VH, rows, args, tp_group, reverse_kl)


@register_loss("topk_forward_kl", **_NEEDS)
def topk_forward_kl(hidden_RH, weight_VH, rows, args, tp_group=None):
    """opd_kl_coef x KL(teacher || student) over the support and the bucket; statistics as `topk_reverse_kl`."""
    return _topk_loss(hidden_RH, weight_VH, rows, args, tp_group, forward_kl)


@register_loss("topk_jsd", **_NEEDS)
def topk_jsd(hidden_RH, weight_VH, rows, args, tp_group=None):
    """opd_kl_coef x generalised JSD (opd_jsd_beta, 0.5) over the support and the bucket; statistics as `topk_reverse_kl`."""
    return _topk_loss(hidden_RH, weight_VH, rows, args, tp_group, jsd, jsd_beta(args))


@register_loss("topk_reverse_kl_truncated", **_NEEDS)
def topk_reverse_kl_truncated(hidden_RH, weight_VH, rows, args, tp_group=None):
    """opd_kl_coef x sum over the support of p (log p - log q), no bucket: not a divergence, for comparison only."""
    return _topk_loss(hidden_RH, weight_VH, rows, args, tp_group, truncated_reverse_kl, tail=False)


@register_loss("topk_forward_kl_truncated", **_NEEDS)
def topk_forward_kl_truncated(hidden_RH, weight_VH, rows, args, tp_group=None):
    """opd_kl_coef x sum over the support of q (log q - log p), no bucket: not a divergence, for comparison only."""
    return _topk_loss(hidden_RH, weight_VH, rows, args, tp_group, forward_kl, tail=False)
