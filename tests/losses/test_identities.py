"""What a divergence must be whatever its implementation: zero between equals, ordered, finite at the ends, complete at K = V."""

from __future__ import annotations

import math
from types import SimpleNamespace

import loss_cases as cases
import loss_reference as reference
import pytest
import torch

from slime.backends.megatron_utils.losses.exact_stats import exact_stats
from slime.backends.megatron_utils.losses.full import divergence_from_logits
from slime.backends.megatron_utils.losses.registry import LOSS_TYPES, get_loss
from slime.backends.megatron_utils.losses.topk import TAIL_FLOOR, teacher_at
from slime.backends.megatron_utils.losses.types import Rows

R, V = 9, 50
KINDS = ("reverse_kl", "forward_kl", "jsd")


def loss_of_logits(name, student, rows, **args):
    """The loss of given logits: hidden = logits, head = identity. Returns (TokenLoss, gradient of the logits)."""
    logits = student.clone().requires_grad_()
    head = torch.eye(student.shape[1], dtype=student.dtype)
    out = get_loss(name)(logits, head, rows, SimpleNamespace(**args))
    out.loss_R.sum().backward()
    return out, logits.grad


def full_rows(teacher_logits):
    return Rows(teacher_hidden_RH=teacher_logits, teacher_weight_VH=torch.eye(teacher_logits.shape[1], dtype=teacher_logits.dtype))


def topk_rows(teacher_logits, k):
    top = torch.log_softmax(teacher_logits.double(), 1).topk(k, 1)
    return Rows(teacher_ids_RK=top.indices, teacher_logps_RK=top.values.float())


@pytest.fixture
def logits():
    g = torch.Generator().manual_seed(7)
    return torch.randn(R, V, generator=g) * 2, torch.randn(R, V, generator=g) * 2


@pytest.mark.parametrize("kind", KINDS)
def test_equal_models_give_zero(logits, kind):
    student, _ = logits
    for name, rows in ((f"full_{kind}", full_rows(student)), (f"topk_{kind}", topk_rows(student, 8))):
        out, grad = loss_of_logits(name, student, rows)
        assert out.loss_R.abs().max() < 1e-6, name
        assert grad.abs().max() < 1e-6, name


def test_equal_models_give_no_signal(logits):
    student, _ = logits
    target = torch.arange(R)
    logp = torch.log_softmax(student, 1).gather(1, target[:, None])[:, 0]
    rows = Rows(target_R=target, student_logp_old_R=logp, teacher_logp_R=logp)
    out, grad = loss_of_logits("sampled_reverse_kl", student, rows)
    assert out.loss_R.abs().max() == 0 and grad.abs().max() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_support_of_the_whole_vocabulary_is_the_full_divergence(logits, kind):
    student, teacher = logits
    top, grad_top = loss_of_logits(f"topk_{kind}", student, topk_rows(teacher, V))
    full, grad_full = loss_of_logits(f"full_{kind}", student, full_rows(teacher))
    torch.testing.assert_close(top.loss_R, full.loss_R, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad_top, grad_full, rtol=1e-5, atol=1e-6)
    assert top.stats["student_tail_mass"].max() == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 3, 8, 20])
def test_tail_bucket_never_exceeds_full_and_grows_with_k(logits, kind, k):
    """Data processing: merging events lowers a divergence; a larger support is a finer partition."""
    student, teacher = logits
    full, _ = loss_of_logits(f"full_{kind}", student, full_rows(teacher))
    one, _ = loss_of_logits(f"topk_{kind}", student, topk_rows(teacher, k))
    two, _ = loss_of_logits(f"topk_{kind}", student, topk_rows(teacher, k + 5))
    assert bool((one.loss_R >= -1e-6).all())
    assert bool((one.loss_R <= two.loss_R + 1e-6).all())
    assert bool((two.loss_R <= full.loss_R + 1e-6).all())


def test_truncated_sum_is_not_a_divergence(logits):
    """With the student's mass moved off the support the truncated reverse sum is negative, the one with a bucket is not."""
    student, teacher = logits
    rows = topk_rows(teacher, 4)
    away = student.clone().scatter(1, rows.teacher_ids_RK, -8.0)
    truncated, _ = loss_of_logits("topk_reverse_kl_truncated", away, rows)
    bucketed, _ = loss_of_logits("topk_reverse_kl", away, rows)
    assert bool((truncated.loss_R < 0).all())
    assert bool((bucketed.loss_R > 0.3).all())


@pytest.mark.parametrize("name", LOSS_TYPES)
@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_extreme_logits_are_finite(name, scale):
    """Logits of +-1e4: probabilities that round to 1 and to 0, tails of e^-20000."""
    g = torch.Generator().manual_seed(3)
    student, teacher = torch.randn(R, V, generator=g), torch.randn(R, V, generator=g)
    student, teacher = student.sign() * scale * (student.abs() > 1), teacher.sign() * scale * (teacher.abs() > 1)
    student[0], teacher[0] = -scale, -scale
    student[0, 3], teacher[0, 4] = scale, scale
    student[1], student[2, :2] = scale, scale
    student[2, 2:] = -scale
    rows = full_rows(teacher) if name.startswith("full") else topk_rows(teacher, 5)
    rows.target_R = torch.arange(R)
    logp = torch.log_softmax(teacher, 1).gather(1, rows.target_R[:, None])[:, 0]
    rows.teacher_logp_R = logp
    rows.student_logp_old_R = torch.log_softmax(student, 1).gather(1, rows.target_R[:, None])[:, 0]
    out, grad = loss_of_logits(name, student, rows)
    assert bool(out.loss_R.isfinite().all()) and bool(grad.isfinite().all())
    assert all(bool(value.isfinite().all()) for value in out.stats.values()), {k: v for k, v in out.stats.items()}


def test_student_tail_keeps_its_digits_when_the_support_holds_almost_everything():
    """1 - sum p is 0 in f32 here; the bucket is e^-30 and its log-prob, loss and gradient are right."""
    student = torch.zeros(1, V, dtype=torch.float32)
    student[0, 0] = 30.0
    rows = Rows(teacher_ids_RK=torch.tensor([[0]]), teacher_logps_RK=torch.tensor([[math.log(0.9)]]))
    for kind in KINDS:
        out, grad = loss_of_logits(f"topk_{kind}", student, rows)
        exact = student.double().requires_grad_()
        expected = reference.topk(torch.log_softmax(exact, 1), rows.teacher_ids_RK, rows.teacher_logps_RK, kind)
        expected.sum().backward()
        tail = 49 * math.exp(-30) / (1 + 49 * math.exp(-30))
        assert out.stats["student_tail_mass"].item() == pytest.approx(tail, rel=1e-5)
        torch.testing.assert_close(out.loss_R.double(), expected.detach(), rtol=1e-5, atol=0)
        torch.testing.assert_close(grad[:, 1:].double(), exact.grad[:, 1:], rtol=1e-4, atol=0)


def test_a_sure_tokens_gradient_keeps_its_digits_in_bf16():
    """1 - p of the target: in bf16, p rounds to 1 from 0.998 on. Every column is within bf16's rounding of the float64 gradient."""
    student = torch.zeros(4, V)
    student[:, 7] = torch.tensor([4.0, 8.0, 10.0, 14.0])
    student[:, 9] = 1.0
    student = student.bfloat16()
    rows = Rows(target_R=torch.full((4,), 7), teacher_logp_R=torch.full((4,), -0.75),
                student_logp_old_R=torch.log_softmax(student.double(), 1)[:, 7].float())  # fmt: skip
    _, grad = loss_of_logits("sampled_reverse_kl", student, rows)
    exact = student.double().requires_grad_()
    reference.sampled(torch.log_softmax(exact, 1), rows).sum().backward()
    torch.testing.assert_close(grad.double(), exact.grad, rtol=2.0**-7, atol=0)


def test_teacher_tail_below_resolution_is_floored_and_said():
    student = torch.randn(2, V, generator=torch.Generator().manual_seed(0))
    rows = Rows(teacher_ids_RK=torch.tensor([[4], [5]]), teacher_logps_RK=torch.tensor([[0.0], [math.log(0.5)]]))
    out, grad = loss_of_logits("topk_reverse_kl", student, rows)
    assert out.stats["teacher_tail_floored"].tolist() == [1.0, 0.0]
    assert out.stats["teacher_tail_mass"][0].item() == pytest.approx(TAIL_FLOOR)
    assert bool(out.loss_R.isfinite().all()) and bool(grad.isfinite().all())


def test_unknown_teacher_entries_move_to_the_bucket_on_both_sides(logits):
    """NaN at an id = that id left out of the support; so are ids the student does not have."""
    student, teacher = logits
    rows = topk_rows(teacher, 6)
    nan = Rows(student_ids_RK=rows.teacher_ids_RK.clone(), teacher_at_student_RK=rows.teacher_logps_RK.clone())
    nan.teacher_at_student_RK[:, 2] = torch.nan
    without = [0, 1, 3, 4, 5]
    short = Rows(teacher_ids_RK=rows.teacher_ids_RK[:, without], teacher_logps_RK=rows.teacher_logps_RK[:, without])
    foreign = Rows(teacher_ids_RK=rows.teacher_ids_RK.clone(), teacher_logps_RK=rows.teacher_logps_RK)
    foreign.teacher_ids_RK[:, 2] = V + 3
    expected, grad = loss_of_logits("topk_reverse_kl", student, short)
    for other, args in ((nan, {"opd_topk_support": "student"}), (foreign, {})):
        out, grad_other = loss_of_logits("topk_reverse_kl", student, other, **args)
        torch.testing.assert_close(out.loss_R, expected.loss_R, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(grad_other, grad, rtol=1e-5, atol=1e-7)
        assert out.stats["support_size"].tolist() == [5.0] * R
    listed = Rows(student_ids_RK=nan.student_ids_RK, teacher_at_student_RK=nan.teacher_at_student_RK,
                  teacher_ids_RK=rows.teacher_ids_RK, teacher_logps_RK=rows.teacher_logps_RK)
    filled, _ = loss_of_logits("topk_reverse_kl", student, listed, opd_topk_support="student")
    assert filled.stats["support_size"].tolist() == [6.0] * R, "the teacher's own list knows the missing entry"


def test_the_teachers_list_is_searched_in_little_memory():
    """Nothing of the size of rows x support x list: 0.5 GiB for 32k rows and 64 entries."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Sizes(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.largest = max(self.largest, out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    ids = torch.stack([torch.randperm(60, generator=torch.Generator().manual_seed(i))[:20] for i in range(8)])
    listed, logps = ids.flip(1)[:, :12].clone(), torch.arange(8 * 12).reshape(8, 12) * -0.25
    ids[:, 3], listed[:, 5] = -1, -1
    with Sizes() as sizes:
        found = teacher_at(ids, listed, logps)
    assert sizes.largest == ids.numel()
    for row in range(8):
        known = dict(zip(listed[row].tolist(), logps[row].tolist(), strict=True))
        expected = [known.get(i, math.nan) if i >= 0 else math.nan for i in ids[row].tolist()]
        torch.testing.assert_close(found[row], torch.tensor(expected), rtol=0, atol=0, equal_nan=True)


def test_row_without_any_teacher_entry_teaches_nothing(logits):
    student, _ = logits
    rows = Rows(teacher_ids_RK=torch.full((R, 4), -1), teacher_logps_RK=torch.full((R, 4), -torch.inf))
    for kind in KINDS:
        out, grad = loss_of_logits(f"topk_{kind}", student, rows)
        assert out.loss_R.abs().max() < 1e-6 and grad.abs().max() < 1e-6


def test_reverse_kl_lowers_and_its_gradient_is_the_gradient_of_the_value(logits):
    """Central differences of the loss itself, so that a wrong reference cannot hide a wrong gradient."""
    student, teacher = (x.double() for x in logits)
    rows = topk_rows(teacher, 5)
    direction = torch.randn(student.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for name, own in ((f"topk_{k}", rows) for k in KINDS):
        _, grad = loss_of_logits(name, student, own)
        up, _ = loss_of_logits(name, student + 1e-4 * direction, own)
        down, _ = loss_of_logits(name, student - 1e-4 * direction, own)
        slope = (up.loss_R.sum() - down.loss_R.sum()) / 2e-4
        assert slope.item() == pytest.approx((grad * direction).sum().item(), rel=1e-6), name
    stepped, _ = loss_of_logits("topk_reverse_kl", student - 0.05 * loss_of_logits("topk_reverse_kl", student, rows)[1], rows)
    assert stepped.loss_R.sum() < loss_of_logits("topk_reverse_kl", student, rows)[0].loss_R.sum()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("overwrite", [False, True])
def test_divergence_from_logits(logits, kind, overwrite):
    """Same value and gradient from logits that exist; columns beyond vocab_size do not count and get no gradient."""
    student, teacher = (torch.cat([x, torch.full((R, 6), 99.0)], 1) for x in logits)
    exact = student[:, :V].double().requires_grad_()
    expected = reference.divergence(kind, torch.log_softmax(exact / 0.8, 1), torch.log_softmax(teacher[:, :V].double() / 0.8, 1), 0.3)
    weights = torch.linspace(0, 1, R)
    (expected * weights.double()).sum().backward()
    leaf = student.clone().requires_grad_()
    own = leaf * 1.0
    out = divergence_from_logits(own, teacher, kind, vocab_size=V, beta=0.3, temperature=0.8, overwrite=overwrite)
    (out * weights).sum().backward()
    torch.testing.assert_close(out.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(leaf.grad[:, :V].double(), exact.grad, rtol=1e-5, atol=1e-6)
    assert leaf.grad[:, V:].abs().max() == 0
    assert torch.equal(own.detach(), student) != overwrite


def test_a_target_outside_the_common_vocabulary_is_impossible(logits):
    """Not a log-prob made of a logit of 0: a padding id that only the student has."""
    student, teacher = logits
    eye, common = torch.eye(V), V - 10
    target = torch.tensor([0, 5, common - 1, common, V - 1, 1, 2, 3, 4])
    found = exact_stats(student, eye, teacher, eye, k=3, vocab_size=V, teacher_vocab_size=common, target_R=target)
    for logp, side in ((found.student_logp_R, student), (found.teacher_logp_R, teacher)):
        assert (logp == -torch.inf).tolist() == [False, False, False, True, True, False, False, False, False]
        expected = torch.log_softmax(side[:, :common].double(), 1).gather(1, target.clamp(max=common - 1)[:, None])[:, 0]
        inside = target < common
        torch.testing.assert_close(logp[inside].double(), expected[inside], rtol=1e-5, atol=1e-6)


def test_factor_known_and_unknown_give_the_same_gradients_to_the_bit():
    """The one-pass way is an optimisation: same numbers, also when the total is scaled afterwards."""
    for name in LOSS_TYPES:
        grads = []
        for factor in (True, False):
            case = cases.Case(name, factor=factor, chunk=5)
            data = cases._data(case)
            hidden, weight = data["hidden"].clone().requires_grad_(), data["weight"].clone().requires_grad_()
            rows = Rows(**data["rows"], teacher_hidden_RH=data["teacher_hidden"], teacher_weight_VH=data["teacher_weight"])
            rows.factor_R = data["factor"] if factor else None
            out = get_loss(name)(hidden, weight, rows, SimpleNamespace(loss_chunk_rows=5))
            total = out.total if factor else (out.loss_R * data["factor"]).sum()
            (total * 4.0).backward()
            grads.append((hidden.grad, weight.grad))
        assert torch.equal(grads[0][0], grads[1][0]) and torch.equal(grads[0][1], grads[1][1]), name
