"""The prefill queue on a real Redis: each ticket is called, whoever dies, unless its router has left."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest
from redis.asyncio import Redis

from kvstore.connect import connect
from kvstore.embedded import EmbeddedRedis
from kvstore.errors import StoreError
from kvstore.keys import RETENTION_S, Keys
from kvstore.prefill_caller import PrefillCaller
from kvstore.prefill_queue import PrefillQueue
from kvstore.prefill_tickets import FIELD, GROUP, Ticket, encode

Eventually = Callable[[Callable[[], Any]], Awaitable[None]]
KEYS = Keys()
STREAM = KEYS.prefill_queue("demo", 16)


class Rig:
    """Routers and workers of one queue."""

    def __init__(self, redis: Redis, stack: AsyncExitStack) -> None:
        self.redis = redis
        self._stack = stack

    async def router(self, name: str = "r1", **options: Any) -> PrefillQueue:
        queue = PrefillQueue(self.redis, KEYS, model="demo", block_size=16, router=name, poll_s=0.05, **options)
        return await self._stack.enter_async_context(queue)

    async def worker(
        self, name: str, room_tokens: Callable[[], int] = lambda: 1 << 20, **options: Any
    ) -> PrefillCaller:
        options = {"settle_s": 0.0, "poll_s": 0.005, "reclaim_s": 0.1, **options}
        caller = PrefillCaller(
            self.redis, KEYS, model="demo", block_size=16, instance=name, room_tokens=room_tokens, **options
        )
        return await self._stack.enter_async_context(caller)

    async def is_empty(self) -> bool:
        """No ticket is left, neither in the stream nor among those that somebody has claimed."""
        return await self.redis.xlen(STREAM) == 0 and await self.claimed() == 0

    async def claimed(self) -> int:
        """Tickets that a worker has claimed and that are not done with. The group must be there."""
        pending = await self.redis.xpending(STREAM, GROUP)
        return int(pending["pending"])


@pytest.fixture
async def rig(redis: Redis) -> Any:
    async with AsyncExitStack() as stack:
        yield Rig(redis, stack)


async def test_a_ticket_is_called(rig: Rig, eventually: Eventually) -> None:
    """A worker with room calls the router that waits, and nothing is left of the ticket."""
    first, second = await rig.router("r1"), await rig.router("r2")
    one, two = await first.draw(100, 60.0), await second.draw(50, 60.0)
    await eventually(lambda: (first.depth, first.tokens) == (2, 150))
    await rig.worker("w1")
    assert await one.called == await two.called == "w1"
    await eventually(lambda: (first.depth, first.tokens, second.depth) == (0, 0, 0))
    await eventually(rig.is_empty)
    assert 0 < await rig.redis.ttl(STREAM) <= RETENTION_S


async def test_only_workers_with_room_call(rig: Rig, eventually: Eventually) -> None:
    """One that is busy claims nothing, and the oldest ticket is called first."""
    room: set[str] = set()
    queue = await rig.router()
    for name in ("w1", "w2"):
        await rig.worker(name, lambda name=name: 10 if name in room else 0)
    tickets = [await queue.draw(1, 60.0) for _ in range(3)]
    await eventually(lambda: queue.depth == 3)
    assert not any(ticket.called.done() for ticket in tickets)
    room.add("w2")
    assert [await ticket.called for ticket in tickets] == ["w2"] * 3


async def test_a_call_takes_up_room(rig: Rig, eventually: Eventually) -> None:
    """What a worker has called for counts as if it had come, so that it claims no more than it has room for."""
    queue = await rig.router()
    await rig.worker("w1", lambda: 100, settle_s=60.0)
    tickets = [await queue.draw(60, 60.0) for _ in range(3)]
    await asyncio.gather(tickets[0].called, tickets[1].called)
    await rig.worker("w2")
    assert await tickets[2].called == "w2"


async def test_who_has_left_is_not_called(rig: Rig, eventually: Eventually) -> None:
    """A cancelled ticket is skipped, before its claim as after it."""
    queue = await rig.router()
    before, stays = await queue.draw(1, 60.0), await queue.draw(1, 60.0)
    before.leave()
    await eventually(lambda: queue.depth == 1)
    await rig.worker("w1")
    assert await stays.called == "w1"
    assert not before.called.done()
    await eventually(lambda: queue.depth == 0)
    await eventually(rig.is_empty)


async def test_the_claim_of_a_dead_worker_is_taken_over(rig: Rig, eventually: Eventually) -> None:
    """A worker that died between claim and call is followed by another one."""
    queue = await rig.router()
    ticket = await queue.draw(1, 60.0)
    await rig.redis.xgroup_create(STREAM, GROUP, id="0")
    assert await rig.redis.xreadgroup(GROUP, "dead", {STREAM: ">"})
    await rig.worker("w1")
    assert await ticket.called == "w1"
    await eventually(lambda: queue.depth == 0)
    await eventually(rig.is_empty)


async def test_a_call_that_nobody_heard_is_made_again(rig: Rig, eventually: Eventually) -> None:
    """A router whose subscription was broken is called when it is back."""
    deaf = await rig.router("r1")
    ticket = await deaf.draw(1, 60.0)
    deaf._tasks[0].cancel()
    await asyncio.wait(deaf._tasks[:1])
    await rig.redis.xgroup_create(STREAM, GROUP, id="0")
    await rig.worker("w1")
    await eventually(rig.claimed)
    deaf._tasks[0] = asyncio.create_task(deaf._listen())
    assert await ticket.called == "w1"


async def test_tickets_of_a_dead_router_run_out(rig: Rig, eventually: Eventually) -> None:
    """Nobody takes their call: after their time the next claim removes them, as it does what is no ticket."""
    await rig.redis.xadd(STREAM, {FIELD: encode(Ticket("gone", 1, 1, 50))})
    await rig.redis.xadd(STREAM, {FIELD: b"\xc1"})
    await rig.redis.xadd(STREAM, {b"other": b""})
    await rig.worker("w1")
    queue = await rig.router()
    ticket = await queue.draw(1, 60.0)
    assert await ticket.called == "w1"
    await eventually(rig.is_empty)


async def test_a_ticket_that_nobody_waits_for_is_removed(rig: Rig, eventually: Eventually) -> None:
    """A router that was cancelled while it drew a ticket is called for it, and removes it then."""
    await rig.router("r1")
    await rig.redis.xadd(STREAM, {FIELD: encode(Ticket("r1", 99, 1, 60_000))})
    await rig.worker("w1")
    await eventually(rig.is_empty)


async def test_an_emptied_redis(rig: Rig) -> None:
    """The workers found their group anew."""
    queue = await rig.router()
    await rig.worker("w1")
    assert await (await queue.draw(1, 60.0)).called == "w1"
    await rig.redis.flushall()
    assert await (await queue.draw(1, 60.0)).called == "w1"


async def test_closing_leaves_nothing(rig: Rig) -> None:
    """A router that ends takes its tickets along."""
    async with PrefillQueue(rig.redis, KEYS, model="demo", block_size=16, router="r9") as queue:
        await queue.draw(1, 60.0)
        assert await rig.redis.xlen(STREAM) == 1
    assert await rig.redis.xlen(STREAM) == 0


async def test_without_redis(redis_server: EmbeddedRedis, eventually: Eventually) -> None:
    """Drawing fails, so that the caller can do without; when Redis is back, the queue is."""
    async with connect(redis_server.url) as redis, AsyncExitStack() as stack:
        rig = Rig(redis, stack)
        queue = await rig.router()
        await rig.worker("w1")
        assert await (await queue.draw(1, 60.0)).called == "w1"
        redis_server.kill()
        with pytest.raises(StoreError):
            await queue.draw(1, 60.0)
        assert not queue._waiting
        redis_server.start()
        await eventually(queue._subscribed.is_set)
        assert await (await queue.draw(1, 60.0)).called == "w1"


async def test_many_tickets_are_each_called_once(rig: Rig, eventually: Eventually) -> None:
    """Two routers, three workers of which one is dead from the start with claims of its own."""
    routers = [await rig.router("r1"), await rig.router("r2")]
    tickets = [await routers[n % 2].draw(n, 60.0) for n in range(60)]
    await rig.redis.xgroup_create(STREAM, GROUP, id="0")
    await rig.redis.xreadgroup(GROUP, "dead", {STREAM: ">"}, count=20)
    for name in ("w1", "w2"):
        await rig.worker(name)
    called = await asyncio.gather(*(ticket.called for ticket in tickets))
    assert set(called) <= {"w1", "w2"}
    await eventually(rig.is_empty)
