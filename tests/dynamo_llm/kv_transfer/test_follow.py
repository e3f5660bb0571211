"""Metadata through a real Redis, as blobs that cards name."""

from collections.abc import Awaitable, Callable

import msgspec
import pytest
from pools import Pool
from redis.asyncio import Redis

from dynamo_llm.transfer import TransferError
from dynamo_llm.transfer.follow import follow_peers, publish
from dynamo_llm.transfer.metadata import agent_name
from kvstore.cards import InstanceCard
from kvstore.registry import Registry


def make_card(instance: str, epoch: int, nixl: str | None) -> InstanceCard:
    return InstanceCard(
        instance=instance,
        epoch=epoch,
        nixl=nixl,
        model="m",
        grpc_address="127.0.0.1:1",
        engine="torch",
        block_size=16,
        kv_blocks=64,
        max_context=1024,
        model_files="",
    )


def knows(pool: Pool, name: str) -> bool:
    """Whether the pool would read from that agent."""
    try:
        pool.transfer.puller.peers.find(name)
    except TransferError:
        return False
    return True


async def test_peers_come_and_go_with_their_leases(
    redis: Redis,
    make_pool: Callable[..., Pool],
    eventually: Callable[..., Awaitable[None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A card's blob makes its instance readable, its end makes it unreadable; a new epoch is another peer."""
    monkeypatch.setattr("dynamo_llm.transfer.follow._GRACE_S", 0.05)
    reader, writer = make_pool(name="r-1"), make_pool(name="w-1")
    registry = Registry(redis)
    name = await publish(registry, writer.transfer)
    async with follow_peers(registry, reader.transfer):
        lease = await registry.register(make_card("w", 1, name))
        await eventually(lambda: knows(reader, "w-1"))
        writer.fill(1)
        _, heard = reader.pull(writer.transfer.exporter.pin("a", [2], 60), [3])
        assert heard.reason() is None
        assert reader.data[3].tobytes() == writer.data[2].tobytes()
        await lease.close()
        await eventually(lambda: not knows(reader, "w-1"))
        again = make_pool(name="w-2")
        async with await registry.register(make_card("w", 2, await publish(registry, again.transfer))):
            await eventually(lambda: knows(reader, "w-2"))
            assert not knows(reader, "w-1")


async def test_who_leaves_in_good_order_can_still_be_read(
    redis: Redis, make_pool: Callable[..., Pool], eventually: Callable[..., Awaitable[None]]
) -> None:
    """It ends what it has under way after it left the registry; and who comes back is no stranger."""
    reader, writer = make_pool(name="r-1"), make_pool(name="w-1")
    registry = Registry(redis)
    card = make_card("w", 1, await publish(registry, writer.transfer))
    seen: list[object] = []
    async with registry.watch(seen.append), follow_peers(registry, reader.transfer):
        lease = await registry.register(card)
        await eventually(lambda: knows(reader, "w-1"))
        await lease.close()
        await eventually(lambda: len(seen) == 2)
        writer.fill(1)
        _, heard = reader.pull(writer.transfer.exporter.pin("a", [2], 60), [3])
        assert heard.reason() is None
        async with await registry.register(card):
            await eventually(lambda: len(seen) == 3)
            assert knows(reader, "w-1")


async def test_bad_blobs_are_skipped_and_late_ones_awaited(
    redis: Redis,
    make_pool: Callable[..., Pool],
    eventually: Callable[..., Awaitable[None]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Garbage is one warning; a blob that is not there yet is asked for again; cards without one are no peers."""
    reader, writer = make_pool(name="r-1"), make_pool(name="w-1")
    registry = Registry(redis)
    garbage = await registry.put_blob(b"garbage")
    late = await registry.put_blob(writer.transfer.metadata)
    await redis.delete(registry.keys.blob(late))
    async with (
        follow_peers(Registry(redis), reader.transfer),
        await registry.register(make_card("bad", 1, garbage)),
        await registry.register(make_card("none", 1, None)),
        await Registry(redis).register(make_card("w", 1, late)),
    ):
        await eventually(lambda: "the blocks of bad-1 cannot be read" in caplog.text)
        await registry.keep_blobs()
        await eventually(lambda: knows(reader, "w-1"))
    assert not knows(reader, "none-1")


def test_an_agent_is_named_by_instance_and_epoch() -> None:
    """So that a card says which agent is meant."""
    card = make_card("0123456789abcdef", 17, None)
    assert agent_name(card.instance, card.epoch) == "0123456789abcdef-17"
    assert msgspec.structs.replace(card, nixl="x").nixl == "x"
