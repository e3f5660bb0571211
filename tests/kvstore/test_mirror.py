"""The mirror over a real Redis: lost batches, restarts of router, engine and Redis, and who writes snapshots."""

import asyncio
import random
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from redis.asyncio import Redis

from kvstore.batches import decode_batch, encode_batch
from kvstore.cards import EventBatch, InstanceCard, Removed, Stored
from kvstore.connect import connect
from kvstore.embedded import EmbeddedRedis
from kvstore.events import EventPublisher
from kvstore.keys import Keys
from kvstore.mirror import IndexMirror
from kvstore.registry import Registry
from kvstore.snapshots import SnapshotStore
from kvstore.wire import SnapshotReply

Eventually = Callable[[Callable[[], object]], Awaitable[None]]
KEYS = Keys()
STREAM = KEYS.events("demo", 16)
HEARTBEAT_S = 0.05


class Cluster:
    """Publishers in place of workers, and the call by which a router asks them for snapshots."""

    def __init__(self, redis: Redis) -> None:
        self.redis = redis
        self.workers: dict[str, EventPublisher] = {}
        self.fetched: list[str] = []
        self.mute: set[str] = set()

    def publisher(self, instance: str, epoch: int = 1, **options: object) -> EventPublisher:
        self.workers[instance] = EventPublisher(
            self.redis,
            KEYS,
            instance=instance,
            epoch=epoch,
            model="demo",
            block_size=16,
            **{"heartbeat_s": HEARTBEAT_S, **options},
        )
        return self.workers[instance]

    async def fetch(self, instance: str) -> SnapshotReply | None:
        self.fetched.append(instance)
        worker = self.workers.get(instance)
        return worker.snapshot() if worker and instance not in self.mute else None

    def mirror(self, **options: object) -> IndexMirror:
        settings = {"snapshot_every_s": 60.0, "retry_s": 0.02, **options}
        return IndexMirror(self.redis, KEYS, model="demo", block_size=16, fetch_snapshot=self.fetch, **settings)

    def exact(self, mirror: IndexMirror) -> bool:
        """Whether the mirror knows of each worker what that worker holds, and of nobody else."""
        synced = all(mirror.is_synced(name) for name in self.workers)
        return (
            synced
            and set(mirror.instances()) == set(self.workers)
            and all(mirror.digest(name) == worker.digest() for name, worker in self.workers.items())
        )


@pytest.fixture
def cluster(redis: Redis) -> Cluster:
    return Cluster(redis)


def churn(worker: EventPublisher, rng: random.Random, steps: int) -> None:
    """What an engine does: prompts come, old blocks go; each step is a batch of its own."""
    for _ in range(steps):
        begin = rng.randrange(10_000)
        worker.publish([Stored(None, list(range(begin, begin + 20)))])
        worker.publish([Removed([rng.randrange(10_000) for _ in range(10)])])
        worker.snapshot()


@asynccontextmanager
async def workers(cluster: Cluster, count: int = 2, **options: object) -> AsyncIterator[list[EventPublisher]]:
    started = [await cluster.publisher(f"w{number}", **options).__aenter__() for number in range(count)]
    try:
        yield started
    finally:
        for worker in started:
            await worker.__aexit__(None, None, None)


async def test_follows(cluster: Cluster, eventually: Eventually) -> None:
    """Blocks that are stored can be matched, without a single snapshot being asked for."""
    async with cluster.mirror() as mirror, workers(cluster) as (one, two):
        one.publish([Stored(None, [1, 2, 3])])
        two.publish([Stored(None, [1]), Stored(1, [2], "host")])
        await eventually(lambda: len(mirror.match([1, 2])) == 2 and cluster.exact(mirror))
        assert mirror.match([1, 2, 3])["w0"].blocks == 3
        assert mirror.match([1, 2, 3])["w1"] == (1, 1, 0, 0)
        stats = mirror.stats()
        assert (stats.connected, stats.blocks, stats.instances, stats.unsynced, stats.gaps) == (True, 3, 2, 0, 0)
        assert cluster.fetched == []


async def test_a_tenth_of_the_batches_lost(cluster: Cluster, eventually: Eventually) -> None:
    """With 10 % of the batches lost on purpose, the index is exact within two heartbeats of the last one."""
    rng = random.Random(1)
    lossy = {"drop": lambda: rng.random() < 0.1, "heartbeat_s": 0.2}
    async with cluster.mirror() as mirror, workers(cluster, 3, **lossy) as started:
        for _ in range(10):
            for worker in started:
                churn(worker, rng, 10)
            await asyncio.sleep(0)
        before = [await _heartbeats_of(cluster, name) for name in cluster.workers]
        await eventually(lambda: cluster.exact(mirror))
        after = [await _heartbeats_of(cluster, name) for name in cluster.workers]
        assert max(now - then for now, then in zip(after, before, strict=True)) <= 2
        assert sum(worker.dropped_batches for worker in started) > 10
        assert mirror.stats().resyncs > 0
        assert mirror.stats().gaps > 0


async def _heartbeats_of(cluster: Cluster, instance: str) -> int:
    batches = [decode_batch(fields[b"b"]) for _, fields in await cluster.redis.xrange(STREAM)]
    return sum(batch.digest is not None and batch.instance == instance for batch in batches)


async def test_router_restart(cluster: Cluster, eventually: Eventually) -> None:
    """A router that starts again has the same index, by snapshot and replay alone."""
    rng = random.Random(2)
    async with workers(cluster) as started:
        async with cluster.mirror() as mirror:
            for worker in started:
                churn(worker, rng, 20)
            await eventually(lambda: cluster.exact(mirror))
        for worker in started:
            churn(worker, rng, 20)
        async with cluster.mirror() as mirror:
            assert await mirror.wait_ready(5.0)
            await eventually(lambda: cluster.exact(mirror))
            assert mirror.stats().gaps == 0
        assert cluster.fetched == []


async def test_snapshots_trim_the_stream(cluster: Cluster, eventually: Eventually) -> None:
    """The stream behind the last but one snapshot goes, and a new router still gets an exact index without asking."""
    rng = random.Random(3)
    async with workers(cluster) as started, cluster.mirror(snapshot_every_s=0.05) as mirror:
        for _ in range(20):
            for worker in started:
                churn(worker, rng, 20)
            await eventually(lambda: cluster.exact(mirror))
        published = sum(worker.seq for worker in started)
        await eventually(lambda: _shorter(cluster.redis, published // 2))
        async with cluster.mirror() as late:
            assert await late.wait_ready(5.0)
            await eventually(lambda: cluster.exact(late))
            assert late.stats().gaps == 0
    for key in await cluster.redis.keys("*"):
        assert await cluster.redis.ttl(key) >= 0, key


async def _shorter(redis: Redis, length: int) -> bool:
    return await redis.xlen(STREAM) < length


async def test_one_router_writes(cluster: Cluster) -> None:
    """Of several routers one at a time writes snapshots, and an older one never replaces a newer one."""
    first = SnapshotStore(cluster.redis, KEYS, "demo", 16)
    second = SnapshotStore(cluster.redis, KEYS, "demo", 16)
    assert await first.claim(60.0)
    assert not await second.claim(60.0)
    assert await first.claim(60.0)
    assert await first.save("10-2", [])
    assert not await second.save("10-1", [])
    assert await second.save("11-0", [])
    loaded = await first.load()
    assert loaded is not None
    assert loaded.stream_id == "11-0"


async def test_broken_snapshot(cluster: Cluster, eventually: Eventually) -> None:
    """A snapshot in Redis that cannot be read is as good as none."""
    await cluster.redis.hset(KEYS.index("demo", 16), mapping={"id": "1-0", "data": b"broken"})
    async with workers(cluster) as (one, _), cluster.mirror() as mirror:
        one.publish([Stored(None, [1])])
        await eventually(lambda: cluster.exact(mirror))


async def test_redis_restarted_empty(redis_server: EmbeddedRedis, eventually: Eventually) -> None:
    """Redis dies: matches go on from the last index. It comes back empty: everything is exact again."""
    rng = random.Random(4)
    async with connect(redis_server.url) as redis:
        cluster = Cluster(redis)
        async with workers(cluster, backlog_bytes=500) as started, cluster.mirror() as mirror:
            started[0].publish([Stored(None, [20_001, 20_002])])
            await eventually(lambda: cluster.exact(mirror) and mirror.connected)
            redis_server.kill()
            await eventually(lambda: not mirror.connected)
            assert mirror.match([20_001, 20_002])["w0"].blocks == 2
            for worker in started:
                churn(worker, rng, 50)
            redis_server.start()
            await eventually(lambda: mirror.connected and cluster.exact(mirror))
            assert sum(worker.dropped_batches for worker in started) > 0


async def test_starts_without_redis(redis_server: EmbeddedRedis, eventually: Eventually) -> None:
    """A mirror may be started while Redis is away, says so, and follows when it comes."""
    async with connect(redis_server.url) as redis:
        cluster = Cluster(redis)
        redis_server.kill()
        async with cluster.mirror() as mirror, workers(cluster) as started:
            assert not await mirror.wait_ready(0.05)
            assert not mirror.connected
            started[0].publish([Stored(None, [1])])
            redis_server.start()
            await eventually(lambda: cluster.exact(mirror))


async def test_engine_restart(cluster: Cluster, eventually: Eventually) -> None:
    """An engine that starts again in place leaves no ghost blocks."""
    async with cluster.mirror() as mirror:
        async with cluster.publisher("w", epoch=1) as before:
            before.publish([Stored(None, [1, 2])])
            await eventually(lambda: mirror.match([1, 2]))
        async with cluster.publisher("w", epoch=2) as after:
            after.publish([Stored(None, [3])])
            await eventually(lambda: cluster.exact(mirror))
            assert mirror.match([1]) == {}


async def test_instance_that_does_not_answer(cluster: Cluster, eventually: Eventually) -> None:
    """One that gives no snapshot is forgotten after some attempts, and taken up again when it answers."""
    async with workers(cluster, 1, drop=iter([True] + [False] * 100).__next__) as (one,):
        cluster.mute.add("w0")
        one.publish([Stored(None, [1])])
        async with cluster.mirror(fetch_attempts=2) as mirror:
            await eventually(lambda: len(cluster.fetched) >= 4)
            assert mirror.match([1]) == {}
            assert mirror.stats().gaps >= 2
            cluster.mute.clear()
            await eventually(lambda: cluster.exact(mirror))


async def test_failing_and_hanging_fetch(cluster: Cluster, eventually: Eventually) -> None:
    """A fetch that raises or never returns is an instance that does not answer, not the end of the mirror."""
    calls = 0

    async def fetch(instance: str) -> SnapshotReply | None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise RuntimeError("no route")
        if calls == 2:
            await asyncio.Event().wait()
        return await cluster.fetch(instance)

    async with workers(cluster, 1, drop=iter([True] + [False] * 100).__next__) as (one,):
        one.publish([Stored(None, [1])])
        mirror = IndexMirror(
            cluster.redis, KEYS, model="demo", block_size=16, fetch_snapshot=fetch, fetch_timeout_s=0.05, retry_s=0.01
        )
        async with mirror:
            await eventually(lambda: cluster.exact(mirror))
        assert calls >= 3


async def test_removed_instance(cluster: Cluster, eventually: Eventually) -> None:
    """What the registry removed is forgotten, also in the middle of a resynchronisation."""
    cluster.mute |= {"w0", "gone"}
    async with cluster.mirror(fetch_attempts=2) as mirror:
        async with workers(cluster, 1) as (one,):
            one.publish([Stored(None, [1])])
            await eventually(lambda: cluster.exact(mirror))
        mirror.remove("w0")
        assert mirror.match([1]) == {}
        # A last heartbeat may still come, from one that does not answer any more.
        await eventually(lambda: mirror.instances() == [])
        await cluster.redis.xadd(STREAM, {"b": encode_batch(EventBatch("gone", 1, 9, [Stored(None, [1])]))})
        await eventually(lambda: "gone" in cluster.fetched)
        mirror.remove("gone")
        assert "gone" not in mirror.instances()
        assert await mirror.wait_ready(1.0)


async def test_silent_instance(cluster: Cluster, eventually: Eventually) -> None:
    """An instance that the registry never mentions and that says nothing more is forgotten while others speak."""
    async with workers(cluster, 1):
        await cluster.redis.xadd(STREAM, {"b": encode_batch(EventBatch("ghost", 1, 1, [Stored(None, [1])]))})
        async with cluster.mirror(silent_s=0.2, snapshot_every_s=0.05) as mirror:
            await eventually(lambda: "ghost" in mirror.instances())
            await eventually(lambda: mirror.instances() == ["w0"])
            assert mirror.match([1]) == {}


async def test_documented_rights_suffice(redis_server: EmbeddedRedis, eventually: Eventually) -> None:
    """A Redis user with no more than the rights that docs/redis.md names can do all of it, scripts included."""
    text = (Path(__file__).parents[2] / "docs" / "redis.md").read_text()
    rights = re.search(r"With ACLs: `(.*) &(.*)` and `(.*)`", text)
    assert rights is not None
    keys, channels, commands = rights.groups()
    async with connect(redis_server.url) as admin:
        await admin.execute_command(
            "ACL", "SETUSER", "worker", "on", ">word", "resetchannels", f"&{channels}", keys, *commands.split()
        )
    async with connect(redis_server.url.replace("redis://", "redis://worker:word@")) as redis:
        cluster = Cluster(redis)
        registry = Registry(redis)
        await redis.sadd(KEYS.instances(), "stale")  # for the script that prunes
        card = InstanceCard(
            instance="w0",
            model="demo",
            grpc_address="127.0.0.1:1",
            engine="mock",
            block_size=16,
            kv_blocks=1,
            max_context=1,
            model_files=await registry.put_blob(b"file"),
            epoch=1,
        )
        async with registry.watch(lambda change: None) as watch, await registry.register(card):
            await registry.set_setting("name", 1)
            await eventually(lambda: watch.settings and "w0" in watch.instances)
            async with workers(cluster, 1) as (one,), cluster.mirror(snapshot_every_s=0.02) as mirror:
                one.publish([Stored(None, [1])])
                await eventually(lambda: cluster.exact(mirror))
                await eventually(lambda: redis.exists(KEYS.index("demo", 16)))


async def test_an_unforeseen_error_does_not_end_the_mirror(
    cluster: Cluster, eventually: Eventually, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever a batch raises is logged; the mirror goes on, and repairs what it lost."""
    async with cluster.mirror() as mirror, workers(cluster, 1) as (worker,):
        worker.publish([Stored(None, [1, 2, 3])])
        await eventually(lambda: cluster.exact(mirror))
        whole, failures = mirror._follower.handle, iter([RuntimeError("unforeseen")])

        def fails_once(time_ms: int, batch: EventBatch) -> bool:
            for failure in failures:
                raise failure
            return whole(time_ms, batch)

        monkeypatch.setattr(mirror._follower, "handle", fails_once)
        worker.publish([Stored(None, [4, 5, 6])])
        await eventually(lambda: "unforeseen" in caplog.text)
        await eventually(lambda: mirror.connected and cluster.exact(mirror))
