"""`full_reverse_kl`, `full_forward_kl`, `full_jsd`: divergences over the whole vocabulary, from a teacher's hidden states.

Both LM heads are applied chunk by chunk; the student's logits are overwritten by their gradient, the teacher's are dropped.
Sending hidden states instead of logits is what makes a teacher of another width cheap to use. When the vocabularies differ in
size, both softmaxes are taken over the ids that both have.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from slime.backends.megatron_utils.losses.linear_head import auto_chunk_rows, chunk_bytes_on, linear_loss
from slime.backends.megatron_utils.losses.options import head_options, jsd_beta, option
from slime.backends.megatron_utils.losses.registry import register_loss
from slime.backends.megatron_utils.losses.softmax_ops import jsd_sums, pair_gradient_, pair_stats, scale_rows_
from slime.backends.megatron_utils.losses.vocab_parallel import VocabShard, all_reduce_, gather_columns, log_sum, merge_pair
from ta_opd.errors import ConfigError

KINDS = ("reverse_kl", "forward_kl", "jsd")


def divergence_(student_CV, teacher_CV, kind: str, shard: VocabShard, *, coefficient_C=None, beta: float = 0.5,
                inv_temperature: float = 1.0):
    """Divergence of each row, (divergence_C, entropy_C, log_z_C) in f32, from two chunks of logits of this shard.

    With coefficient_C, the student's logits are overwritten by coefficient x gradient with respect to them.
    """
    stats = merge_pair(pair_stats(student_CV, teacher_CV, inv_temperature), shard.group)
    log_x_C, log_y_C = log_sum(stats.max_x, stats.sum_x), log_sum(stats.max_y, stats.sum_y)
    shift_C = stats.sum_y.log() - stats.sum_x.log()
    value_C = None
    if kind == "reverse_kl":
        out_C = value_C = stats.reverse / stats.sum_x + shift_C
    elif kind == "forward_kl":
        out_C = stats.forward / stats.sum_y - shift_C
    elif kind == "jsd":
        sums = jsd_sums(student_CV, teacher_CV, log_x_C, log_y_C, beta, inv_temperature)
        value_C, teacher_C = all_reduce_(torch.stack(sums), shard.group).unbind(0)
        out_C = beta * teacher_C + (1.0 - beta) * value_C
    else:
        raise ConfigError(f"expected a divergence of {KINDS}, got {kind!r}")
    if coefficient_C is not None:
        pair_gradient_(student_CV, teacher_CV, kind, log_x_C, log_y_C, value_C, coefficient_C * inv_temperature, beta,
                       inv_temperature)
    return out_C, stats.sum_x.log() - stats.moment_x / stats.sum_x, log_x_C


class _FullChunk:
    def __init__(self, rows, args, shard, inv_temperature, kind, beta):
        self.rows, self.shard, self.inv_temperature = rows, shard, inv_temperature
        self.kind, self.beta = kind, beta
        self.coef = float(option(args, "opd_kl_coef", 1.0))
        self.teacher_VH = rows.teacher_weight_VH.detach()[: shard.valid]
        self.buffer = None

    def _teacher_logits(self, lo, hi):
        hidden_CH = self.rows.teacher_hidden_RH[lo:hi].detach()
        if self.buffer is None or self.buffer.shape[0] < hi - lo:
            stride = -(-self.shard.valid // 64) * 64
            self.buffer = hidden_CH.new_empty(hi - lo, stride)[:, : self.shard.valid]
        out_CV = self.buffer[: hi - lo]
        return torch.mm(hidden_CH, self.teacher_VH.t(), out=out_CV) if self.shard.valid else out_CV

    def __call__(self, logits_CV, lo, hi, scale_C):
        stats = {}
        target_R = self.rows.target_R
        if target_R is not None:
            picked_C = gather_columns(logits_CV, target_R[lo:hi, None], self.shard)[:, 0] * self.inv_temperature
        coefficient_C = None if scale_C is None else self.coef * scale_C.to(torch.promote_types(logits_CV.dtype, torch.float32))
        divergence_C, entropy_C, log_z_C = divergence_(
            logits_CV, self._teacher_logits(lo, hi), self.kind, self.shard, coefficient_C=coefficient_C, beta=self.beta,
            inv_temperature=self.inv_temperature)
        stats |= {"divergence": divergence_C, "entropy": entropy_C}
        if target_R is not None:
            stats["student_logp"] = picked_C - log_z_C
        if hi == self.rows.teacher_hidden_RH.shape[0]:
            self.buffer = None
        return self.coef * divergence_C, stats


def _full_loss(hidden_RH, weight_VH, rows, args, tp_group, kind, beta=0.5):
    head = head_options(weight_VH, args, tp_group)
    shard = head.shard.common_with(option(args, "teacher_vocab_size", None))
    if rows.teacher_weight_VH.shape[0] < shard.valid:
        raise ConfigError(f"expected a teacher LM-head shard of at least {shard.valid} rows from id {shard.start}, got "
                          f"{rows.teacher_weight_VH.shape[0]}; align it with vocab_parallel.reshard_vocab, or give "
                          "teacher_vocab_size")
    chunk = _FullChunk(rows, args, shard, head.inv_temperature, kind, beta)
    chunk_rows = head.chunk_rows or auto_chunk_rows(  # two chunks of logits share the memory of one
        hidden_RH.shape[0], shard.valid, hidden_RH.element_size(), chunk_bytes_on(hidden_RH) // 2)
    return linear_loss(hidden_RH, weight_VH, chunk, shard=shard, factor_R=rows.factor_R, chunk_rows=chunk_rows)


_NEEDS = {"needs": {"teacher_hidden_RH", "teacher_weight_VH"}, "teacher": "hidden"}


@register_loss("full_reverse_kl", **_NEEDS)
def full_reverse_kl(hidden_RH, weight_VH, rows, args, tp_group=None):
    """opd_kl_coef x KL(student || teacher) over the common vocabulary. Reads teacher_vocab_size (ids the teacher has).

    Statistics: divergence (without the coefficient), entropy, and student_logp when `target_R` is given.
    """
    return _full_loss(hidden_RH, weight_VH, rows, args, tp_group, "reverse_kl")


@register_loss("full_forward_kl", **_NEEDS)
def full_forward_kl(hidden_RH, weight_VH, rows, args, tp_group=None):
    """opd_kl_coef x KL(teacher || student) over the common vocabulary; arguments and statistics as `full_reverse_kl`."""
    return _full_loss(hidden_RH, weight_VH, rows, args, tp_group, "forward_kl")


@register_loss("full_jsd", **_NEEDS)
def full_jsd(hidden_RH, weight_VH, rows, args, tp_group=None):
    """opd_kl_coef x generalised JSD (opd_jsd_beta, 0.5) over the common vocabulary; the rest as `full_reverse_kl`."""
    return _full_loss(hidden_RH, weight_VH, rows, args, tp_group, "jsd", jsd_beta(args))


class _FromLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student_RV, teacher_RV, kind, shard, beta, inv_temperature, overwrite):
        want = ctx.needs_input_grad[0]
        grad_RV = student_RV.detach() if overwrite or not want else student_RV.detach().clone()
        one_R = torch.ones(grad_RV.shape[0], device=grad_RV.device) if want else None
        out = []
        rows = max(1, grad_RV.shape[0])
        if not grad_RV.is_cuda:
            rows = auto_chunk_rows(rows, shard.valid, grad_RV.element_size(), chunk_bytes_on(grad_RV))
        for lo in range(0, grad_RV.shape[0], rows):
            part = slice(lo, lo + rows)
            student_CV, teacher_CV = grad_RV[part, : shard.valid], teacher_RV.detach()[part, : shard.valid]
            coefficient_C = one_R[part] if want else None
            out.append(divergence_(student_CV, teacher_CV, kind, shard, coefficient_C=coefficient_C, beta=beta,
                                   inv_temperature=inv_temperature)[0])
        if want:
            grad_RV[:, shard.valid :].zero_()
            ctx.grad = grad_RV
        return torch.cat(out) if out else grad_RV.new_zeros(0, dtype=torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_R):
        grad_RV, ctx.grad = ctx.grad, None
        return scale_rows_(grad_RV, grad_R), None, None, None, None, None, None


def divergence_from_logits(student_RV, teacher_RV, kind: str, *, tp_group=None, vocab_size: int | None = None, beta=0.5,
                           temperature: float = 1.0, overwrite: bool = False) -> torch.Tensor:
    """Divergence f32 [R] of logits that exist already (this rank's columns), differentiable once with respect to the student's.

    `overwrite` makes the gradient in the memory of the student's logits: no second [R, V] tensor, but nothing may read them
    afterwards. Raises ConfigError when the shapes differ or the kind is unknown.
    """
    if student_RV.shape != teacher_RV.shape or kind not in KINDS:
        raise ConfigError(f"expected two [R, V] tensors of one shape and a kind of {KINDS}, got {tuple(student_RV.shape)}, "
                          f"{tuple(teacher_RV.shape)}, {kind!r}")
    shard = VocabShard.of(student_RV.shape[1], vocab_size, tp_group)
    return _FromLogits.apply(student_RV, teacher_RV, kind, shard, beta, 1.0 / temperature, overwrite)
