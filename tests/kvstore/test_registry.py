"""Registry: leases, the watch, blobs and settings, and what a lost or emptied Redis does to them: nothing."""

import asyncio
import logging
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import msgspec
import pytest
from redis.asyncio import Redis

from kvstore.cards import InstanceCard
from kvstore.connect import connect
from kvstore.embedded import EmbeddedRedis
from kvstore.errors import StoreDataError, StoreUnavailable
from kvstore.keys import Keys
from kvstore.records import LeaseRecord, Listing
from kvstore.registry import Registry
from kvstore.watch import Added, Change, Changed, Removed, SettingChanged, Watch

Eventually = Callable[[Callable[[], bool]], Awaitable[None]]
KEYS = Keys()


def card(instance: str = "aaaa", **values: object) -> InstanceCard:
    base = InstanceCard(
        instance=instance,
        model="demo",
        grpc_address="127.0.0.1:8001",
        engine="torch",
        block_size=16,
        kv_blocks=100,
        max_context=2048,
        model_files="0" * 64,
        epoch=1,
    )
    return msgspec.structs.replace(base, **values)


@asynccontextmanager
async def watching(registry: Registry, poll_s: float = 0.05) -> AsyncIterator[tuple[Watch, list[Change]]]:
    """A watch after its first listing, and the changes it reports."""
    changes: list[Change] = []
    async with registry.watch(changes.append, poll_s=poll_s) as watch:
        assert await watch.wait_listed(5.0)
        yield watch, changes


async def test_join_change_leave(redis: Redis, eventually: Eventually) -> None:
    """A watcher sees an instance come, change and go by messages, long before the next listing is due."""
    registry = Registry(redis)
    async with watching(registry, poll_s=60.0) as (watch, changes):
        async with await registry.register(card()) as lease:
            await eventually(lambda: changes == [Added(card())])
            await lease.update(card(kv_blocks=200))
            await eventually(lambda: changes[1:] == [Changed(card(kv_blocks=200), before=card())])
            assert await registry.instances() == [card(kv_blocks=200)]
            assert watch.instances == {"aaaa": card(kv_blocks=200)}
        await eventually(lambda: changes[2:] == [Removed(card(kv_blocks=200))])
        assert await registry.instances() == []
        assert await redis.smembers(KEYS.instances()) == set()


async def test_listing_is_the_truth(redis: Redis, eventually: Eventually) -> None:
    """What no message told of is found by the next listing."""
    registry = Registry(redis)
    record = msgspec.msgpack.encode(LeaseRecord(card(), 1.0))
    async with watching(registry) as (_, changes):
        await redis.set(KEYS.instance("aaaa"), record)
        await redis.sadd(KEYS.instances(), "aaaa")
        await eventually(lambda: changes == [Added(card())])


async def test_refreshed(redis: Redis, eventually: Eventually) -> None:
    """A lease outlives its length while it is held, and its keys all expire."""
    registry = Registry(redis)
    async with await registry.register(card(), ttl_s=0.15), watching(registry) as (_, changes):
        deaths = 0
        for _ in range(8):
            await asyncio.sleep(0.05)  # time passing is what is tested
            deaths += await redis.exists(KEYS.instance("aaaa")) == 0
        assert deaths == 0
        assert changes == [Added(card())]
        for key in await redis.keys("*"):
            assert await redis.ttl(key) >= 0, key


async def test_lease_of_a_killed_process_lapses(redis_url: str, redis: Redis, eventually: Eventually) -> None:
    """An instance whose process dies without a word is gone one lease length later."""
    code = (
        "import asyncio, msgspec, sys\n"
        "from kvstore.cards import InstanceCard\n"
        "from kvstore.connect import connect\n"
        "from kvstore.registry import Registry\n"
        "async def main():\n"
        "    card = msgspec.json.decode(sys.argv[2], type=InstanceCard)\n"
        "    async with connect(sys.argv[1]) as redis, await Registry(redis).register(card, ttl_s=0.5):\n"
        "        print('up', flush=True)\n"
        "        await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    command = [sys.executable, "-c", code, redis_url, msgspec.json.encode(card()).decode()]
    async with watching(Registry(redis)) as (watch, changes):
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            await eventually(lambda: len(watch.instances) == 1)
            process.kill()
        # The watch has begun less than a lease length ago: grace after (re)connection must not keep the dead for ever.
        await eventually(lambda: changes == [Added(card()), Removed(card())])
    assert await redis.smembers(KEYS.instances()) == set()


async def test_lost_redis_removes_nobody(redis_server: EmbeddedRedis, eventually: Eventually) -> None:
    """Redis dies and comes back empty: the view stays, the instances register again, and nothing was reported."""
    async with connect(redis_server.url) as redis:
        registry = Registry(redis)
        blob = await registry.put_blob(b"tokenizer")
        await registry.set_setting("limit", 5)
        async with await registry.register(card(), ttl_s=1.0) as lease, watching(registry) as (watch, changes):
            before = list(changes)
            redis_server.kill()
            await eventually(lambda: not watch.connected and not lease.connected)
            assert watch.instances == {"aaaa": card()}
            redis_server.start()
            await eventually(lambda: watch.connected and lease.connected)
            assert await registry.instances() == [card()]
            assert await registry.get_blob(blob) == b"tokenizer"
            assert changes == before
            assert watch.settings == {"limit": 5}
            await lease.update(card(kv_blocks=7))
            await eventually(lambda: watch.instances == {"aaaa": card(kv_blocks=7)})


async def test_flush_removes_nobody(redis: Redis, eventually: Eventually) -> None:
    """An emptied Redis that never broke a connection is noticed too."""
    registry = Registry(redis)
    async with await registry.register(card(), ttl_s=0.6), watching(registry) as (watch, changes):
        era = await redis.get(KEYS.era())
        await redis.flushall()
        await eventually(lambda: _differs(redis, era))
        assert watch.instances == {"aaaa": card()}
        assert changes == [Added(card())]


async def _differs(redis: Redis, era: bytes) -> bool:
    return await redis.get(KEYS.era()) not in (None, era)


async def test_dead_during_outage(redis_server: EmbeddedRedis, eventually: Eventually) -> None:
    """An instance that died while Redis was away is removed after the time to register again, not at once."""
    async with connect(redis_server.url) as redis, connect(redis_server.url) as other:
        registry = Registry(redis)
        dead = await Registry(other).register(card("dead"), ttl_s=0.5)
        async with await registry.register(card(), ttl_s=0.5), watching(registry) as (watch, changes):
            redis_server.kill()
            await dead.close()  # cannot say goodbye
            await eventually(lambda: not watch.connected)
            assert set(watch.instances) == {"aaaa", "dead"}
            redis_server.start()
            await eventually(lambda: set(watch.instances) == {"aaaa"})
            assert changes[2:] == [Removed(card("dead"))]


@pytest.mark.parametrize(
    "data",
    [
        b"not msgpack",
        msgspec.msgpack.encode({"card": {"instance": "bbbb"}, "ttl_s": 1.0}),
        msgspec.msgpack.encode(LeaseRecord(card("cccc"), 1.0)),
        msgspec.msgpack.encode(LeaseRecord(card("bbbb", block_size=0), 1.0)),
        msgspec.msgpack.encode(LeaseRecord(card("bbbb", engine="x" * 70_000), 1.0)),
    ],
)
async def test_broken_card(data: bytes, redis: Redis, eventually: Eventually, caplog: pytest.LogCaptureFixture) -> None:
    """A card that cannot be used is passed over with one line, however often it is listed; the others stay."""
    registry = Registry(redis)
    await redis.set(KEYS.instance("bbbb"), data)
    await redis.sadd(KEYS.instances(), "bbbb")
    async with await registry.register(card()), watching(registry, poll_s=0.01) as (watch, changes):
        await registry.set_setting("tick", 1)
        await eventually(lambda: watch.settings == {"tick": 1})
        assert changes[0] == Added(card())
        assert await registry.list()
        assert sum("bbbb" in record.message for record in caplog.records) == 1
    assert await registry.instances() == []


async def test_unlisted_after_lapse(redis: Redis) -> None:
    """Ids whose card has lapsed are pruned from the set by whoever lists."""
    await redis.sadd(KEYS.instances(), "gone", "gone too")
    assert await Registry(redis).instances() == []
    assert await redis.exists(KEYS.instances()) == 0


async def test_refused_cards(redis: Redis) -> None:
    """A card that no reader would take is refused at its origin."""
    registry = Registry(redis)
    for bad in (card("a b"), card(""), card(namespace="other"), card(engine="x" * 70_000)):
        with pytest.raises(StoreDataError):
            await registry.register(bad)
    async with await registry.register(card()) as lease:
        with pytest.raises(ValueError, match="bbbb"):
            await lease.update(card("bbbb"))


async def test_register_without_redis(redis_server: EmbeddedRedis) -> None:
    """The first registration fails aloud: a worker that nobody can find should not look healthy."""
    async with connect(redis_server.url) as redis:
        redis_server.kill()
        with pytest.raises(StoreUnavailable):
            await Registry(redis).register(card())


async def test_namespaces_are_apart(redis: Redis) -> None:
    """Two namespaces in one Redis do not see each other."""
    other = Registry(redis, Keys(namespace="other"))
    async with await other.register(card(namespace="other")):
        assert await Registry(redis).instances() == []
        assert len(await other.instances()) == 1


async def test_blobs(redis: Redis) -> None:
    """Blobs are named by their content, shared, expiring, and checked when read."""
    registry = Registry(redis)
    name = await registry.put_blob(b"content")
    assert await Registry(redis).put_blob(b"content") == name
    assert await registry.get_blob(name) == b"content"
    assert await registry.get_blob("0" * 64) is None
    assert 0 < await redis.ttl(KEYS.blob(name)) <= 3600
    await redis.set(KEYS.blob(name), b"other")
    with pytest.raises(StoreDataError, match="damaged"):
        await registry.get_blob(name)
    with pytest.raises(StoreDataError, match="SHA-256"):
        await registry.get_blob("../secret")


async def test_settings(redis: Redis, eventually: Eventually) -> None:
    """Settings are set, read, watched and deleted; a broken one and one too many are refused or passed over."""
    registry = Registry(redis)
    await registry.set_setting("early", [1, {"a": None}])
    async with watching(registry, poll_s=60.0) as (watch, changes):
        assert changes == [SettingChanged("early", [1, {"a": None}])]
        await registry.set_setting("late", 2.5)
        await eventually(lambda: watch.settings.get("late") == 2.5)
        await redis.hset(KEYS.settings(), "broken", b"{")
        await registry.set_setting("early", None)
        await eventually(lambda: changes[2:] == [SettingChanged("early", None)])
        assert watch.settings == {"late": 2.5}
    assert await registry.get_setting("late") == 2.5
    assert await registry.get_setting("early", "default") == "default"
    with pytest.raises(StoreDataError, match="JSON"):
        await registry.get_setting("broken")
    for name, value in (("a b", 1), ("ok", object()), ("ok", "x" * 5000)):
        with pytest.raises(StoreDataError):
            await registry.set_setting(name, value)
    await redis.hset(KEYS.settings(), mapping={f"s{number}": b"1" for number in range(254)})
    with pytest.raises(StoreDataError, match="256"):
        await registry.set_setting("another", 1)


async def test_an_unforeseen_error_does_not_end_the_watch(
    redis: Redis, eventually: Eventually, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever a listing raises is logged, and the watch goes on with the next one."""
    registry = Registry(redis)
    whole, failures = registry.list, iter([RuntimeError("unforeseen")])

    async def fails_once() -> Listing:
        for failure in failures:
            raise failure
        return await whole()

    async with watching(registry) as (watch, _):
        monkeypatch.setattr(registry, "list", fails_once)
        await eventually(lambda: "unforeseen" in caplog.text)
        async with await Registry(redis).register(card()):
            await eventually(lambda: watch.connected and watch.instances)


async def test_failing_callback(redis: Redis, eventually: Eventually, caplog: pytest.LogCaptureFixture) -> None:
    """A callback that raises is logged and ends nothing."""
    registry = Registry(redis)
    seen: list[Change] = []

    def fail(change: Change) -> None:
        seen.append(change)
        raise RuntimeError("callback")

    with caplog.at_level(logging.CRITICAL):
        async with registry.watch(fail, poll_s=0.05), await registry.register(card()) as lease:
            await eventually(lambda: len(seen) == 1)
            await lease.update(card(kv_blocks=1))
            await eventually(lambda: len(seen) == 2)
