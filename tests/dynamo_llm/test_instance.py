"""An instance from one engine to the next: restarts that fail, loads and ends that are interrupted."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from prometheus_client import generate_latest
from redis.asyncio import Redis
from scripted_engine import ScriptedEngine

from dynamo_llm import instance as module
from dynamo_llm.config import WorkerConfig
from dynamo_llm.engines.base import Engine, EngineError
from dynamo_llm.instance import Instance
from dynamo_llm.transfer import KvTransfer, Layout, TransferError
from dynamo_llm.transfer.metrics import TransferMetrics
from kvstore import wire
from kvstore.cards import InstanceCard, Role
from kvstore.keys import Keys
from kvstore.prefill_queue import PrefillQueue
from kvstore.registry import Registry
from kvstore.tasks import stop
from kvstore.wire import Load


class Slow(ScriptedEngine):
    """Its making and its end wait for a gate each; both are open unless a test shuts them."""

    def __init__(self) -> None:
        super().__init__()
        self.may_come, self.may_end, self.closed = threading.Event(), threading.Event(), threading.Event()
        self.may_come.set()
        self.may_end.set()

    def close(self) -> None:
        self.may_end.wait()
        super().close()
        self.closed.set()


class Running:
    """An instance that is registered and kept. `plan` has what becomes of each engine that is made."""

    def __init__(self, redis: Redis, *plan: Slow | BaseException, role: Role = "agg") -> None:
        self.registry = Registry(redis, Keys("instance"))
        self.said: list[str] = []
        self._plan = list(plan)
        config = WorkerConfig(model_path=".", engine="scripted", role=role)
        self.instance = Instance(config, Path(), "demo", create=self._create, say=self.said.append)
        self.keeper: asyncio.Task[str] | None = None

    async def start(self) -> "Running":
        await self.instance.load()
        await self.instance.begin(self.registry)
        await self.instance.register(_card)
        self.keeper = asyncio.create_task(self.instance.keep())
        return self

    def _create(self, config: WorkerConfig, folder: Path, model: str) -> Engine:
        engine = self._plan.pop(0)
        if isinstance(engine, BaseException):
            raise engine
        engine.may_come.wait()
        return engine


def _card(engine: Engine) -> InstanceCard:
    return InstanceCard(
        instance="",
        namespace="default",
        model="demo",
        grpc_address="127.0.0.1:1",
        engine="scripted",
        block_size=16,
        kv_blocks=64,
        max_context=1024,
        model_files="0" * 64,
        epoch=0,
    )


@pytest.fixture
async def run(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Callable[..., Any]]:
    """`await run(*plan)`: see `Running`."""
    monkeypatch.setattr(module, "_FIRST_PAUSE_S", 0.01)
    started: list[Running] = []

    async def run(*plan: Slow | BaseException, **options: Any) -> Running:
        started.append(Running(redis, *plan, **options))
        return await started[-1].start()

    yield run
    for running in started:
        if running.keeper is not None:
            await stop(running.keeper)
        await running.instance.close()


async def test_a_restart_that_fails_in_any_way_is_tried_again(
    run: Callable[..., Any], eventually: Callable[..., Any]
) -> None:
    """An engine is somebody else's package: it may raise what it likes, and the next attempt may succeed."""
    first, last = Slow(), Slow()
    running = await run(first, TypeError("no such\nargument"), SystemExit(1), last)
    (before,) = await running.registry.instances()
    first.die("it broke")
    await eventually(lambda: len(running.said) == 4)
    (after,) = await running.registry.instances()
    assert after.epoch > before.epoch
    assert running.instance.service.engine is last
    assert not running.keeper.done()
    assert [line.partition(";")[0] for line in running.said] == [
        "it broke",
        "the engine could not start: TypeError: no such argument",
        "the engine could not start: SystemExit: 1",
        f"the engine is back, epoch {after.epoch}",
    ]


async def test_an_end_does_not_wait_for_a_load(run: Callable[..., Any], eventually: Callable[..., Any]) -> None:
    """However often the keeper is cancelled; and the engine that comes later is closed."""
    first, late = Slow(), Slow()
    late.may_come.clear()
    running = await run(first, late)
    first.die("it broke")
    await eventually(lambda: running.instance.loading)
    await asyncio.wait_for(stop(running.keeper), 10)
    await asyncio.wait_for(running.instance.close(), 10)
    assert running.instance.loading
    assert first.closed.is_set()
    late.may_come.set()
    await eventually(late.closed.is_set)


async def test_a_first_load_can_be_left(redis: Redis, eventually: Callable[..., Any]) -> None:
    """As by a signal before the worker is ready."""
    late = Slow()
    late.may_come.clear()
    running = Running(redis, late)
    loading = asyncio.create_task(running.instance.load())
    await eventually(lambda: running.instance.loading)
    await asyncio.wait_for(stop(loading), 10)
    await asyncio.wait_for(running.instance.close(), 10)
    late.may_come.set()
    await eventually(late.closed.is_set)


async def test_a_life_comes_to_its_end_though_its_keeper_is_stopped(
    run: Callable[..., Any], eventually: Callable[..., Any]
) -> None:
    """`close` returns when all of it has ended, also where it was the keeper that began to end it."""
    engine = Slow()
    engine.may_end.clear()
    running = await run(engine, Slow())
    engine.die("it broke")

    async def has_left() -> bool:
        return await running.registry.instances() == []

    await eventually(has_left)
    await asyncio.wait_for(stop(running.keeper), 10)
    closing = asyncio.create_task(running.instance.close())
    await asyncio.sleep(0)
    assert not closing.done()
    engine.may_end.set()
    await closing
    assert engine.closed.is_set()
    assert running.said == []


class Moving(Slow):
    """An engine whose blocks can be moved: a small pool in plain memory."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = np.zeros((4, 1024), dtype=np.float32)
        self.transfer: KvTransfer | None = None

    def open_transfer(self, name: str, metrics: TransferMetrics) -> KvTransfer:
        layout = Layout(
            model="demo",
            dtype="float32",
            layers=1,
            kv_heads=1,
            head_dim=32,
            block_size=16,
            block_bytes=4096,
            blocks=4,
            address=self.pool.ctypes.data,
        )
        self.transfer = KvTransfer(name, layout, lambda request_id, blocks: None, metrics)
        return self.transfer

    def close(self) -> None:
        if self.transfer is not None:
            self.transfer.close()
        super().close()


async def test_prefill_and_decode_find_each_other(redis: Redis, eventually: Callable[..., Any]) -> None:
    """Each opens a transfer and publishes how to read from it; a restart is another agent, under a new epoch."""
    running: list[Running] = []
    plans = {"prefill": [Moving(), Moving()], "decode": [Moving()], "agg": [Moving()]}
    for role, plan in plans.items():
        running.append(Running(redis, *plan))
        config = WorkerConfig(model_path=".", engine="scripted", role=role)
        running[-1].instance = Instance(config, Path(), "demo", create=running[-1]._create)
        await running[-1].start()
    decode = plans["decode"][0].transfer
    assert decode is not None
    assert plans["agg"][0].transfer is None

    def reads(name: str) -> bool:
        try:
            decode.puller.peers.find(name)
        except TransferError:
            return False
        return True

    first = plans["prefill"][0].transfer
    assert first is not None
    await eventually(lambda: reads(first.name))
    plans["prefill"][0].die("it broke")
    await eventually(lambda: plans["prefill"][1].transfer is not None)
    second = plans["prefill"][1].transfer
    assert second is not None
    await eventually(lambda: reads(second.name) and not reads(first.name))
    shown = generate_latest(running[1].instance.metrics.registry).decode()
    assert 'dynamo_llm_worker_kv_pins{model="demo"} 0.0' in shown
    for each in running:
        await stop(each.keeper)
        await each.instance.close()


async def test_a_drain_waits_for_readers(run: Callable[..., Any], eventually: Callable[..., Any]) -> None:
    """It has left the registry by then; its blocks go when they have been read, or their lease is over."""
    engine = Moving()
    running = await run(engine, role="prefill")
    assert engine.transfer is not None
    engine.transfer.exporter.pin("1", [0], 60)
    draining = asyncio.create_task(running.instance.drain(30))

    async def has_left() -> bool:
        return await running.registry.instances() == []

    await eventually(has_left)
    await asyncio.sleep(0.05)
    assert not draining.done()
    engine.transfer.exporter.release("1")
    assert await draining == 0


class Roles(Moving):
    """It can have the roles that a test says, and fails to open a transfer where that says so."""

    def __init__(self, *roles: Role, fails: bool = False) -> None:
        super().__init__()
        self.info = msgspec.structs.replace(self.info, roles=roles)
        self._fails = fails

    def open_transfer(self, name: str, metrics: TransferMetrics) -> KvTransfer:
        if self._fails:
            raise EngineError("no nixl here")
        return super().open_transfer(name, metrics)


def ask_role(running: Running, role: Role) -> wire.Reply:
    payload = wire.encode(wire.ControlBatch("", [wire.SetRole(role)]))
    (reply,) = wire.decode_reply(running.instance.service.control(payload)).replies
    return reply


async def test_a_role_is_taken_by_command(run: Callable[..., Any], eventually: Callable[..., Any]) -> None:
    """The card says so when it can be done: with a transfer, once it takes part, and calls for the queue or none. The
    next engine has the role too."""
    first, second = Roles("agg", "prefill", "decode"), Roles("agg", "prefill", "decode")
    running = await run(first, second)

    async def card() -> InstanceCard:
        return (await running.registry.instances())[0]

    async def has(role: Role) -> bool:
        return (await card()).role == role

    assert first.transfer is None
    for role in ("prefill", "decode", "agg", "prefill"):
        assert ask_role(running, role) == wire.Done()
        await eventually(partial(has, role))
        assert (await card()).prefill_queue == (role == "prefill")
        assert (await card()).nixl is not None
    before = await card()
    first.die("it broke")
    await eventually(lambda: second.transfer is not None)

    async def is_back() -> bool:
        cards = await running.registry.instances()
        return bool(cards) and cards[0].epoch > before.epoch

    await eventually(is_back)
    assert (await card()).role == "prefill"
    assert "has the role decode now" in running.said


async def test_a_role_that_an_engine_cannot_have(run: Callable[..., Any], eventually: Callable[..., Any]) -> None:
    """It is refused at once, or given up where trying shows it; at the start it is the reason not to."""
    running = await run(Roles("agg", "decode", fails=True))
    reply = ask_role(running, "prefill")
    assert isinstance(reply, wire.Refused)
    assert reply.error.message.endswith("cannot have the role prefill, only agg and decode")
    assert ask_role(running, "decode") == wire.Done()
    await eventually(lambda: "stays a worker of the role agg: no nixl here" in running.said)
    (card,) = await running.registry.instances()
    assert card.role == "agg"
    with pytest.raises(EngineError, match="has the role agg, not prefill"):
        await run(Roles("agg"), role="prefill")


class Loaded(Slow):
    """Says what it has to do as a test tells it to."""

    tokens = 0

    def load(self) -> Load:
        return Load(waiting_prefill_tokens=self.tokens)


async def test_a_prefill_worker_calls_when_it_has_room(
    run: Callable[..., Any], redis: Redis, eventually: Callable[..., Any]
) -> None:
    """Its card says that it does; it claims from the queue once a router can send it something, and it has little to
    compute."""
    engine = Loaded()
    running = await run(engine, role="prefill")
    (card,) = await running.registry.instances()
    assert card.prefill_queue
    queue = PrefillQueue(redis, Keys("instance"), model="demo", block_size=16, router="r1", poll_s=0.02)
    async with queue:
        ticket = await queue.draw(10, 60.0)
        await eventually(lambda: queue.depth == 1)
        await asyncio.sleep(0.2)  # nothing shows that it did not call
        assert not ticket.called.done()
        engine.tokens = 10_000
        session = running.instance.service.open_session("r1")
        await asyncio.sleep(0.2)
        assert not ticket.called.done()
        engine.tokens = 0
        assert await ticket.called == running.instance.id
    running.instance.service.end_session(session, "closed")


async def test_other_workers_do_not_call(run: Callable[..., Any], redis: Redis) -> None:
    """The queue is for prefill workers: nobody else makes a group on it."""
    running = await run(Loaded())
    (card,) = await running.registry.instances()
    assert not card.prefill_queue
    assert not await redis.exists(Keys("instance").prefill_queue("demo", 16))
