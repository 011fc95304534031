"""A real sglang-router in front of fake engines: who gets what, and what happens without it."""

import asyncio
import os
import signal
import time

import psutil
import pytest

from slime.backends.sglang_utils import loop
from slime.backends.sglang_utils.client import SGLangClient
from slime.backends.sglang_utils.router import Router
from ta_opd.errors import ServiceError
from tests.sglang_utils.fake_server import VOCAB
from tests.sglang_utils.test_client import PARAMS

pytest.importorskip("sglang_router")


@pytest.fixture
def routed(fake, tmp_path):
    """routed(number of engines) -> (router that has them, engines, client); all ended after the test."""
    made = []

    def make(count=2, **kwargs):
        engines = [fake(**kwargs) for _ in range(count)]
        router = Router((None, None), tmp_path / "router.log", policy="round_robin", api_key=kwargs.get("api_key"))
        made.append(router)
        router.start().serve([e.url for e in engines])
        client = SGLangClient([e.url for e in engines], router=router.url, vocab_size=VOCAB, timeout=5, retries=3, wait_timeout=3,
                              api_key=kwargs.get("api_key"))  # fmt: skip
        made.append(client)
        return router, engines, client

    yield make
    for thing in reversed(made):
        (thing.stop if isinstance(thing, Router) else thing.close)()


def sample(client, count, **params):
    async def all_of_them():
        return await asyncio.gather(*(client.generate([3, 7, 11 + i], {**PARAMS, **params}, 4) for i in range(count)))

    return loop.run(all_of_them())


def test_requests_go_through_the_router_and_controls_to_every_engine(routed):
    router, engines, client = routed(api_key="secret")
    replies = sample(client, 8)
    assert {r.url for r in replies} == {router.url} and [len(e.requests) for e in engines] == [4, 4]
    assert [r.output_ids for r in replies] == [engines[0].responses_of([3, 7, 11 + i], 5) for i in range(8)]
    engines[1].version = "7"
    assert loop.run(client.weight_versions()) == {engines[0].url: "1", engines[1].url: "7"}
    words = " ".join(word for pid in router.process.pids() for word in psutil.Process(pid).cmdline())
    assert "secret" not in words and "secret" not in router.process.log_file.read_text()
    pids = router.process.pids()
    assert {c.laddr.ip for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.pid in pids} == {"127.0.0.1"}


def test_an_engine_asked_for_by_name_is_asked_itself(routed):
    _, engines, client = routed()
    reply = loop.run(client.score([3, 7, 11], 2, prefer=engines[1].url))
    assert reply.url == engines[1].url and len(engines[1].requests) == 1


def test_without_the_router_the_engines_are_asked_and_a_new_one_takes_over(routed):
    router, engines, client = routed()
    for pid in router.process.pids():
        os.kill(pid, signal.SIGKILL)
    assert {r.url for r in sample(client, 4)} <= {e.url for e in engines}
    psutil.wait_procs([psutil.Process(p) for p in router.process.pids()], timeout=10)
    old = router.url
    router.start().serve([e.url for e in engines])
    assert router.alive() and router.url == old and len(router._workers()) == 2
    time.sleep(1.1)  # the client's pause after the failures
    assert {r.url for r in sample(client, 4)} == {old}


def test_a_bad_answer_through_the_router_is_asked_again_of_an_engine(routed):
    router, engines, client = routed()
    engines[0].faults += ["500", "cut"]
    assert len(sample(client, 6)) == 6
    client.weight_version = "1"
    engines[0].version = "0"  # serves former weights: left out, whoever asks it
    assert {r.weight_version for r in sample(client, 6)} == {"1"}


def test_engines_that_were_replaced_leave_the_router(routed, fake):
    router, engines, _ = routed()
    third = fake()
    router.serve([engines[0].url, third.url])
    for _ in range(50):
        if set(router._workers()) == {engines[0].url, third.url}:
            break
        loop.run(asyncio.sleep(0.1))
    assert set(router._workers()) == {engines[0].url, third.url}


def test_a_router_of_somebody_else_keeps_its_own_engines(routed, fake, tmp_path):
    theirs, _, _ = routed(1)
    mine = fake()
    router = Router(("127.0.0.1", theirs.process.port), tmp_path / "unused.log")
    router.start().serve([mine.url])
    assert len(theirs._workers()) == 2 and router.process is None
    router.stop()
    for _ in range(50):
        if len(theirs._workers()) == 1:
            break
        loop.run(asyncio.sleep(0.1))
    assert mine.url not in theirs._workers() and len(theirs._workers()) == 1 and theirs.alive()


def test_no_router_where_one_was_promised(tmp_path):
    from slime.utils.misc import free_port

    with pytest.raises(ServiceError, match="router at http://127.0.0.1"):
        Router(("127.0.0.1", free_port("127.0.0.1")), tmp_path / "unused.log").start()


def test_nothing_is_left_of_it(routed):
    router, _, _ = routed(1)
    processes = [psutil.Process(pid) for pid in router.process.pids()]
    assert len(processes) >= 2
    router.stop()
    assert not [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
