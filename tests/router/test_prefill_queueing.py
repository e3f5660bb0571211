"""Requests in the prefill queue: scripted workers that are busy, and a real caller for the one that gets room."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest
from prefill_scripts import PARAMS, TEXT, hands_over
from scripted_worker import BLOCK_SIZE, MODEL, TOKENIZER, ScriptedWorker, says

from kvstore import wire
from kvstore.connect import connect
from kvstore.prefill_caller import PrefillCaller
from kvstore.registry import Registry
from kvstore.wire import SamplingParams
from router import errors
from router.config import DisaggSettings
from router.types import GenerationRequest

ALWAYS = DisaggSettings(remote_prefill="always", max_local_prefill_tokens=0, busy_prefill_tokens=1000)
BUSY = wire.Load(waiting_prefill_tokens=1000, prefill_tokens_per_s=1000.0)

Calls = Callable[[ScriptedWorker], Awaitable[None]]


def request() -> GenerationRequest:
    return GenerationRequest(
        model=MODEL,
        token_ids=TOKENIZER.encode("hello there, " * 10),
        sampling=SamplingParams(max_tokens=100),
        request_id="r1",
    )


async def busy_workers(cluster: Any, count: int, load: wire.Load = BUSY) -> list[ScriptedWorker]:
    """Prefill workers that have too much to do, as their first frame says."""
    made = [await cluster.worker(hands_over(), role="prefill", prefill_queue=True) for _ in range(count)]
    for worker in made:
        worker.load = load
    return made


@pytest.fixture
async def calls(cluster: Any) -> AsyncIterator[Calls]:
    """Gives a worker room: it calls for requests from then on."""
    async with AsyncExitStack() as stack:

        async def start(worker: ScriptedWorker) -> None:
            caller = PrefillCaller(
                cluster.registry.redis,
                cluster.keys,
                model=MODEL,
                block_size=BLOCK_SIZE,
                instance=worker.instance,
                room_tokens=lambda: 1 << 20,
                settle_s=0.005,
                reclaim_s=0.1,
            )
            await stack.enter_async_context(caller)

        yield start


def sees(router: Any, waiting: int) -> Callable[[], bool]:
    """The router has taken note of so many; Redis has them a little earlier."""
    figure = f'prefill_queue_depth{{model="{MODEL}"}} {waiting}.0'.encode()
    return lambda: figure in router.metrics.render()


async def depth_of(cluster: Any) -> int:
    return int(await cluster.registry.redis.xlen(cluster.keys.prefill_queue(MODEL, BLOCK_SIZE)))


async def test_the_first_with_room_gets_the_request(cluster, eventually, calls: Calls) -> None:
    """While all are busy a request waits at none of them, and counts on its decode worker."""
    prefills = await busy_workers(cluster, 3)
    decode = await cluster.worker(says(TEXT), role="decode")
    router = await cluster.router(disagg=ALWAYS)
    task = asyncio.create_task(router.generation.generate(request()))
    await eventually(sees(router, 1))
    assert [worker.submits for worker in (*prefills, decode)] == [[], [], [], []]
    assert [c.load.requests for c in router.pool.workers(MODEL)] == [1]
    await calls(prefills[1])
    result = await task
    assert (result.text, result.placed.prefill_instance) == (TEXT, prefills[1].instance)
    assert decode.submits[0].kv_transfer_params == PARAMS
    assert [len(worker.submits) for worker in prefills] == [0, 1, 0]
    assert router.metrics.model(MODEL).disagg.queued == 1

    async def is_empty() -> bool:
        return await depth_of(cluster) == 0

    await eventually(is_empty)


async def test_who_comes_later_waits_behind(cluster, eventually, calls: Calls) -> None:
    """While others wait, a request does not go ahead of them to a worker that is no longer busy."""
    (prefill,) = await busy_workers(cluster, 1)
    await cluster.worker(says(TEXT), role="decode")
    router = await cluster.router(disagg=ALWAYS)
    first = asyncio.create_task(router.generation.generate(request()))
    await eventually(sees(router, 1))
    for connection in router.pool.prefill_workers(MODEL):
        connection.load.on_report(wire.Load(steps=1), 0.0)
    second = asyncio.create_task(router.generation.generate(request()))

    async def both_wait() -> bool:
        return await depth_of(cluster) == 2

    await eventually(both_wait)
    assert prefill.submits == []
    await calls(prefill)
    assert [result.text for result in await asyncio.gather(first, second)] == [TEXT, TEXT]


@pytest.mark.parametrize("leaves", ["cancelled", "deadline"])
async def test_who_leaves_is_skipped(cluster, eventually, calls: Calls, leaves: str) -> None:
    """Its ticket goes, and no worker hears of it."""
    (prefill,) = await busy_workers(cluster, 1)
    decode = await cluster.worker(says(TEXT), role="decode")
    router = await cluster.router(disagg=ALWAYS)
    task = asyncio.create_task(router.generation.generate(request()))
    await eventually(lambda: depth_of(cluster))
    if leaves == "cancelled":
        task.cancel()
    else:
        next(iter(router.generation._sequences)).abort(errors.DeadlineExceeded("late"))
    with pytest.raises((asyncio.CancelledError, errors.DeadlineExceeded)):
        await task
    await calls(prefill)
    assert (await router.generation.generate(request())).text == TEXT
    assert len(prefill.submits) == len(decode.submits) == 1
    assert router.generation.inflight == 0


async def test_nobody_has_room_in_time(cluster) -> None:
    """The decode worker computes the prompt then."""
    (prefill,) = await busy_workers(cluster, 1)
    decode = await cluster.worker(says(TEXT), role="decode")
    settings = DisaggSettings(
        remote_prefill="always", max_local_prefill_tokens=0, busy_prefill_tokens=1000, prefill_timeout_s=0.05
    )
    router = await cluster.router(disagg=settings)
    assert (await router.generation.generate(request())).text == TEXT
    assert (prefill.submits, decode.submits[0].kv_transfer_params) == ([], None)
    assert router.metrics.model(MODEL).disagg.failures == {"late": 1}


async def test_local_prefill_where_it_is_predicted_sooner(cluster, eventually, calls: Calls) -> None:
    """With a long queue before it, and an idle decode worker, the prompt is computed locally at once."""
    await busy_workers(cluster, 1, wire.Load(waiting_prefill_tokens=60_000, prefill_tokens_per_s=1000.0))
    decode = await cluster.worker(says(TEXT), role="decode")
    router = await cluster.router(disagg=DisaggSettings(max_local_prefill_tokens=0))
    assert (await router.generation.generate(request())).text == TEXT
    assert decode.submits[0].kv_transfer_params is None
    assert router.metrics.model(MODEL).disagg.prefills == {("local", "sooner"): 1}


@pytest.mark.parametrize("pulls", [True, False])
async def test_without_the_queue(cluster, pulls: bool) -> None:
    """Switched off, or with workers that do not call, a request waits at the worker that was chosen."""
    (prefill,) = await busy_workers(cluster, 1) if pulls else [await cluster.worker(hands_over(), role="prefill")]
    prefill.load = BUSY
    await cluster.worker(says(TEXT), role="decode")
    limit = 0 if pulls else 1000
    settings = DisaggSettings(remote_prefill="always", max_local_prefill_tokens=0, busy_prefill_tokens=limit)
    router = await cluster.router(disagg=settings)
    assert (await router.generation.generate(request())).placed.prefill_instance == prefill.instance
    assert await depth_of(cluster) == 0


async def test_the_caller_is_gone(cluster, eventually, calls: Calls) -> None:
    """A worker that called and then left is no choice; without another one the prompt is computed locally."""
    (prefill,) = await busy_workers(cluster, 1)
    decode = await cluster.worker(says(TEXT), role="decode")
    router = await cluster.router(disagg=ALWAYS)
    task = asyncio.create_task(router.generation.generate(request()))
    await eventually(lambda: depth_of(cluster))
    await prefill.kill()
    await eventually(lambda: not any(c.ready for c in router.pool.prefill_workers(MODEL)))
    await calls(prefill)
    assert (await task).text == TEXT
    assert decode.submits[0].kv_transfer_params is None
    assert router.metrics.model(MODEL).disagg.failures == {"lost": 1}


async def test_redis_lost(cluster, eventually, redis_server) -> None:
    """Without Redis requests wait at the worker that was chosen."""
    async with connect(redis_server.url) as redis:
        cluster.registry = Registry(redis, cluster.keys)
        (prefill,) = await busy_workers(cluster, 1)
        await cluster.worker(says(TEXT), role="decode")
        router = await cluster.router(disagg=ALWAYS, redis_url=redis_server.url)
        redis_server.kill()
        await eventually(lambda: not router.pool.redis_connected)
        assert (await router.generation.generate(request())).placed.prefill_instance == prefill.instance
