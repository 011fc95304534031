"""Responses that wait for one another before a teacher on the student's device scores them."""

import asyncio

from slime.rollout.gathering import Gathering


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 20))


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


async def arrive(gathering, sizes):
    """Tasks of responses that arrive one after another."""
    tasks = []
    for size in sizes:
        tasks.append(asyncio.create_task(gathering.enter(size)))
        await settle()
    return tasks


def test_a_batch_goes_when_it_is_full_and_the_next_one_begins():
    async def go():
        gathering = Gathering(100, wait=1000)
        with gathering.sampling():
            tasks = await arrive(gathering, [40, 50])
            assert not any(t.done() for t in tasks)
            tasks += await arrive(gathering, [10, 99])
            assert [t.done() for t in tasks] == [True, True, True, False]
            tasks += await arrive(gathering, [1, 100])
        await asyncio.gather(*tasks)

    run(go())


def test_nobody_waits_when_nothing_is_sampled_any_more():
    async def go():
        gathering = Gathering(100, wait=1000)
        with gathering.sampling():
            with gathering.sampling():
                tasks = await arrive(gathering, [10, 20])
            await settle()
            assert not any(t.done() for t in tasks)
        await settle()
        assert all(t.done() for t in tasks)
        (last,) = await arrive(gathering, [5])
        assert last.done()

    run(go())


def test_a_response_that_failed_lets_the_others_through():
    async def go():
        gathering = Gathering(100, wait=1000)
        try:
            with gathering.sampling():
                tasks = await arrive(gathering, [10])
                raise RuntimeError("no response")
        except RuntimeError:
            await settle()
            assert tasks[0].done()

    run(go())


def test_the_wait_ends_with_its_time_and_a_cancelled_one_hinders_nobody():
    async def go():
        gathering = Gathering(100, wait=0.05)
        with gathering.sampling():
            tasks = await arrive(gathering, [10, 10])
            tasks[0].cancel()
            await tasks[1]  # by its time
            later = await arrive(gathering, [99])
            await settle()
            assert not later[0].done()
            await later[0]

    run(go())


def test_without_a_size_nobody_waits():
    async def go():
        gathering = Gathering(0)
        with gathering.sampling():
            tasks = await arrive(gathering, [1, 1])
            assert all(t.done() for t in tasks)

    run(go())
