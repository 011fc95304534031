"""Full-vocabulary and top-K quantities against a plain float64 computation, row by row."""

import math

import numpy as np
import pytest
import torch

from ta_opd.fixed_context.dense import row_metrics, topk_metrics
from ta_opd.metrics import token_metrics
from ta_opd.topk import TopK

R, V, KS = 40, 200, (4, 16)


def logits(seed=0, dtype=torch.float32, scale=4.0):
    g = torch.Generator().manual_seed(seed)
    student = torch.randn(R, V, generator=g) * scale
    teacher = student + torch.randn(R, V, generator=g) * 2
    return student.to(dtype), teacher.to(dtype), torch.randint(0, V, (R,), generator=g)


def oracle(student, teacher, target, K):
    """One row in numpy float64, from definitions."""
    s, t = np.asarray(student, np.float64), np.asarray(teacher, np.float64)
    ps, pt = (np.exp(z - z.max()) / np.exp(z - z.max()).sum() for z in (s, t))
    top_s, top_t = np.argsort(-ps)[:K], np.argsort(-pt)[:K]
    union = sorted(set(top_s.tolist()) | set(top_t.tolist()))
    qs, qt = ps[union] / ps[union].sum(), pt[union] / pt[union].sum()
    both = set(top_s.tolist()) & set(top_t.tolist())
    q_top = ps[top_s] / ps[top_s].sum()
    return {
        "Hs": -(ps * np.log(ps)).sum(), "Ht": -(pt * np.log(pt)).sum(), "KLf": (pt * np.log(pt / ps)).sum(), "KLr": (ps * np.log(ps / pt)).sum(),
        "student_logp": np.log(ps[target]), "teacher_logp": np.log(pt[target]), "student_rank": 1 + (ps > ps[target]).sum(),
        "teacher_rank": 1 + (pt > pt[target]).sum(), "teacher_top1_student_rank": 1 + (ps > ps[top_t[0]]).sum(),
        "Cmass_true": pt[top_s].sum(), "Cmass_topk": pt[sorted(both)].sum() if both else 0.0, "Coverlap": len(both) / K,
        "topk_jaccard": len(both) / len(union), "CBC": np.sqrt(qs * qt).sum(), "KLf_union": (qt * np.log(qt / qs)).sum(),
        "KLr_union": (qs * np.log(qs / qt)).sum(), "reach_t1": float(top_t[0] in top_s), "target_in_student_topk": float(target in top_s),
        "target_teacher_rank": float(list(top_t).index(target) + 1) if target in top_t else 0.0, "student_topk_mass": ps[top_s].sum(),
        "shared_student_topk_mass": ps[sorted(both)].sum() if both else 0.0, "Hs_topk": -(q_top * np.log(q_top)).sum(),
        "Hs_topk_norm": -(q_top * np.log(q_top)).sum() / math.log(K),
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("K", KS)
def test_equals_float64_definitions(dtype, K):
    student, teacher, target = logits(dtype=dtype)
    rows = row_metrics(student, teacher, target, KS)
    found = {**rows, **topk_metrics(rows, K, target)}
    for r in range(R):
        for name, expected in oracle(student[r], teacher[r], int(target[r]), K).items():
            assert float(found[name][r]) == pytest.approx(expected, abs=1e-9), (name, r)


def test_float32_logits_of_a_large_vocabulary_within_1e6():
    g = torch.Generator().manual_seed(0)
    student = torch.randn(4, 150_000, generator=g) * 3
    teacher = student + torch.randn(4, 150_000, generator=g)
    found = row_metrics(student, teacher, torch.zeros(4, dtype=torch.long), (16,))
    ls, lt = student.double().log_softmax(1), teacher.double().log_softmax(1)
    for name, expected in {"KLf": (lt.exp() * (lt - ls)).sum(1), "KLr": (ls.exp() * (ls - lt)).sum(1), "Hs": -(ls.exp() * ls).sum(1)}.items():
        assert (found[name] - expected).abs().max() < 1e-6


def test_inputs_are_left_alone():
    student, teacher, target = logits(dtype=torch.float64)
    before = student.clone(), teacher.clone()
    row_metrics(student, teacher, target, KS)
    assert torch.equal(student, before[0]) and torch.equal(teacher, before[1])


def test_equal_sides_have_no_divergence():
    student, _, target = logits()
    rows = row_metrics(student, student, target, KS)
    found = topk_metrics(rows, 16, target)
    for name, expected in (("KLf_union", 0.0), ("CBC", 1.0), ("Coverlap", 1.0), ("topk_jaccard", 1.0)):
        assert torch.allclose(found[name].double(), torch.full((R,), expected, dtype=torch.float64), atol=1e-12)
    assert rows["KLf"].abs().max() < 1e-12 and rows["KLr"].abs().max() < 1e-12


def test_impossible_tokens_stay_finite():
    student, teacher, target = logits()
    student[:, 5] = -torch.inf
    teacher[:, 7] = -torch.inf
    rows = row_metrics(student, teacher, target, KS)
    assert all(torch.isfinite(rows[name]).all() for name in ("KLf", "KLr", "Hs", "Ht"))
    assert all(torch.isfinite(v.double()).all() for v in topk_metrics(rows, 16, target).values())


def test_agrees_with_the_online_metrics_where_those_are_exact():
    """With the whole vocabulary returned, online top-K metrics are full-vocabulary ones."""
    student, teacher, target = logits(dtype=torch.float64)
    rows = row_metrics(student, teacher, target, (V,))
    found = topk_metrics(rows, V, target)
    sides = [TopK(rows[f"{s}_ids"].numpy().astype(np.int32), rows[f"{s}_logps"].numpy()) for s in ("student", "teacher")]
    online = token_metrics(
        *sides, sampled_ids=target.numpy(), student_logprobs=rows["student_logp"].numpy(), teacher_logprobs=rows["teacher_logp"].numpy(),
        response_lengths=[R], support="union_floor",
    )  # fmt: skip
    np.testing.assert_allclose(online["KLf_union"], rows["KLf"].numpy(), atol=1e-7)
    for name in ("KLf_union", "KLr_union", "CBC", "Coverlap", "Hs_topk_norm", "Ht_topk", "student_topk_mass", "target_student_rank"):
        np.testing.assert_allclose(online[name], found[name].numpy(), atol=1e-7)
