"""Scoring with a teacher server: what is asked, windows for exact compatibility, retries and errors."""

import asyncio
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from port_helpers import Server

from ta_opd.errors import ConfigError, DataError, ServiceError
from ta_opd.slime_patch.hooks import reward_func
from ta_opd.slime_patch.options import resolve
from ta_opd.slime_patch.teacher import exact_windows, limit_ids, merge_known, score_payload
from ta_opd.topk import PAD_ID, TopK

VOCABULARY, K = 50, 4


class TinyTeacher:
    """A /generate peer with a real next-token distribution per position: a fixed table of log-probs [position, vocabulary]."""

    def __init__(self, positions: int = 64, seed: int = 0):
        logits = np.random.default_rng(seed).normal(0, 2, (positions, VOCABULARY))
        self.logp = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))

    def __call__(self, payload: dict) -> dict:
        tokens, start = payload["input_ids"], payload["logprob_start_len"]
        scored = range(start + 1, len(tokens))
        meta_info = {
            "input_token_logprobs": [[None, tokens[start], None]] + [[self.logp[p, tokens[p]], tokens[p], None] for p in scored]
        }
        if count := payload.get("top_logprobs_num"):
            best = np.argsort(-self.logp, axis=1)[:, :count]
            meta_info["input_top_logprobs"] = [None] + [[[self.logp[p, t], int(t), None] for t in best[p]] for p in scored]
        if ids := payload.get("token_ids_logprob"):
            meta_info["input_token_ids_logprobs"] = [None] + [[[self.logp[p, t], t, None] for t in ids] for p in scored]
        return {"text": "", "meta_info": meta_info}


def sample_for(length: int = 30, prompt: int = 5, seed: int = 1, **more) -> SimpleNamespace:
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((length, VOCABULARY)), axis=1)[:, :K].astype(np.int32)
    ids[1:2, 2:] = PAD_ID
    student = TopK(ids, np.where(ids >= 0, -2.0, -np.inf).astype(np.float32))
    tokens = rng.integers(0, VOCABULARY, prompt + length).tolist()
    given = {"tokens": tokens, "response_length": length, "index": 0, "metadata": {}, "student_topk": student}
    return SimpleNamespace(**{**given, **more})


def score(sample, url, **more):
    given = {"rm_url": url, "opd_topk_metrics_k": K, "opd_exact_cmass": True, "request_retries": 2, "opd_profile": "released"}
    return asyncio.run(reward_func(SimpleNamespace(**{**given, **more}), sample))


def test_exact_compatibility_is_complete_on_windows_and_asks_for_little():
    teacher, sample = TinyTeacher(), sample_for()
    with Server(teacher) as server:
        assert score(sample, server.url) == 0.0
        first, *windows = server.requests
    truth = teacher.logp[np.arange(5, 35)[:, None], sample.student_topk.ids]
    real = sample.student_topk.ids >= 0
    np.testing.assert_allclose(sample.teacher_at_student_ids[real], truth[real], atol=1e-12)
    assert np.isnan(sample.teacher_at_student_ids[~real]).all()
    np.testing.assert_allclose(sample.teacher_log_probs, teacher.logp[np.arange(5, 35), sample.tokens[5:]], atol=1e-12)
    assert sample.teacher_topk.T == 30 and sample.teacher_topk.K == K
    assert first["logprob_start_len"] == 4 and first["top_logprobs_num"] == K and "token_ids_logprob" not in first
    assert first["sampling_params"]["max_new_tokens"] == 0
    assert 1 <= len(windows) <= 2  # windows of 16
    for payload in windows:
        assert payload["input_ids"] == sample.tokens[: len(payload["input_ids"])]
        assert len(payload["input_ids"]) - payload["logprob_start_len"] - 1 <= 16
        assert "top_logprobs_num" not in payload


@pytest.mark.parametrize("max_union", [4, 7, 20])
def test_a_small_union_limit_still_gives_every_value(max_union):
    teacher, sample = TinyTeacher(), sample_for()
    with Server(teacher) as server:
        score(sample, server.url, opd_exact_cmass_max_union=max_union)
        assert all(len(payload["token_ids_logprob"]) <= max_union for payload in server.requests[1:])
    real = sample.student_topk.ids >= 0
    assert not np.isnan(sample.teacher_at_student_ids[real]).any()


@pytest.mark.parametrize(("overflow", "known"), [("fallback", "fewer"), ("truncate", "more"), ("error", None)])
def test_overflow_of_a_single_position(overflow, known):
    teacher, sample = TinyTeacher(), sample_for()
    with Server(teacher) as server:
        if known is None:
            with pytest.raises(ConfigError, match="more than opd_exact_cmass_max_union 2"):
                score(sample, server.url, opd_exact_cmass_max_union=2, opd_exact_cmass_overflow=overflow)
            return
        score(sample, server.url, opd_exact_cmass_max_union=2, opd_exact_cmass_overflow=overflow)
    missing = int(np.isnan(merge_known(sample.student_topk.ids, sample.teacher_topk)[sample.student_topk.ids >= 0]).sum())
    left = int(np.isnan(sample.teacher_at_student_ids[sample.student_topk.ids >= 0]).sum())
    assert 0 < left < missing
    crowded = (np.isnan(merge_known(sample.student_topk.ids, sample.teacher_topk)) & (sample.student_topk.ids >= 0)).sum(
        axis=1
    ) > 2
    answered = ~np.isnan(sample.teacher_at_student_ids[crowded])
    if known == "fewer":
        assert not (answered & np.isnan(merge_known(sample.student_topk.ids, sample.teacher_topk)[crowded])).any()
    else:
        assert answered.any(axis=1).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40), st.integers(1, 5), st.integers(1, 30), st.integers(1, 12), st.integers(0, 10**6), st.floats(0, 1))
def test_windows_cover_exactly_the_missing_ids(length, k, window, max_ids, seed, share):
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((length, 20)), axis=1)[:, :k].astype(np.int32)
    ids[rng.random((length, k)) < 0.2] = PAD_ID
    known = rng.random((length, k)) < share
    covered = known | (ids == PAD_ID)
    end_of_last = 0
    for start, end, asked in exact_windows(ids, known, max_ids=max_ids, window=window):
        assert end_of_last <= start < end <= length and end - start <= window
        assert len(asked) <= max_ids or end - start == 1
        assert np.array_equal(asked, np.unique(asked)) and (asked >= 0).all()
        missing = ids[start:end][~(known[start:end] | (ids[start:end] == PAD_ID))]
        assert set(asked.tolist()) == set(missing.tolist())  # nothing that is known already
        covered[start:end] |= np.isin(ids[start:end], asked)
        end_of_last = end
    assert covered.all()


def test_windows_ask_for_fewer_numbers_than_one_union_over_the_response():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 30_000, (512, 16)).astype(np.int32)
    asked = sum((end - start) * len(union) for start, end, union in exact_windows(ids, max_ids=4096))
    assert asked < 0.05 * 512 * len(np.unique(ids))


def test_merge_known_takes_the_teachers_own_entries():
    student = np.array([[3, 7, -1], [1, 2, 5]], np.int32)
    teacher = TopK(np.array([[7, 9, -1], [5, 1, 8]], np.int32), np.array([[-0.5, -1.0, -np.inf], [-0.1, -2.0, -3.0]], np.float32))
    expected = np.array([[np.nan, -0.5, np.nan], [-2.0, np.nan, -0.1]], np.float32)
    np.testing.assert_array_equal(merge_known(student, teacher), expected)


def test_limit_ids():
    ids = np.arange(5)
    assert limit_ids(ids, 5, "error") is ids
    assert limit_ids(ids, 3, "fallback") is None
    assert limit_ids(ids, 3, "truncate").tolist() == [0, 1, 2]


def test_payload_scores_the_response_only_unless_positions_are_unknown():
    payload = score_payload([1, 2, 3, 4, 5], 2, 0)
    assert payload["logprob_start_len"] == 2 and "top_logprobs_num" not in payload
    assert score_payload([1, 2, 3], 2, 4, whole=True)["logprob_start_len"] == 0
    assert score_payload([1, 2], 2, 4)["logprob_start_len"] == 0


def test_a_busy_server_is_asked_again_and_a_refusal_is_not(monkeypatch):
    monkeypatch.setattr("ta_opd.slime_patch.teacher.asyncio.sleep", lambda seconds: original(0))
    teacher, answers = TinyTeacher(), [503, 429]
    with Server(lambda payload: answers.pop(0) if answers else teacher(payload)) as server:
        sample = sample_for()
        score(sample, server.url, opd_exact_cmass=False)
        assert len(server.requests) == 3 and len(sample.teacher_log_probs) == 30
    with Server(lambda payload: 400) as server:
        with pytest.raises(ServiceError, match="after 1 requests.*HTTP 400: not now"):
            score(sample_for(), server.url)
        assert len(server.requests) == 1
    with Server(lambda payload: 500) as server:
        with pytest.raises(ServiceError, match="after 3 requests.*HTTP 500"):
            score(sample_for(), server.url)
    with pytest.raises(ServiceError, match="Is the server up"):
        score(sample_for(), "http://127.0.0.1:9/generate")


original = asyncio.sleep


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ([1, 2], "sample 0: .*meta_info"),
        ({"meta_info": {}}, "sample 0: input_token_logprobs is missing"),
        ({"meta_info": {"input_token_logprobs": [[None, 1, None]] * 31, "input_top_logprobs": []}}, "sample 0: .*no log-prob at"),
        ({"meta_info": {"input_token_logprobs": [[-1.0, 1, None]] * 31}}, "sample 0: input_top_logprobs is missing"),
        ({"meta_info": {"input_token_logprobs": [[-1.0, 1, None]] * 9}}, "sample 0: .*at least 30 positions.*got 9"),
    ],
)
def test_wrong_answers_are_named(reply, message):
    with Server(lambda payload: reply) as server, pytest.raises(DataError, match=message):
        score(sample_for(), server.url)


def test_minus_infinity_in_a_reply_is_read():
    teacher = TinyTeacher()
    teacher.logp[10, 3] = -np.inf
    sample = sample_for()
    sample.student_topk.ids[5, 0] = 3
    with Server(teacher) as server:
        score(sample, server.url)
    assert np.isfinite(sample.teacher_topk.logprobs).all()


def test_replicas_share_the_samples_and_groups_are_scored_together():
    with Server(TinyTeacher()) as one, Server(TinyTeacher()) as two:
        group = [sample_for(index=i, seed=i) for i in range(4)]
        args = SimpleNamespace(rm_url=[one.url, two.url], opd_topk_metrics_k=K)
        assert asyncio.run(reward_func(args, group)) == [0.0] * 4
        assert len(one.requests) == len(two.requests) == 2
    empty = sample_for(length=0)
    assert score(empty, "http://127.0.0.1:9/generate") == 0.0 and len(empty.teacher_log_probs) == 0


def test_missing_url_and_missing_student_topk_say_what_to_pass():
    with pytest.raises(ConfigError, match="--rm-url"):
        score(sample_for(), None)
    with pytest.raises(DataError, match="--custom-generate-function-path"):
        score(sample_for(student_topk=None), "http://127.0.0.1:9/generate")


def test_requests_in_flight_are_bounded():
    options = resolve(SimpleNamespace(teacher_concurrency=3))
    from ta_opd.slime_patch import teacher

    async def peak() -> int:
        running = highest = 0

        async def one() -> None:
            nonlocal running, highest
            async with teacher._gate(options):
                running += 1
                highest = max(highest, running)
                await asyncio.sleep(0.01)
                running -= 1

        await asyncio.gather(*(one() for _ in range(10)))
        return highest

    assert asyncio.run(peak()) == 3
