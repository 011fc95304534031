"""Which replica is asked: the least busy one, and for samples of one prompt the one that has it, as long as others are not left idle."""

import asyncio

from slime.backends.sglang_utils import loop
from slime.backends.sglang_utils.replicas import Replicas
from tests.sglang_utils.test_client import PARAMS, connect


def test_the_samples_of_a_prompt_go_to_one_engine_and_the_prompts_to_both(fake):
    servers = [fake(), fake()]
    for server in servers:
        server.delay = 0.05
    client = connect(*servers)

    async def rollout():
        await asyncio.gather(*(client.generate([5, 6, prompt], PARAMS, key=prompt) for prompt in range(6) for _ in range(4)))

    loop.run(rollout())
    asked = [[r["input_ids"][2] for r in s.requests] for s in servers]
    assert sorted(map(len, asked)) == [12, 12] and not set(asked[0]) & set(asked[1])
    client.close()


def test_one_prompt_of_many_samples_is_spread():
    replicas = Replicas(["a", "b"])
    for _ in range(100):
        replicas.pick(key=1).in_flight += 1
    counts = sorted(r.in_flight for r in replicas.all)
    assert sum(counts) == 100 and counts[0] >= 30


def test_a_prompt_whose_engine_is_away_finds_another_home_and_stays_there():
    replicas = Replicas(["a", "b", "c"])
    first = replicas.pick(key=1)
    assert replicas.pick(key=1) is first
    first.failed()
    second = replicas.pick(key=1)
    assert second is not first
    first.answered()
    first.in_flight = second.in_flight = 0
    assert replicas.pick(key=1) is second
    assert replicas.pick(avoid=second, key=1) is not second


def test_empty_caches_are_forgotten():
    replicas = Replicas(["a", "b"])
    home = replicas.pick(key=1)
    home.in_flight = 3
    assert replicas.pick(key=1) is home
    replicas.forget_prompts()
    assert replicas.pick(key=1) is not home
