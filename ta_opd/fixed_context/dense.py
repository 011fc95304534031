"""Full-vocabulary quantities of one block of rows, from the logits of both models.

Shape suffixes: R rows, V shared vocabulary, K top-K entries, U = 2K union slots. Everything behind the logits is float64: a difference of
two float32 log-probs of -15 is good to 1e-6 only, and the double passes cost a fraction of the models' own time.
"""

import math

_LOWEST = -3.0e4  # stands for a logit of -inf: its probability is 0 and differences stay finite


def row_metrics(student_RV, teacher_RV, target_R, ks: tuple[int, ...]) -> dict:
    """Every per-position quantity of one block, as float64 / int64 tensors [R] or [R, K] (K = max(ks)), keys as described.

    Logits of -inf count as probability 0. target_R: the sampled token. Keys:
    Hs, Ht entropies (nats); KLf = KL(teacher || student), KLr = KL(student || teacher) over V; student_logp, teacher_logp of the target;
    student_rank, teacher_rank of the target and teacher_top1_student_rank, 1 = most likely; student_ids, student_logps,
    teacher_at_student, teacher_ids, teacher_logps, student_at_teacher [R, K].
    """
    import torch

    K = max(ks)
    out = {}
    student_ids, teacher_ids = student_RV.topk(K, dim=1).indices, teacher_RV.topk(K, dim=1).indices
    out["student_ids"], out["teacher_ids"] = student_ids, teacher_ids
    target = target_R[:, None]
    out["student_rank"] = 1 + (student_RV > student_RV.gather(1, target)).sum(1)
    out["teacher_rank"] = 1 + (teacher_RV > teacher_RV.gather(1, target)).sum(1)
    out["teacher_top1_student_rank"] = 1 + (student_RV > student_RV.gather(1, teacher_ids[:, :1])).sum(1)

    student_RV, teacher_RV = _shifted(student_RV), _shifted(teacher_RV)
    p_RV = student_RV.exp()
    mass_s = p_RV.sum(1)
    logz_s = mass_s.log()
    gap_RV = p_RV * student_RV
    out["Hs"] = logz_s - gap_RV.sum(1) / mass_s
    gap_RV = torch.sub(teacher_RV, student_RV, out=gap_RV)
    reverse = -p_RV.mul_(gap_RV).sum(1) / mass_s
    p_RV = torch.exp(teacher_RV, out=p_RV)
    mass_t = p_RV.sum(1)
    logz_t = mass_t.log()
    forward = gap_RV.mul_(p_RV).sum(1) / mass_t
    out["Ht"] = logz_t - p_RV.mul_(teacher_RV).sum(1) / mass_t
    out["KLf"] = (forward - logz_t + logz_s).clamp_(min=0)
    out["KLr"] = (reverse - logz_s + logz_t).clamp_(min=0)

    def logp(z_RV, ids, logz):
        return z_RV.gather(1, ids) - logz[:, None]

    out["student_logp"], out["teacher_logp"] = logp(student_RV, target, logz_s)[:, 0], logp(teacher_RV, target, logz_t)[:, 0]
    out["student_logps"], out["student_at_teacher"] = logp(student_RV, student_ids, logz_s), logp(student_RV, teacher_ids, logz_s)
    out["teacher_logps"], out["teacher_at_student"] = logp(teacher_RV, teacher_ids, logz_t), logp(teacher_RV, student_ids, logz_t)
    return out


def _shifted(z_RV):
    """A float64 copy, its largest entry 0 and none below _LOWEST."""
    z_RV = z_RV.double() if z_RV.dtype.itemsize < 8 else z_RV.clone()
    z_RV -= z_RV.amax(1, keepdim=True)
    return z_RV.clamp_(min=_LOWEST)


def topk_metrics(rows: dict, K: int, target_R) -> dict:
    """What the K best tokens of both sides say, with true full-vocabulary probabilities: tensors [R].

    rows: from `row_metrics`. Cmass_true (paper eq. 4), Cmass_topk (eq. 17, the intersection), Coverlap = |both| / K, topk_jaccard, shared
    masses, reach_t1, membership and rank of the target (0 = outside), top-K masses and entropies, and on the union renormalised to 1 on
    each side: KLf_union, KLr_union, CBC.
    """
    import torch

    ids_s, ids_t = rows["student_ids"][:, :K], rows["teacher_ids"][:, :K]
    logp_s, logp_t = rows["student_logps"][:, :K], rows["teacher_logps"][:, :K]
    t_at_s, s_at_t = rows["teacher_at_student"][:, :K], rows["student_at_teacher"][:, :K]
    same = ids_s[:, :, None] == ids_t[:, None, :]
    s_shared, t_shared = same.any(2), same.any(1)
    num_both = s_shared.sum(1).double()
    out = {
        "Cmass_true": t_at_s.exp().sum(1).clamp(max=1),
        "Cmass_topk": (t_at_s.exp() * s_shared).sum(1).clamp(max=1),
        "Coverlap": num_both / K,
        "topk_jaccard": num_both / (2 * K - num_both),
        "shared_teacher_topk_mass": (t_at_s.exp() * s_shared).sum(1),
        "shared_student_topk_mass": (logp_s.exp() * s_shared).sum(1),
        "reach_t1": (ids_s == ids_t[:, :1]).any(1).double(),
        "student_topk_mass": logp_s.exp().sum(1).clamp(max=1),
        "teacher_topk_mass": logp_t.exp().sum(1).clamp(max=1),
    }
    for side, ids, logps, short in (("student", ids_s, logp_s, "Hs"), ("teacher", ids_t, logp_t, "Ht")):
        hit = ids == target_R[:, None]
        out[f"target_in_{side}_topk"] = hit.any(1).double()
        out[f"target_{side}_rank"] = torch.where(hit.any(1), hit.int().argmax(1) + 1, 0).double()
        q = torch.log_softmax(logps, 1)
        out[f"{short}_topk"] = -(q.exp() * q).sum(1)
        out[f"{short}_topk_norm"] = out[f"{short}_topk"] / math.log(max(K, 2))
    # The union: the student's entries, then the teacher's that are not among them.
    closed = torch.zeros_like(logp_s)
    closed_t = closed.masked_fill(t_shared, -torch.inf)
    union_s = torch.cat([logp_s, s_at_t + closed_t], 1)
    union_t = torch.cat([t_at_s, logp_t + closed_t], 1)
    q_s, q_t = torch.log_softmax(union_s, 1), torch.log_softmax(union_t, 1)
    gap = torch.where(torch.isfinite(q_s) & torch.isfinite(q_t), q_t - q_s, 0)
    out["KLf_union"] = (q_t.exp() * gap).sum(1).clamp(min=0)
    out["KLr_union"] = (-q_s.exp() * gap).sum(1).clamp(min=0)
    out["CBC"] = ((q_s + q_t) / 2).exp().sum(1).clamp(max=1)
    return out
