"""The event plane: what the publisher sends, what the reader makes of a stream, and what either does without Redis."""

import asyncio
import threading
from collections.abc import Awaitable, Callable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio import Redis

from kvstore.batches import MAX_ENTRY_BYTES, decode_batch, encode_batch, split
from kvstore.cards import Cleared, Digest, EventBatch, KvOp, Removed, Stored
from kvstore.connect import connect
from kvstore.embedded import EmbeddedRedis
from kvstore.errors import StoreUnavailable
from kvstore.events import EventPublisher, EventReader
from kvstore.keys import Keys
from kvstore.residency import Residency, unpack

Eventually = Callable[[Callable[[], bool]], Awaitable[None]]
KEYS = Keys()
STREAM = KEYS.events("demo", 16)


def publisher(redis: Redis, **options: object) -> EventPublisher:
    settings = {"instance": "aaaa", "epoch": 7, "model": "demo", "block_size": 16, "heartbeat_s": 60.0, **options}
    return EventPublisher(redis, KEYS, **settings)


async def entries(redis: Redis) -> list[EventBatch]:
    """All batches of the stream."""
    return [decode_batch(fields[b"b"]) for _, fields in await redis.xrange(STREAM)]


async def batches(redis: Redis) -> list[EventBatch]:
    """All batches but the heartbeats."""
    return [batch for batch in await entries(redis) if batch.ops]


def resident(events: list[EventBatch]) -> Residency:
    residency = Residency()
    for batch in events:
        residency.apply(batch.ops)
    return residency


async def test_dense_and_coalesced(redis: Redis, eventually: Eventually) -> None:
    """What comes together leaves as one batch; numbers are dense; closing sends the rest."""
    async with publisher(redis) as events:
        for value in range(10):
            events.publish([Stored(None, [value])])
        await eventually(lambda: events.seq == 1)
        events.publish([Removed([0]), Cleared()])
        events.publish([])
    sent = await batches(redis)
    assert [batch.seq for batch in sent] == [1, 2]
    assert sent[0] == EventBatch("aaaa", 7, 1, [Stored(None, [value]) for value in range(10)])
    assert sent[1].ops == [Removed([0]), Cleared()]
    assert await redis.ttl(STREAM) > 0


async def test_from_many_threads(redis: Redis) -> None:
    """Threads publish and take snapshots at once: each snapshot equals what the batches up to its seq amount to."""
    snapshots = []

    def work(number: int) -> None:
        for step in range(100):
            value = number * 1000 + step + 10
            events.publish([Stored(None, [value]), Removed([value - 5])])
            if step % 20 == 0:
                snapshots.append(events.snapshot())

    async with publisher(redis) as events:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            await asyncio.to_thread(thread.join)
    sent = await batches(redis)
    assert [batch.seq for batch in sent] == list(range(1, len(sent) + 1))
    assert resident(sent).digest() == events.digest()
    for snapshot in snapshots:
        held = {tier: set(values.tolist()) for tier, values in unpack(snapshot.tiers)}
        assert held == {"device": resident(sent[: snapshot.seq]).tiers["device"]}


async def test_heartbeats(redis: Redis, eventually: Eventually) -> None:
    """Heartbeats come by themselves, from the start on, with the last seq and the digest."""
    async with publisher(redis, heartbeat_s=0.02) as events:
        await eventually(lambda: redis.xlen(STREAM))
        assert (await entries(redis))[0] == EventBatch("aaaa", 7, 0, [], Digest())
        events.publish([Stored(None, [5, 6]), Stored(None, [6], "host")])
        await eventually(lambda: events.seq == 1)
        await redis.delete(STREAM)
        await eventually(lambda: redis.xlen(STREAM))
        sent = await entries(redis)
    assert sent[-1] == EventBatch("aaaa", 7, 1, [], Digest(3, 5))


async def test_dropped_on_purpose(redis: Redis) -> None:
    """A batch that the hook drops leaves a hole in the numbers and nothing else."""
    answers = iter([False, True, False])
    async with publisher(redis, drop=lambda: next(answers)) as events:
        for value in range(3):
            events.publish([Stored(None, [value])])
            events.snapshot()
    assert [batch.seq for batch in await batches(redis)] == [1, 3]
    assert events.dropped_batches == 1
    assert events.snapshot().seq == 3


async def test_large_ops_are_split(redis: Redis) -> None:
    """No entry grows beyond what a reader takes, and the pieces of a sequence still follow each other."""
    values = list(range(2**63, 2**63 + 20_000))
    async with publisher(redis) as events:
        events.publish([Stored(1, values), Removed(values[:9000])])
    sent = await batches(redis)
    assert all(len(encode_batch(batch)) < MAX_ENTRY_BYTES / 2 for batch in sent)
    stored = [op for batch in sent for op in batch.ops if isinstance(op, Stored)]
    assert [op.parent for op in stored] == [1, values[8191], values[16383]]
    assert resident(sent).tiers["device"] == set(values[9000:])


async def test_backlog(redis_server: EmbeddedRedis, eventually: Eventually) -> None:
    """Without Redis batches wait; what is too much is dropped and leaves a gap; publishing never blocks."""
    async with connect(redis_server.url) as redis, publisher(redis, backlog_bytes=2000) as events:
        await eventually(lambda: events.connected)
        redis_server.kill()
        events.publish([Stored(None, [1])])
        await eventually(lambda: not events.connected)
        redis_server.start()
        await eventually(lambda: events.connected)
        assert [batch.seq for batch in await batches(redis)] == [1]

        redis_server.kill()
        for value in range(200):
            events.publish([Stored(None, list(range(value, value + 10)))])
            events.snapshot()
        await eventually(lambda: not events.connected)
        assert events.dropped_batches > 10
        redis_server.start()
        await eventually(lambda: events.connected)
        sent = [batch.seq for batch in await batches(redis)]
        assert sent == list(range(sent[0], 202))
        assert sent[0] > 10


async def test_stuck_loop_is_bounded(redis: Redis) -> None:
    """While the loop cannot send, what engine threads publish is bounded by the backlog."""
    events = publisher(redis, backlog_bytes=100_000)
    for value in range(50_000):
        events.publish([Stored(None, [value])])
    assert events.backlog_bytes <= 100_000
    assert events.dropped_batches > 0
    assert events.digest().count == 50_000


async def test_stream_is_capped(redis: Redis) -> None:
    """The stream is trimmed by length even if no router ever trims it."""
    async with publisher(redis, stream_entries=100) as events:
        for value in range(1000):
            events.publish([Stored(None, [value])])
            events.snapshot()
    assert await redis.xlen(STREAM) <= 300


async def test_reader_follows(redis: Redis) -> None:
    """A reader gets everything once and in order, in pieces, waits at the end, and tells how far behind it is."""
    for seq in range(1, 8):
        await redis.xadd(STREAM, {"b": encode_batch(EventBatch("aaaa", 1, seq, [Cleared()]))}, id=f"{seq * 1000}-0")
    reader = EventReader(redis, STREAM, count=3, block_ms=10)
    seen = [entry.batch.seq for entry in await reader.read()]
    assert (reader.at_end, reader.last_id) == (False, "3000-0")
    assert reader.lag_s == 6.0
    assert reader.lag_entries == 7
    while not reader.at_end:
        seen += [entry.batch.seq for entry in await reader.read()]
    assert seen == list(range(1, 8))
    assert (reader.lag_s, reader.lag_entries) == (0.0, 0)
    assert await reader.read() == []


BROKEN = [
    {"b": b"not msgpack"},
    {"other": b"field"},
    {"b": encode_batch(EventBatch("aaaa", 1, -1, [Cleared()]))},
    {"b": encode_batch(EventBatch("aaaa", 1, 1, []))},
    {"b": encode_batch(EventBatch("aaaa", 1, 1, [Stored(None, [-5])]))},
    {"b": msgspec.msgpack.encode(["aaaa", 1, 1, [["x", [1]]], None])},
    {"b": msgspec.msgpack.encode(["aaaa", 1, 1, [["s", None, [1], "tape"]], None])},
    {"b": encode_batch(EventBatch("aaaa", 1, 1, [Stored(None, [2**64 - 1] * 150_000)]))},
]


async def test_broken_entries(redis: Redis) -> None:
    """Entries that cannot be right are counted and skipped; those around them arrive."""
    for fields in BROKEN:
        await redis.xadd(STREAM, fields)
    await redis.xadd(STREAM, {"b": encode_batch(EventBatch("aaaa", 1, 1, [Cleared()]))})
    reader = EventReader(redis, STREAM)
    assert [entry.batch.seq for entry in await reader.read()] == [1]
    assert reader.broken == len(BROKEN)


async def test_reader_of_an_emptied_redis(redis: Redis) -> None:
    """When ids begin again below the last one that was read, the reader begins again as well."""
    reader = EventReader(redis, STREAM, last_id="9999999999999-0", block_ms=10)
    await redis.xadd(STREAM, {"b": encode_batch(EventBatch("aaaa", 1, 1, [Cleared()]))})
    assert [entry.batch.seq for entry in await reader.read()] == [1]


async def test_reader_without_redis(redis_server: EmbeddedRedis) -> None:
    """A lost Redis is an error of ours; the position is kept."""
    async with connect(redis_server.url) as redis:
        reader = EventReader(redis, STREAM, last_id="5-0")
        redis_server.kill()
        with pytest.raises(StoreUnavailable):
            await reader.read()
        assert reader.last_id == "5-0"


hashes = st.lists(st.integers(0, 50), max_size=20)
op = st.one_of(st.builds(Stored, st.none(), hashes), st.builds(Removed, hashes), st.builds(Cleared))


@given(st.lists(op, max_size=10), st.integers(1, 8))
def test_split(ops: list[KvOp], most: int) -> None:
    """However ops are cut into batches, the result is the same and no batch is over its size."""
    whole, parts = Residency(), Residency()
    whole.apply(ops)
    for batch in split(ops, most):
        assert batch
        assert sum(len(op.hashes) if isinstance(op, Stored | Removed) else 1 for op in batch) <= most
        parts.apply(batch)
    assert parts.tiers == whole.tiers
    assert parts.digest() == whole.digest()
