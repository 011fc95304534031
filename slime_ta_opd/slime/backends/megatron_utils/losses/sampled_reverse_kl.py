"""`sampled_reverse_kl`: policy gradient on the sampled token whose advantage holds the reverse-KL signal, as in slime.

advantage = base - coef x (log p_student(target) - log p_teacher(target)), a constant;
loss = max(-advantage x ratio, -advantage x clip(ratio, 1 - eps_clip, 1 + eps_clip_high)), ratio = p_new / p_old.
On fresh rollouts the expected gradient is that of the reverse KL; one sample a position makes it noisy.
"""

from __future__ import annotations

import torch

from slime.backends.megatron_utils.losses.linear_head import linear_loss
from slime.backends.megatron_utils.losses.options import head_options, option
from slime.backends.megatron_utils.losses.registry import register_loss
from slime.backends.megatron_utils.losses.softmax_ops import row_stats, softmax_scale_
from slime.backends.megatron_utils.losses.vocab_parallel import (
    add_at_columns_,
    gather_columns,
    log_sum,
    merge_softmax,
)


def clipped_policy_loss(logp_R, logp_old_R, advantage_R, eps_clip: float, eps_clip_high: float,
                        eps_clip_c: float | None = None):
    """PPO's clipped loss of a token: (loss, d loss / d logp, ratio, 1 where the clip is active), all f32 [R].

    eps_clip_c > 1 bounds the loss of negative advantages by -advantage x eps_clip_c (dual clip); None leaves it out.
    """
    ratio_R = (logp_R - logp_old_R).exp()
    free_R = -advantage_R * ratio_R
    held_R = -advantage_R * ratio_R.clamp(1.0 - eps_clip, 1.0 + eps_clip_high)
    loss_R = torch.maximum(free_R, held_R)
    active_R = held_R > free_R
    if eps_clip_c is not None:
        bound_R = -advantage_R * eps_clip_c
        bounded_R = (advantage_R < 0) & (bound_R < loss_R)
        loss_R = torch.where(bounded_R, bound_R, loss_R)
        active_R = active_R | bounded_R
    return loss_R, torch.where(active_R, 0.0, free_R), ratio_R, active_R.to(loss_R.dtype)


class _SampledChunk:
    def __init__(self, rows, args, shard, inv_temperature):
        self.rows, self.shard, self.inv_temperature = rows, shard, inv_temperature
        self.coef = float(option(args, "opd_kl_coef", 1.0))
        eps = float(option(args, "eps_clip", 0.2))
        self.clip = (eps, float(option(args, "eps_clip_high", eps)), option(args, "eps_clip_c", None))
        self.recompute = bool(option(args, "opd_recompute_student", False))

    def __call__(self, logits_CV, lo, hi, scale_C):
        rows, shard = self.rows, self.shard
        target_C1 = rows.target_R[lo:hi, None]
        logit_C = gather_columns(logits_CV, target_C1, shard)[:, 0] * self.inv_temperature
        max_C, sum_C, moment_C = row_stats(logits_CV, self.inv_temperature)
        max_C, sum_C, moment_C = merge_softmax(max_C, sum_C, moment_C, shard.group)
        log_z_C = log_sum(max_C, sum_C)
        logp_C = logit_C - log_z_C
        old_C = rows.student_logp_old_R[lo:hi].to(logp_C.dtype)
        teacher_C = rows.teacher_logp_R[lo:hi].to(logp_C.dtype)
        signal_C = (logp_C if self.recompute else old_C) - teacher_C
        advantage_C = -self.coef * signal_C
        if rows.advantage_R is not None:
            advantage_C = advantage_C + rows.advantage_R[lo:hi].to(logp_C.dtype)
        loss_C, slope_C, ratio_C, clipped_C = clipped_policy_loss(logp_C, old_C, advantage_C, *self.clip)
        stats = {
            "student_logp": logp_C,
            "entropy": torch.log(sum_C) - moment_C / sum_C,
            "reverse_kl_sampled": logp_C - teacher_C,
            "advantage": advantage_C,
            "ratio": ratio_C,
            "clipped": clipped_C,
        }
        if scale_C is not None:
            weight_C = slope_C * scale_C.to(slope_C.dtype) * self.inv_temperature
            # the target's column on its own: weight - weight x p of a sure token has no digits left in bf16
            add_at_columns_(logits_CV, target_C1, torch.full_like(weight_C[:, None], -torch.inf), shard)
            softmax_scale_(logits_CV, log_z_C, -weight_C, self.inv_temperature)
            add_at_columns_(logits_CV, target_C1, (-weight_C * torch.expm1(logp_C))[:, None], shard)
        return loss_C, stats


@register_loss("sampled_reverse_kl", needs={"target_R", "student_logp_old_R", "teacher_logp_R"}, teacher="logprob")
def sampled_reverse_kl(hidden_RH, weight_VH, rows, args, tp_group=None):
    """Loss of each row, see the module; reads opd_kl_coef, eps_clip, eps_clip_high, eps_clip_c, opd_recompute_student.

    opd_recompute_student takes the student side of the signal under the current weights (detached) instead of
    `student_logp_old_R`: steadier when rollouts are stale. Statistics: student_logp, entropy, reverse_kl_sampled (under the
    current weights), advantage, ratio, clipped.
    """
    head = head_options(weight_VH, args, tp_group)
    chunk = _SampledChunk(rows, args, head.shard, head.inv_temperature)
    return linear_loss(hidden_RH, weight_VH, chunk, shard=head.shard, factor_R=rows.factor_R,
                       chunk_rows=head.chunk_rows)
