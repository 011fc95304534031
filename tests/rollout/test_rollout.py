"""The rollout over a model that answers from dense rows: order, scoring behind generation, filters, partial responses, faults."""

import asyncio

import numpy as np
import pytest

from slime.backends.sglang_utils.clients import Clients
from slime.observability.metrics import rollout_metrics
from slime.rollout import measuring, sglang_rollout
from slime.rollout.data_source import PromptDataSource
from slime.rollout.evaluate import evaluate
from slime.rollout.sampling import sampling_seed
from slime.rollout.sglang_rollout import generate_rollout
from slime.utils.fields import collect
from slime.utils.types import Sample
from ta_opd.errors import DataError, ServiceError
from tests.rollout.conftest import FakeModel, dense


def clients(student_hook=None, teacher_hook=None, teachers=("default",)):
    return Clients(FakeModel(1, student_hook), {name: FakeModel(2 + i, teacher_hook) for i, name in enumerate(teachers)})


def flat(groups):
    return [s for g in groups for s in g]


def check(sample, k=6, teacher_seed=2):
    """Every array of the sample against the dense rows."""
    student = dense(1, sample.tokens)[sample.prompt_length :]
    teacher = dense(teacher_seed, sample.tokens)[sample.prompt_length :]
    at = np.arange(sample.response_length), sample.response_ids
    np.testing.assert_allclose(sample.rollout_log_probs, student[at], atol=1e-5)
    np.testing.assert_allclose(sample.teacher_log_probs, teacher[at], atol=1e-5)
    for topk, rows in ((sample.student_topk, student), (sample.teacher_topk, teacher)):
        np.testing.assert_array_equal(topk.ids, np.argsort(-rows, axis=1, kind="stable")[:, :k])


def test_a_rollout(args, tokenizer):
    both, source = clients(), PromptDataSource(args, tokenizer)
    groups = generate_rollout(args, 5, source, both)
    assert [[s.index for s in g] for g in groups] == [[0, 1], [2, 3], [4, 5]]
    for sample in flat(groups):
        check(sample)
        assert sample.status is Sample.Status.TRUNCATED and sample.response_length == 8 and sample.rollout_id == 5
        assert sample.rollout_log_probs.dtype == sample.teacher_log_probs.dtype == np.float32
    assert {"sample", "score", "score_all"} <= set(both.take_seconds())
    again = generate_rollout(args, 5, PromptDataSource(args, tokenizer), clients())
    assert [s.tokens for s in flat(again)] == [s.tokens for s in flat(groups)]  # seeds hang on the sample, not on time
    assert len({tuple(s.response_ids) for s in flat(groups)}) == 6


def test_samples_are_measured_while_others_are_still_scored(args, tokenizer, monkeypatch):
    """The last request of the teacher is answered only when the first samples have their metrics."""
    monkeypatch.setattr(measuring, "_TOKENS", 16)  # two responses
    both, source, seen = clients(), PromptDataSource(args, tokenizer), []
    teacher, put = both.teachers["default"], measuring.measure_samples

    def measured(options, samples):
        put(options, samples)
        seen.append([s.index for s in samples])

    async def last_waits(ids, length, *rest, _score=teacher.score, **kw):
        if len(teacher.calls) == 5:
            async with asyncio.timeout(30):
                while sum(map(len, seen)) < 4:
                    await asyncio.sleep(0.001)
        return await _score(ids, length, *rest, **kw)

    monkeypatch.setattr(measuring, "measure_samples", measured)
    teacher.score = last_waits
    samples = flat(generate_rollout(args, 0, source, both))
    assert sorted(i for part in seen for i in part) == [0, 1, 2, 3, 4, 5]
    for s in samples:
        assert s.token_metrics["Cmass"].shape == (8,) and s.token_metrics["student_topk_mass"].min() > 0


def test_a_malformed_sample_ends_the_rollout(args, tokenizer, monkeypatch):
    def refuse(options, samples):
        raise DataError("sample 0 (index 0): broken")

    monkeypatch.setattr(measuring, "measure_samples", refuse)
    source = PromptDataSource(args, tokenizer)
    with pytest.raises(DataError, match="broken"):
        generate_rollout(args, 0, source, clients())


def test_seeds():
    assert sampling_seed(1, 5, False) == sampling_seed(1, 5, False)
    assert len({sampling_seed(s, i, e) for s in (1, 2) for i in range(50) for e in (False, True)}) == 200
    assert 0 <= sampling_seed(3, 10**9, True) < 2**31


def test_a_finished_sample_is_scored_while_the_others_are_still_generated(args, tokenizer):
    """Event by event: a response is only given once every one before it has been asked for at the teacher, and the last request of
    the teacher is only answered then. Were scoring put off, this would time out."""
    both, events = clients(), []
    student, teacher = both.student, both.teachers["default"]
    original = student.generate

    async def one_after_another(ids, params, *rest, **kw):
        turn = len(student.calls)
        reply = await original(ids, params, *rest, **kw)
        async with asyncio.timeout(30):
            while events.count("asked") < turn:
                await asyncio.sleep(0.001)
        events.append("generated")
        return reply

    async def scored(*rest, _score=teacher.score, **kw):
        events.append("asked")
        while events.count("generated") < 6:
            await asyncio.sleep(0.001)
        return await _score(*rest, **kw)

    student.generate, teacher.score = one_after_another, scored
    generate_rollout(args, 0, PromptDataSource(args, tokenizer), both)
    assert events == ["generated", "asked"] * 6


def test_the_teacher_is_asked_before_the_text_of_a_response_is_made(args, tokenizer, monkeypatch):
    both, events = clients(), []
    both.teachers["default"].hook = lambda kind, n: events.append("asked")
    decode = type(tokenizer).decode
    monkeypatch.setattr(type(tokenizer), "decode", lambda self, *a, **kw: events.append("text") or decode(self, *a, **kw))
    args.rollout_batch_size = args.n_samples_per_prompt = 1
    (sample,) = flat(generate_rollout(args, 0, PromptDataSource(args, tokenizer), both))
    assert events == ["asked", "text"] and sample.response == decode(tokenizer, sample.response_ids, skip_special_tokens=True)


def test_scoring_can_wait_for_the_end_of_generation(args, tokenizer):
    args.score_after_generation, args.n_samples_per_prompt = True, 1
    both, order = clients(), []
    both.student.hook = lambda kind, n: order.append("g")
    both.teachers["default"].hook = lambda kind, n: order.append("s")
    samples = flat(generate_rollout(args, 0, PromptDataSource(args, tokenizer), both))
    assert order == ["g"] * 3 + ["s"] * 3 and all(s.teacher_topk is not None for s in samples)


def test_evaluation_asks_no_teacher_and_no_top_k(args, tokenizer):
    both = clients()
    source = PromptDataSource(args, tokenizer, evaluation=True)
    result = evaluate(args, 3, both, source)
    assert both.teachers["default"].calls == []
    assert all(seen["top_k"] == 0 and not seen["log_probs"] for _, seen in both.student.calls)
    assert all(seen["params"]["temperature"] == 0.0 for _, seen in both.student.calls)
    assert result["num_prompts"] == len(result["per_prompt"]) == 10 and result["truncated"] == 1.0 and result["response_length"] == 8
    assert result["accuracy"] == 0.0 and result["per_prompt"][0]["label"] == "1"


def test_evaluation_counts_right_answers(args, tokenizer):
    args.n_samples_per_eval_prompt, args.rm_type = 2, "tests.rollout.test_rollout:first_sample_of_even_prompts"
    result = evaluate(args, 0, clients(), PromptDataSource(args, tokenizer, evaluation=True))
    assert result["accuracy"] == 0.25 and result["accuracy_any"] == 0.5
    _seen.clear()


_seen: dict = {}


def first_sample_of_even_prompts(response, label, metadata):
    _seen[label] = _seen.get(label, 0) + 1
    return float(metadata["prompt_row"] % 2 == 0 and _seen[label] == 1)


def test_several_teachers(args, tokenizer):
    import json
    from pathlib import Path

    args.teachers = {"a": [], "b": []}
    Path(args.prompt_data).write_text("".join(json.dumps({"prompt": f"Q{i}", "label": "", "teacher": "ab"[i % 2]}) + "\n" for i in range(3)))
    both = clients(teachers=("a", "b"))
    for sample in flat(generate_rollout(args, 0, PromptDataSource(args, tokenizer), both)):
        check(sample, teacher_seed=2 if sample.metadata["teacher"] == "a" else 3)
    assert len(both.teachers["b"].calls) == 2


def keep_even(args, samples):
    return samples[0].group_index % 2 == 0


class Verdict:
    keep = False


def keep_none(args, samples):
    return Verdict()


def test_dynamic_filter_and_over_sampling(args, tokenizer):
    args.dynamic_sampling_filter_path = "tests.rollout.test_rollout.keep_even"
    groups = generate_rollout(args, 0, PromptDataSource(args, tokenizer), clients())
    assert [g[0].group_index for g in groups] == [0, 2, 4]
    args.over_sampling_batch_size = 8
    source = PromptDataSource(args, tokenizer)
    groups = generate_rollout(args, 0, source, clients())
    assert len(groups) == 3 and all(g[0].group_index % 2 == 0 for g in groups)
    # what was sampled ahead is handed out next, not lost and not twice
    following = generate_rollout(args, 1, source, clients())
    indices = [s.index for s in flat(groups) + flat(following)]
    assert len(indices) == len(set(indices))
    args.dynamic_sampling_filter_path = "tests.rollout.test_rollout.keep_none"
    with pytest.raises(DataError, match="refused 151 groups"):
        generate_rollout(args, 0, PromptDataSource(args, tokenizer), clients())


@pytest.mark.parametrize("partial", [True, False])
def test_unfinished_responses_at_the_end_of_an_over_sampled_rollout(args, tokenizer, partial):
    args.partial_rollout, args.over_sampling_batch_size, args.rollout_batch_size, args.n_samples_per_prompt = partial, 6, 2, 1
    args.mask_offpolicy_in_partial_rollout = True
    both = clients()
    both.student.delay = 0.05  # times 1, 2 or 3 by the sample's seed: some are still running when two are done
    source = PromptDataSource(args, tokenizer)
    first = generate_rollout(args, 0, source, both)
    assert len(first) == 2 and both.student.aborting
    waiting = [s for g in source.buffer for s in g]
    assert len(waiting) == 4
    unfinished = [s for s in waiting if s.status in (Sample.Status.ABORTED, Sample.Status.PENDING)]
    assert unfinished
    if not partial:
        assert all(s.response_length == 0 and s.student_topk is None for s in unfinished)
    stale = {s.index: s.response_length for s in unfinished}
    sampled = {s.index: s.response_length for s in waiting}
    both.student.aborting, args.over_sampling_batch_size, args.rollout_batch_size = False, None, 4
    both.student.version = "2"
    second = flat(generate_rollout(args, 1, source, both))
    assert sorted(s.index for s in second) == sorted(s.index for s in waiting)
    for sample in second:
        check(sample)
        assert sample.response_length == 8 and len(sample.student_topk) == 8
        old = stale.get(sample.index, 0)
        if old:
            assert sample.metadata["stale_tokens"] == old and sample.loss_mask == [0] * old + [1] * (8 - old)
        before = sampled[sample.index]
        assert sample.weight_versions == ([["1", before]] if before else []) + ([["2", 8 - before]] if before < 8 else [])
    if partial:
        assert any(stale.values())


def test_what_is_given_back_keeps_no_metrics(args, tokenizer):
    """They were put on it while the rollout ended: checkpoints held them, and a later rollout, perhaps of other flags, took them."""
    args.partial_rollout, args.over_sampling_batch_size, args.rollout_batch_size = True, 8, 1
    both, source = clients(), PromptDataSource(args, tokenizer)
    both.student.delay = 0.05
    generate_rollout(args, 0, source, both)
    scored = [s for g in source.buffer for s in g if s.teacher_log_probs is not None]
    assert scored and all(s.token_metrics is None for s in scored)


def test_an_engine_that_is_gone_does_not_spoil_a_rollout_that_is_complete(args, tokenizer):
    """The end of what was sampled ahead is asked of every engine; one that died in the meantime is the next call's to bring back."""
    args.partial_rollout, args.over_sampling_batch_size, args.rollout_batch_size, args.n_samples_per_prompt = True, 6, 2, 1
    both, source = clients(), PromptDataSource(args, tokenizer)
    both.student.delay, abort = 0.05, both.student.abort_all

    async def one_is_gone():
        await abort()
        raise ServiceError("student at http://gone/abort_request: connection refused")

    both.student.abort_all = one_is_gone
    assert [s.index for s in flat(generate_rollout(args, 0, source, both))] and len(source.buffer) == 4


def broken_filter(args, samples):
    raise ValueError("a bug of the user")


def test_a_filter_that_fails_loses_no_group(args, tokenizer):
    args.dynamic_sampling_filter_path = "tests.rollout.test_rollout.broken_filter"
    source = PromptDataSource(args, tokenizer)
    with pytest.raises(ValueError, match="a bug of the user"):
        generate_rollout(args, 0, source, clients())
    assert [g[0].group_index for g in source.buffer] == [0, 1, 2]


def test_an_abort_from_elsewhere_is_gone_on_with(args, tokenizer):
    both = clients(student_hook=lambda kind, n: "abort" if n in (1, 3) else None)
    for sample in flat(generate_rollout(args, 0, PromptDataSource(args, tokenizer), both)):
        assert sample.response_length == 8
        check(sample)


def test_an_engine_that_only_aborts_is_an_error(args, tokenizer, monkeypatch):
    async def empty(self, *a, **k):
        from slime.backends.sglang_utils.wire import GenerateReply
        from ta_opd.topk import TopK

        return GenerateReply([], np.empty(0, np.float32), TopK.empty(0, 6), "abort", "1", "", 0)

    monkeypatch.setattr(FakeModel, "generate", empty)
    monkeypatch.setattr("slime.rollout.sampling._EMPTY_ABORTS", 2)
    with pytest.raises(ServiceError, match="is it paused"):
        generate_rollout(args, 0, PromptDataSource(args, tokenizer), clients())


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_after_an_error_a_second_call_goes_on_and_nothing_is_lost_or_doubled(args, tokenizer, side):
    def fails_late(kind, n):
        if n >= 4:
            raise ServiceError("every replica is gone")

    source = PromptDataSource(args, tokenizer)
    with pytest.raises(ServiceError, match="every replica is gone"):
        generate_rollout(args, 0, source, clients(**{f"{side}_hook": fails_late}))
    assert len(source.buffer) == 3
    finished = sum(s.teacher_log_probs is not None for g in source.buffer for s in g)
    both = clients()
    groups = generate_rollout(args, 0, source, both)
    assert [s.index for s in flat(groups)] == list(range(6))
    for sample in flat(groups):
        check(sample)
    assert len(both.teachers["default"].calls) == 6 - finished
    assert [s.index for s in flat(source.get_samples(1))] == [6, 7]
    reference = generate_rollout(args, 0, PromptDataSource(args, tokenizer), clients())
    assert [s.tokens for s in flat(groups)] == [s.tokens for s in flat(reference)]


def test_groups_that_were_finished_before_the_error_are_kept(args, tokenizer):
    both, source = clients(), PromptDataSource(args, tokenizer)
    sample, doomed = both.student.generate, tokenizer("Q2+1?")["input_ids"]

    async def fails_for_the_last_group(ids, *rest, **kw):
        if list(ids) == doomed:
            await asyncio.sleep(0.3)
            raise ServiceError("gone")
        return await sample(ids, *rest, **kw)

    both.student.generate = fails_for_the_last_group
    with pytest.raises(ServiceError, match="gone"):
        generate_rollout(args, 0, source, both)
    assert [g[0].group_index for g in source.buffer] == [0, 1, 2]
    assert [s.teacher_log_probs is not None for g in source.buffer for s in g] == [True] * 4 + [False] * 2


def test_context_limits_the_response(args, tokenizer):
    args.rollout_max_context_len = 17
    args.rollout_max_response_len = 12
    for sample in flat(generate_rollout(args, 0, PromptDataSource(args, tokenizer), clients())):
        assert sample.response_length == 12 and len(sample.tokens) <= 17


async def own_generate(args, sample, sampling_params, evaluation=False, client=None):
    assert client is not None and evaluation is False and sampling_params["max_new_tokens"] == 8
    reply = await client.generate(sample.tokens, {**sampling_params, "max_new_tokens": 3, "sampling_seed": 1}, args.opd_topk_metrics_k)
    sglang_rollout.sample_response.__globals__["append_reply"](sample, reply, args.opd_topk_metrics_k)
    return sample


def test_custom_generate_function(args, tokenizer):
    args.custom_generate_function_path = "tests.rollout.test_rollout.own_generate"
    for sample in flat(generate_rollout(args, 0, PromptDataSource(args, tokenizer), clients())):
        assert sample.response_length == 3
        check(sample)


async def generate_nothing_now_and_then(args, sample, sampling_params, client=None):
    if sample.index % 3 == 1:
        sample.status = Sample.Status.COMPLETED  # a tool that failed before the first token, say
        return sample
    return await own_generate(args, sample, sampling_params, client=client)


def test_a_response_without_a_token_has_every_field_of_the_others(args, tokenizer):
    args.custom_generate_function_path = "tests.rollout.test_rollout.generate_nothing_now_and_then"
    args.opd_exact_cmass = True
    samples = flat(generate_rollout(args, 0, PromptDataSource(args, tokenizer), clients()))
    assert [s.response_length for s in samples] == [3, 0, 3, 3, 0, 3]
    data = collect(samples)
    assert {"rollout_log_probs", "teacher_log_probs", "student_topk_ids", "teacher_topk_ids", "teacher_at_student_ids"} <= set(data)
    assert data["student_topk_ids"][1].shape == data["teacher_at_student_ids"][1].shape == (0, 6)
    assert np.isfinite(rollout_metrics(samples, None)["rollout/reverse_kl_valid"])
