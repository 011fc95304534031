"""The client against servers that fail in every way that the network and SGLang know."""

import asyncio
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from slime.backends.sglang_utils import loop, replicas, wire
from slime.backends.sglang_utils.client import SGLangClient, StaleWeights, base_url
from slime.backends.sglang_utils.clients import Clients
from ta_opd.errors import ConfigError, DataError, ServiceError
from tests.sglang_utils.fake_server import VOCAB, logprob, row

IDS = [3, 7, 11, 2, 9, 4]
PARAMS = {"temperature": 1.0, "max_new_tokens": 5}


def connect(*servers, **kwargs):
    defaults = {"vocab_size": VOCAB, "timeout": 5, "retries": 3, "wait_timeout": 3}
    return SGLangClient([s if isinstance(s, str) else s.url for s in servers], **{**defaults, **kwargs})


def test_base_url():
    assert base_url("http://h:1/generate") == base_url("h:1/") == "http://h:1"


def test_generate_gives_arrays(fake):
    client = connect(fake())
    reply = loop.run(client.generate(IDS, PARAMS, 4))
    assert len(reply.output_ids) == 5 and reply.finish_reason == "length" and reply.weight_version == "1"
    expected = [logprob(len(IDS) + i, t) for i, t in enumerate(reply.output_ids)]
    np.testing.assert_allclose(reply.log_probs, expected, rtol=1e-6)
    assert reply.log_probs.dtype == np.float32
    np.testing.assert_array_equal(reply.topk.ids, [[t for _, t in row(len(IDS) + i, 4)] for i in range(5)])
    client.close()


@pytest.mark.parametrize("flat", [True, False])
def test_score_is_the_response_span_only(fake, flat):
    server = fake(flat=flat)
    client = connect(server)
    reply = loop.run(client.score(IDS, 4, 3, token_ids=[1, 5]))
    np.testing.assert_allclose(reply.log_probs, [logprob(p, IDS[p]) for p in range(2, 6)], rtol=1e-6)
    np.testing.assert_array_equal(reply.topk.ids, [[t for _, t in row(p, 3)] for p in range(2, 6)])
    np.testing.assert_allclose(reply.topk.logprobs, [[v for v, _ in row(p, 3)] for p in range(2, 6)], rtol=1e-6)
    np.testing.assert_allclose(reply.gathered, [[logprob(p, 1), logprob(p, 5)] for p in range(2, 6)], rtol=1e-6)
    assert server.requests[0]["logprob_start_len"] == 1  # the last prompt token
    client.close()


def test_windows_are_one_request(fake):
    server = fake()
    client = connect(server)
    answers = loop.run(client.score_windows(IDS, [(1, 3, [4, 8]), (5, 6, [2])]))
    np.testing.assert_allclose(answers[0], [[logprob(p, 4), logprob(p, 8)] for p in (1, 2)], rtol=1e-6)
    np.testing.assert_allclose(answers[1], [[logprob(5, 2)]], rtol=1e-6)
    assert len(server.requests) == 1
    client.close()


@pytest.mark.parametrize("fault", ["500", "429", "503", "cut", "html", "missing", "null", "drop"])
@pytest.mark.parametrize("call", ["generate", "score"])
def test_a_bad_answer_goes_to_the_other_replica(fake, fault, call):
    bad, good = fake(), fake()
    bad.faults = [fault] * 20
    client = connect(bad, good)

    async def ask():
        for _ in range(4):  # whichever is asked first
            reply = await (client.generate(IDS, PARAMS, 2) if call == "generate" else client.score(IDS, 3, 2))
            assert len(reply.log_probs) == (5 if call == "generate" else 3)

    loop.run(ask())
    assert bad.requests and len(good.requests) == 4
    client.close()


def test_the_same_replica_is_asked_again_when_it_is_the_only_one(fake):
    server = fake()
    server.faults = ["500", "cut"]
    client = connect(server)
    assert len(loop.run(client.score(IDS, 3)).log_probs) == 3
    assert len(server.requests) == 3
    client.close()


def test_retries_end(fake):
    server = fake()
    server.faults = ["cut"] * 50
    client = connect(server, retries=2)
    with pytest.raises(DataError, match="no proper answer in 3 tries.*cut off|JSON"):
        loop.run(client.score(IDS, 3))
    assert len(server.requests) == 3
    client.close()


def test_a_refused_request_is_not_repeated(fake):
    server = fake()
    server.faults = ["400"]
    client = connect(server)
    with pytest.raises(DataError, match="told to fail with 400"):
        loop.run(client.generate(IDS, PARAMS))
    assert len(server.requests) == 1
    client.close()


def test_wrong_api_key(fake):
    client = connect(fake(api_key="right"), api_key="wrong")
    with pytest.raises(ConfigError, match="API key") as caught:
        loop.run(client.generate(IDS, PARAMS))
    assert "wrong" not in str(caught.value) and "wrong" not in repr(client.api_key)
    good = connect(fake(api_key="right"), api_key="right")
    loop.run(good.generate(IDS, PARAMS))
    client.close(), good.close()


@pytest.mark.parametrize("ids", [[3, VOCAB], [3, -1], []])
def test_an_id_outside_the_vocabulary_is_never_sent(fake, ids):
    server = fake()
    client = connect(server)
    with pytest.raises(DataError, match="vocabulary|at least one"):
        loop.run(client.generate(ids, PARAMS))
    assert server.requests == []
    client.close()


def test_score_needs_a_prompt_token(fake):
    client = connect(fake())
    with pytest.raises(DataError, match="at least one token before"):
        loop.run(client.score(IDS, len(IDS)))
    client.close()


def test_a_slow_replica_times_out_is_told_and_passed_over(fake):
    slow, good = fake(), fake()
    slow.faults = ["slow"]
    client = connect(slow, good, timeout=0.5)
    begin = time.monotonic()
    loop.run(client.generate(IDS, PARAMS, prefer=slow.url))
    assert time.monotonic() - begin < 5 and len(good.requests) == 1
    deadline = time.monotonic() + 3
    while not slow.aborted and time.monotonic() < deadline:
        time.sleep(0.05)
    assert slow.aborted == [slow.requests[0]["rid"]]
    client.close()


def test_all_replicas_away_is_an_error_after_the_wait(fake):
    server = fake()
    server.stop()
    client = connect(server, wait_timeout=1.0)
    begin = time.monotonic()
    with pytest.raises(ServiceError, match="no proper answer for"):
        loop.run(client.score(IDS, 2))
    assert 0.9 < time.monotonic() - begin < 6
    client.close()


def test_waits_for_a_teacher_that_comes_back(fake):
    server = fake()
    server.faults = ["drop"] * 3
    client = connect(server, wait_timeout=20)
    assert len(loop.run(client.score(IDS, 2)).log_probs) == 2
    client.close()


def test_concurrency_is_bounded(fake):
    server = fake()
    server.delay = 0.02
    client = connect(server, max_concurrency=3)

    async def many():
        await asyncio.gather(*(client.score(IDS, 2) for _ in range(20)))

    loop.run(many())
    assert server.most_in_flight == 3
    client.close()


def test_an_answer_however_bad_ends_the_wait_for_a_replica(fake, monkeypatch):
    """The limit is for the time in which nobody answers; before, it ran on from the first failure through slow bad answers."""
    monkeypatch.setattr(replicas, "_FIRST_PAUSE", 0.01)
    server = fake()
    server.faults, server.delay = ["503"] * 3, 0.35
    client = connect(server, wait_timeout=0.6)
    assert len(loop.run(client.score(IDS, 2)).log_probs) == 2
    assert len(server.requests) == 4
    client.close()


@pytest.mark.parametrize("ids", [[3, VOCAB], [10**12, 3], [3, -1]])
def test_sampled_ids_outside_the_vocabulary_are_a_bad_answer(fake, ids):
    bad, good = fake(), fake()
    bad.responses_of = lambda _, n: ids
    client = connect(bad, good)
    reply = loop.run(client.generate(IDS, PARAMS, prefer=bad.url))
    assert len(reply.output_ids) == 5 and len(bad.requests) == len(good.requests) == 1
    client.close()


@pytest.mark.parametrize("fault", [None, "503"])
def test_an_abort_also_ends_requests_that_wait_here(fake, fault):
    """For their turn, or to be sent again: they would be sampled to the end after it."""
    server = fake()
    server.faults, server.delay = [fault] if fault else [], 0.6
    client = connect(server, max_concurrency=1)

    async def ask():
        asked = [asyncio.create_task(client.generate(IDS, PARAMS, 2)) for _ in range(6)]
        score = asyncio.create_task(client.score(IDS, 2))
        while not server.requests:
            await asyncio.sleep(0.01)
        await client.abort_all()
        return await asyncio.gather(*asked), await score

    replies, score = loop.run(ask())
    ended = replies if fault else replies[1:]
    assert all(r.finish_reason == "abort" and r.output_ids == [] and len(r.log_probs) == len(r.topk) == 0 for r in ended)
    assert len(server.requests) == 2 and len(score.log_probs) == 2 and server.aborted == [None]
    assert len(loop.run(client.generate(IDS, PARAMS)).output_ids) == 5
    client.close()


def test_connections_are_kept_and_used_again(fake):
    server = fake()
    client = connect(server, max_concurrency=4)

    async def many():
        for _ in range(5):
            await asyncio.gather(*(client.score(IDS, 2) for _ in range(8)))

    loop.run(many())
    assert len(server.requests) == 40 and len(server.connections) <= 4
    client.close()


def test_large_replies_are_parsed_off_the_event_loop(fake, monkeypatch):
    where = []
    parse = wire.parse_generate

    def noting(raw, *rest):
        where.append((len(raw), threading.current_thread().name))
        return parse(raw, *rest)

    monkeypatch.setattr(wire, "parse_generate", noting)
    client = connect(fake())
    for tokens in (2, 300):
        loop.run(client.generate(IDS, {**PARAMS, "max_new_tokens": tokens}, 16))
    (small, here), (large, elsewhere) = where
    assert small < 64 * 1024 < large and here == "services" and elsewhere != "services"
    client.close()


def test_load_is_spread(fake):
    servers = [fake(), fake()]
    for server in servers:
        server.delay = 0.01
    client = connect(*servers)

    async def many():
        await asyncio.gather(*(client.score(IDS, 2) for _ in range(20)))

    loop.run(many())
    assert sorted(len(s.requests) for s in servers) == [10, 10]
    client.close()


def test_former_weights_are_refused(fake):
    old, new = fake(version="4"), fake(version="5")
    client = connect(old, new)
    client.weight_version = "5"
    for _ in range(4):
        assert loop.run(client.generate(IDS, PARAMS)).weight_version == "5"
    assert len(old.requests) <= 1
    client.weight_version = "6"
    with pytest.raises(StaleWeights, match="sync"):
        loop.run(client.generate(IDS, PARAMS))
    old.version = new.version = "6"
    client.weight_version = "6"  # set anew after a sync: both are asked again
    assert loop.run(client.generate(IDS, PARAMS)).weight_version == "6"
    client.close()


def test_weight_version_of_every_engine_is_checked(fake):
    client = connect(fake(version="5"), fake(version="4"))
    with pytest.raises(ServiceError, match="expected weight version '5'.*'4'"):
        loop.run(client.check_weight_version("5"))
    client.close()


def test_unknown_teacher_is_refused():
    clients = Clients(connect("h:1"), {"math": connect("h:2"), "code": connect("h:3")})
    assert clients.teacher_of({"teacher": "code"}).urls == ["http://h:3"]
    with pytest.raises(DataError, match="unknown teacher 'law'.*math, code"):
        clients.teacher_of({"teacher": "law"})
    clients.seconds = {"score": 1.0}
    assert clients.take_seconds() == {"score": 1.0} and clients.take_seconds() == {}


def test_no_url():
    with pytest.raises(ConfigError, match="at least one"):
        SGLangClient([])


def test_requests_follow_a_replica_that_was_started_again_elsewhere(fake):
    old, new = fake(), fake()
    old.stop()
    client = connect(old, wait_timeout=30)

    async def ask():
        waiting = asyncio.ensure_future(client.score(IDS, 3))
        await asyncio.sleep(0.5)
        assert not waiting.done()
        client.move(old.url, new.url)
        client.back(new.url)
        return await asyncio.wait_for(waiting, 10)

    assert len(loop.run(ask()).log_probs) == 3
    assert client.urls == [new.url] and len(new.requests) == 1
    client.close()


def test_nobody_waits_for_servers_that_are_gone_for_good(fake):
    server = fake()
    server.stop()
    client = connect(server, wait_timeout=600)

    async def ask():
        waiting = asyncio.ensure_future(client.score(IDS, 3))
        await asyncio.sleep(0.3)
        client.gone = "every engine of this run died"
        await asyncio.wait_for(waiting, 10)

    with pytest.raises(ServiceError, match="every engine of this run died"):
        loop.run(ask())
    client.close()


def test_the_teacher_is_asked_nothing_beyond_its_own_vocabulary(fake, tmp_path):
    """Without the probe, too: an index past the last row of its embedding ends a server on a GPU."""
    (tmp_path / "config.json").write_text('{"vocab_size": 40}')
    server = fake()
    args = SimpleNamespace(
        sglang_server_concurrency=4, teacher_concurrency=4, request_timeout=5, request_retries=1, sglang_api_key=None, teacher_timeout=5,
        student_config={"vocab_size": VOCAB}, teachers={"small": str(tmp_path), "by_url": [server.url]},
    )  # fmt: skip
    clients = Clients.connect(args, [server.url], {"small": [server.url], "by_url": [server.url]})
    assert (clients.student.vocab_size, clients.teachers["small"].vocab_size, clients.teachers["by_url"].vocab_size) == (VOCAB, 40, VOCAB)
    with pytest.raises(DataError, match=r"outside the vocabulary \[0, 40\)"):
        loop.run(clients.teachers["small"].score([1, 45, 2], 2))
    assert server.requests == []
    clients.close()
