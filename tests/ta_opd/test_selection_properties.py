"""What must hold for every batch, whatever is in it."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_selection import RANKINGS

from ta_opd.metrics import token_metrics
from ta_opd.selection import RELEASED_MASKS, SelectionConfig, list_selectors, select_tokens
from ta_opd.topk import TopK

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # nan, inf, division by zero
K = 4
MASKS = sorted({s.name for s in list_selectors() if ":" not in s.name} | set(RELEASED_MASKS))
PLAIN = [*RANKINGS, "random", "ier", "sampled_rkl_max", "sampled_rkl_min", "tip_opd", "dial", "prefix"]
RATIOS = st.sampled_from([0.01, 0.05, 0.1, 0.25, 0.5, 0.9, 1.0])
# Log-probs as no server should send them, but some do.
ODD = st.sampled_from([0.0, -0.5, -3.0, -20.0, -120.0, -1e30, 7.0, 1e5, float("nan"), float("inf"), float("-inf")])
quick = settings(max_examples=40, deadline=None)


@st.composite
def batches(draw, odd=False, min_valid=0):
    """(student, teacher, sampled, sampled log-probs of both, lengths, valid)."""
    lengths = draw(st.lists(st.integers(0, 12), min_size=1, max_size=6))
    T = sum(lengths)
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    sides = []
    for _ in range(2):
        ids = np.argsort(rng.random((T, 3 * K)), axis=1)[:, :K].astype(np.int32)
        logprobs = np.log(np.sort(rng.dirichlet(np.ones(K), T), axis=1)[:, ::-1] * 0.95 + 1e-9)
        if odd and T:
            values = np.array(draw(st.lists(ODD, min_size=4, max_size=8)))
            where = rng.random((T, K)) < draw(st.sampled_from([0.1, 0.9]))
            logprobs[where] = rng.choice(values, int(where.sum()))
            ids[rng.random((T, K)) < 0.1] = draw(st.sampled_from([-1, 0, 5]))
        sides.append(TopK(ids, logprobs))
    sampled = rng.integers(0, 3 * K, T)
    known = [rng.normal(-1, 0.5, T) for _ in range(2)]
    if odd and T:
        known[0][rng.random(T) < 0.2] = draw(ODD)
    valid = rng.random(T) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    assume(valid.sum() >= min_valid)
    return *sides, sampled, *known, np.array(lengths), valid


def metrics_of(batch, dtype=np.float64, **options):
    student, teacher, sampled, s, t, lengths, _ = batch
    return token_metrics(
        student.astype(dtype), teacher.astype(dtype), sampled_ids=sampled, student_logprobs=s, teacher_logprobs=t,
        response_lengths=lengths, **options,
    )  # fmt: skip


def select(batch, metrics=None, valid=None, rollout_id=0, **options):
    student, teacher, sampled, _, _, lengths, own_valid = batch
    return select_tokens(
        metrics_of(batch) if metrics is None else metrics, own_valid if valid is None else valid, lengths,
        SelectionConfig(**options), rollout_id=rollout_id, student=student, teacher=teacher, sampled_ids=sampled,
    )  # fmt: skip


@pytest.mark.parametrize("mask", MASKS)
@quick
@given(data=st.data())
def test_budget_voice_validity_and_weights(mask, data):
    batch = data.draw(batches())
    ratio, min_keep = data.draw(RATIOS), data.draw(st.integers(0, 3))
    scope = data.draw(st.sampled_from(["batch", "response"]))
    profile = data.draw(st.sampled_from(["paper", "released"]))
    rule = data.draw(st.sampled_from(["inside", "on_top"]))
    *_, lengths, valid = batch
    selection = select(
        batch, mask=mask, ratio=ratio, min_keep=min_keep, scope=scope, min_keep_rule=rule, profile=profile
    )
    assert not (selection.keep & ~valid).any()
    assert ((selection.weights > 0) == selection.keep).all() and np.isfinite(selection.weights).all()
    if rule == "inside" and mask not in ("none", "full"):
        assert selection.keep.sum() <= selection.budget
    if rule == "on_top" and mask not in ("fire", "mintok", "maxtok", "minmaxtok", "rand1tok", "sampled_rkl_max", "sampled_rkl_min"):
        ends = np.cumsum(lengths)
        for start, end in zip(ends - lengths, ends, strict=True):
            assert selection.keep[start:end].sum() >= min(min_keep, valid[start:end].sum())
    for name, column in selection.columns.items():
        assert name == "budget_method" or np.isfinite(column.astype(float)).all(), name


@pytest.mark.parametrize("support", ["union_floor", "union_tail"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@quick
@given(batch=batches(odd=True), mask=st.sampled_from(MASKS), profile=st.sampled_from(["paper", "released"]))
def test_nothing_that_comes_in_makes_a_nan(support, dtype, batch, mask, profile):
    metrics = metrics_of(batch, dtype, support=support)
    may_be_nan = {"student_logp_sampled", "teacher_logp_sampled", "sampled_reverse_kl", "sampled_teacher_adv", "Cmass_true"}
    for name, column in metrics.items():
        assert name in may_be_nan or np.isfinite(column).all(), name
    selection = select(batch, metrics, mask=mask, ratio=0.3, profile=profile)
    assert np.isfinite(selection.weights).all()
    for name in ("H_norm", "D_norm", "C_norm", "DC_norm", "Dlearn", "Dincompat", "tip_score", "ca_softor_score", "split_ca_score"):
        column = selection.columns[name]
        assert np.isfinite(column).all() and column.min(initial=0) >= 0 and column.max(initial=0) <= 1 + 1e-6, name


@pytest.mark.parametrize("padding", [np.nan, np.inf, -np.inf, -0.5])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_padding_with_any_log_prob_is_padding(dtype, padding):
    """The id -1 says it; a hand-made array may hold anything beside it."""
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((6, 12)), axis=1)[:, :K].astype(np.int32)
    logprobs = np.sort(rng.normal(-2, 0.5, (6, K)), axis=1)[:, ::-1].astype(dtype)
    ids[::2, -1], logprobs[::2, -1] = -1, padding
    found = token_metrics(TopK(ids, logprobs), TopK(ids, logprobs), sampled_ids=ids[:, 0], student_logprobs=None, teacher_logprobs=None, response_lengths=[6])
    short = [[[x, i, None] for x, i in zip(*row, strict=True) if i >= 0] for row in zip(logprobs.tolist(), ids.tolist(), strict=True)]
    clean = TopK.from_lists(short, K, dtype=dtype)
    expected = token_metrics(clean, clean, sampled_ids=ids[:, 0], student_logprobs=None, teacher_logprobs=None, response_lengths=[6])
    for name, column in expected.items():
        np.testing.assert_array_equal(found[name], column, err_msg=name)


@pytest.mark.parametrize("mask", [mask for mask in MASKS if mask not in ("random", "rand1tok")])
@pytest.mark.parametrize("profile", ["paper", "released"])
@settings(max_examples=15, deadline=None)
@given(batch=batches(), data=st.data())
def test_permuting_samples_permutes_the_mask(mask, profile, batch, data):
    *_, lengths, valid = batch
    metrics = metrics_of(batch)
    # Ties are broken by row, so let no two tokens tie.
    rng = np.random.default_rng(0)
    for name in ("Hs_topk_norm", "KLf_union", "KLr_union", "Cmass", "sampled_reverse_kl", "Hs_topk", "teacher_logp_sampled"):
        metrics[name] = rng.permutation(np.linspace(0.1, 0.9, valid.size)) ** 2
    metrics["sampled_teacher_adv"] = -metrics["sampled_reverse_kl"]
    metrics["student_logp_sampled"] = metrics["teacher_logp_sampled"] - metrics["sampled_reverse_kl"]
    order = data.draw(st.permutations(range(len(lengths))))
    ends = np.cumsum(lengths)
    rows = np.concatenate([np.arange(ends[i] - lengths[i], ends[i]) for i in order]).astype(int)
    student, teacher, sampled, s, t, _, _ = batch
    moved = (student[rows], teacher[rows], sampled[rows], s[rows], t[rows], lengths[order], valid[rows])
    options = dict(mask=mask, ratio=0.3, profile=profile, q_low=0.0, q_high=1.0)
    before = select(batch, metrics, **options)
    after = select(moved, {name: column[rows] for name, column in metrics.items()}, **options)
    if _untied(before.columns["budget_score"]):
        np.testing.assert_array_equal(after.keep, before.keep[rows])
        np.testing.assert_allclose(after.weights, before.weights[rows], rtol=1e-6)


def _untied(score) -> bool:
    positive = np.sort(score[score > 0])
    return (np.diff(positive) > 1e-12).all() and np.count_nonzero(score == 0) <= 1


@pytest.mark.parametrize("mask", PLAIN)
@quick
@given(batch=batches(), scope=st.sampled_from(["batch", "response"]), min_keep=st.integers(0, 3), seed=st.integers(0, 5))
def test_more_budget_never_drops_a_kept_token(mask, batch, scope, min_keep, seed):
    metrics, before = metrics_of(batch), None
    for ratio in (0.01, 0.1, 0.3, 0.31, 0.6, 0.99, 1.0):
        keep = select(batch, metrics, mask=mask, ratio=ratio, scope=scope, min_keep=min_keep, seed=seed).keep
        assert before is None or not (before & ~keep).any(), ratio
        before = keep


@quick
@given(batch=batches(min_valid=1), mask=st.sampled_from([m for m in RELEASED_MASKS if m != "random"]), junk=st.integers(0, 2**31))
def test_paper_profile_never_looks_at_invalid_tokens(batch, mask, junk):
    *_, valid = batch
    metrics = metrics_of(batch)
    rng = np.random.default_rng(junk)
    changed = {
        name: np.where(valid, column, (rng.random(valid.size) * 1e3).astype(column.dtype)) for name, column in metrics.items()
    }
    one, other = (select(batch, m, mask=mask, ratio=0.3) for m in (metrics, changed))
    np.testing.assert_array_equal(one.keep, other.keep)
    np.testing.assert_array_equal(one.columns["Dlearn"][valid], other.columns["Dlearn"][valid])


@quick
@given(batch=batches(), shift=st.sampled_from([-3.0, -0.25, 0.0]))
def test_scaling_one_side_changes_only_what_depends_on_its_mass(batch, shift):
    student, teacher, *rest = batch
    scaled = TopK(student.ids, student.logprobs + shift)
    one, other = metrics_of(batch), metrics_of((scaled, teacher, *rest))
    depends = {"student_topk_mass", "student_top1_prob"}
    for name in set(one) - depends:
        np.testing.assert_allclose(other[name], one[name], rtol=1e-9, atol=1e-9, err_msg=name)
    both = metrics_of((scaled, TopK(teacher.ids, teacher.logprobs + shift), *rest))
    depends |= {"teacher_topk_mass", "teacher_top1_prob", "Cmass", "Cmass_topk", "Cprefix_ema"}
    for name in set(one) - depends:
        np.testing.assert_allclose(both[name], one[name], rtol=1e-9, atol=1e-9, err_msg=name)
    np.testing.assert_allclose(both["Cmass"], one["Cmass"] * np.exp(shift), rtol=1e-9)


@pytest.mark.parametrize("mask", ["dlearn_high", "entropy", "tip", "ca_softor", "q3_highc"])
@quick
@given(batch=batches(), shift=st.sampled_from([-3.0, -0.25]))
def test_scaling_both_sides_keeps_the_same_tokens(mask, batch, shift):
    # All masses scale by one factor, which quantile normalisation divides out.
    student, teacher, *rest = batch
    scaled = (TopK(student.ids, student.logprobs + shift), TopK(teacher.ids, teacher.logprobs + shift), *rest)
    one, other = select(batch, mask=mask, ratio=0.3), select(scaled, mask=mask, ratio=0.3)
    score = one.columns["budget_score"]
    if np.unique(np.round(score, 9)).size == score.size:
        np.testing.assert_array_equal(one.keep, other.keep)
