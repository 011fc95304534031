"""Exact compatibility: what windows over the response bring back equals the dense distribution, whatever the windows."""

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest

from slime.rollout import on_policy_distillation as opd
from slime.utils.types import Sample
from ta_opd.errors import ConfigError
from ta_opd.topk import TopK
from tests.rollout.conftest import FakeModel, dense, top
from tests.sglang_utils.tiny import VOCAB

K = 6


def make(length=20, prompt=5, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 200, prompt + length).tolist()
    rows = dense(1, tokens)[prompt:]
    return Sample(tokens=tokens, response_length=length, student_topk=top(rows, K) if length else TopK.empty(0, K))


def arguments(**kwargs):
    return SimpleNamespace(**{"opd_topk_metrics_k": K, "opd_exact_cmass": True, "student_config": {"vocab_size": VOCAB}, **kwargs})


def score(args, sample, teacher=None):
    teacher = teacher or FakeModel(2)
    asyncio.run(opd.score_sample(args, sample, teacher))
    return teacher


@pytest.mark.parametrize("window", [None, 1, 3, 16, 100])
def test_windows_equal_the_dense_distribution(window):
    sample = make()
    teacher = score(arguments(opd_exact_cmass_window=window), sample)
    rows = dense(2, sample.tokens)[sample.prompt_length :]
    np.testing.assert_allclose(sample.teacher_at_student_ids, np.take_along_axis(rows, sample.student_topk.ids.astype(int), 1), atol=1e-5)
    assert sample.teacher_at_student_ids.dtype == np.float32
    kinds = [kind for kind, _ in teacher.calls]
    assert kinds == ["score", "windows"]
    # only ids that the teacher's own top-k does not hold are asked for
    for begin, end, ids in teacher.calls[1][1]["windows"]:
        span = slice(begin - sample.prompt_length, end - sample.prompt_length)
        wanted = set(sample.student_topk.ids[span].ravel()) - set()
        assert set(ids) <= wanted and len(set(ids)) == len(ids)


def test_only_when_asked_for():
    sample = make()
    assert [kind for kind, _ in score(arguments(opd_exact_cmass=False), sample).calls] == ["score"]
    assert sample.teacher_at_student_ids is None
    sample = make()
    score(arguments(opd_exact_cmass=False, opd_loss_type="topk_reverse_kl", opd_topk_support="student"), sample)
    assert np.isfinite(sample.teacher_at_student_ids).all()
    assert not opd.needs_exact(arguments(opd_exact_cmass=False, opd_loss_type="topk_reverse_kl", opd_topk_support="teacher"))


def test_nothing_is_asked_when_the_teacher_already_said_it():
    sample = make()
    teacher = FakeModel(1)  # the same model on both sides
    score(arguments(), sample, teacher)
    assert [kind for kind, _ in teacher.calls] == ["score", "windows"][:1] or teacher.calls[1][1]["windows"] == []
    np.testing.assert_array_equal(sample.teacher_at_student_ids, sample.student_topk.logprobs)


@pytest.mark.parametrize("overflow", ["fallback", "truncate", "error"])
def test_the_released_limit_on_ids(overflow):
    sample = make()
    args = arguments(opd_exact_cmass_max_union=2, opd_exact_cmass_overflow=overflow)
    if overflow == "error":
        with pytest.raises(ConfigError, match="max_union 2"):
            score(args, sample)
        return
    teacher = score(args, sample)
    assert all(len(ids) <= 2 for _, seen in teacher.calls[1:] for _, _, ids in seen["windows"])
    known = np.isfinite(sample.teacher_at_student_ids)
    assert known.any() and not known.all()
    rows = np.take_along_axis(dense(2, sample.tokens)[sample.prompt_length :], sample.student_topk.ids.astype(int), 1)
    np.testing.assert_allclose(sample.teacher_at_student_ids[known], rows[known], atol=1e-5)


def test_a_teacher_with_a_smaller_vocabulary_gives_the_rest_no_mass():
    sample = make()
    ids = sample.student_topk.ids.copy()
    ids[3, 2] = VOCAB - 1
    sample.student_topk = TopK(ids, sample.student_topk.logprobs)
    teacher = FakeModel(2)
    teacher.vocab_size = VOCAB - 1
    score(arguments(), sample, teacher)
    assert sample.teacher_at_student_ids[3, 2] == -np.inf and np.isfinite(np.delete(sample.teacher_at_student_ids[3], 2)).all()


def test_a_teacher_with_a_larger_vocabulary_is_cut_to_the_common_part():
    sample = make()
    limit = 100
    score(arguments(opd_exact_cmass=False, student_config={"vocab_size": limit}), sample)
    topk, rows = sample.teacher_topk, dense(2, sample.tokens)[sample.prompt_length :]
    assert topk.ids.max() < limit and topk.ids.shape == (20, K)
    for t in range(20):
        expected = [i for i in np.argsort(-rows[t], kind="stable")[:K] if i < limit]
        assert topk.ids[t].tolist() == expected + [-1] * (K - len(expected))


def test_an_empty_response_costs_no_request():
    sample = make(length=0)
    teacher = score(arguments(), sample)
    assert teacher.calls == [] and len(sample.teacher_log_probs) == 0 and sample.teacher_topk.K == K
    assert sample.teacher_at_student_ids.shape == (0, K)


def test_large_responses_are_asked_in_several_requests(monkeypatch):
    monkeypatch.setattr(opd, "_IDS_PER_REQUEST", 40)
    sample = make(length=40)
    teacher = score(arguments(opd_exact_cmass_window=4), sample)
    assert len(teacher.calls) > 3 and np.isfinite(sample.teacher_at_student_ids).all()


def test_windows_are_cut_off_the_event_loop(monkeypatch):
    """A long response has hundreds of windows: while they are found, other samples' requests go out."""
    import threading

    threads, cut = [], opd.exact_windows

    def noting(*args, **kwargs):
        threads.append(threading.current_thread())
        return cut(*args, **kwargs)

    monkeypatch.setattr(opd, "exact_windows", noting)
    score(arguments(), make())
    assert len(threads) == 1 and threads[0] is not threading.current_thread()


def test_released_names_are_importable_without_the_stack():
    import subprocess
    import sys

    code = (
        "import sys, slime.rollout.on_policy_distillation as o\n"
        "assert callable(o.reward_func) and callable(o.post_process_rewards)\n"
        "bad = {'ray', 'sglang', 'megatron', 'transformers'} & set(sys.modules)\n"
        "assert not bad, bad\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_scoring_that_is_cut_off_leaves_nothing_behind():
    """An engine that dies cancels what is being scored; the sample is given back and scored anew, with every value it needs."""
    sample, teacher = make(), FakeModel(2)
    windows = teacher.score_windows

    async def cut_off():
        asked = asyncio.Event()

        async def never(*args, **kwargs):
            asked.set()
            await asyncio.Event().wait()

        teacher.score_windows = never
        task = asyncio.create_task(opd.score_sample(arguments(), sample, teacher))
        await asked.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cut_off())
    assert sample.teacher_log_probs is sample.teacher_topk is sample.teacher_at_student_ids is None
    teacher.score_windows = windows
    score(arguments(), sample, teacher)
    rows = dense(2, sample.tokens)[sample.prompt_length :]
    np.testing.assert_allclose(sample.teacher_at_student_ids, np.take_along_axis(rows, sample.student_topk.ids.astype(int), 1), atol=1e-5)
