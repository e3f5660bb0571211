"""The pool over a real registry: instances that come, go, return and change, and what is left of them."""

import asyncio
import time

import pytest
from scripted_worker import FILES, TOKENIZER, ScriptedWorker, says, silent

from kvstore.watch import Added, Removed
from kvstore.wire import Output, SamplingParams
from router import errors
from router.models import LINGER_S
from router.types import GenerationRequest
from router.worker_session import WorkerSession

OTHER_FILES = {**FILES, "chat_template.jinja": b"changed"}


def request() -> GenerationRequest:
    return GenerationRequest(
        model="demo", token_ids=TOKENIZER.encode("hello"), sampling=SamplingParams(max_tokens=9), request_id="r1"
    )


def tasks_named(*parts: str) -> list[str]:
    """Names of the running tasks that have one of these parts."""
    names = [task.get_name() for task in asyncio.all_tasks()]
    return [name for name in names if any(part in name for part in parts)]


async def test_changed_files_take_effect(cluster, eventually, caplog) -> None:
    """An instance of another chat template waits until those of the old one have gone, and then its template counts."""
    old = await cluster.worker(says("ok"))
    router = await cluster.router()
    new = await cluster.worker(says("ok"), files=OTHER_FILES)
    await eventually(lambda: "tokenizer or chat template differs" in caplog.text)
    assert (await router.generation.generate(request())).placed.instance == old.instance
    await old.lease.close()
    await eventually(lambda: [c.instance for c in router.pool.connections() if c.ready] == [new.instance])
    assert router.models.get("demo").chat_template.render([]) == "changed"


async def test_an_instance_that_returns_late(cluster, eventually) -> None:
    """A lease that lapses for longer than its model is kept, while a request is in flight, can come back."""
    worker = await cluster.worker(silent)
    router = await cluster.router()
    task = asyncio.create_task(router.generation.generate(request()))
    await eventually(lambda: worker.submits)
    card = router.models.get("demo").cards[0]
    await worker.lease.close()
    await eventually(lambda: not router.models.names())
    router.models._clock = lambda: time.monotonic() + LINGER_S + 1.0
    with pytest.raises(errors.ModelNotFound):
        await router.generation.generate(request())
    async with await cluster.registry.register(card):
        await eventually(lambda: router.models.names() == ["demo"])
        worker.script = says("ok")
        assert (await router.generation.generate(request())).text == "ok"
        worker.emit(Output(worker.submits[0].rid, [5], "length"))
        await task


async def test_an_instance_that_returns_while_it_is_let_go(cluster, eventually) -> None:
    """One that stood still for longer than its lease comes back while its connection is being closed."""
    worker = await cluster.worker(says("ok"))
    router = await cluster.router()
    card, listed = router.models.get("demo").cards[0], router.pool._instances
    worker.hold_control = asyncio.Event()
    await worker.lease.close()
    await eventually(lambda: not router.pool.connections())
    assert not listed[worker.instance].listed
    async with await cluster.registry.register(card):
        await eventually(lambda: listed[worker.instance].listed)
        worker.hold_control.set()
        await cluster.connected(router, 1)
        assert (await router.generation.generate(request())).text == "ok"


async def test_a_model_without_instances_is_given_up(cluster, eventually, monkeypatch) -> None:
    """Some time after its last instance the model is forgotten and its index closed; a new instance opens both."""
    monkeypatch.setattr("router.pool.LINGER_S", 0.05)
    worker = await cluster.worker(says("ok"))
    router = await cluster.router()
    assert tasks_named("index mirror")
    await worker.lease.close()
    await eventually(lambda: router.models.find("demo") is None and not tasks_named("index mirror", "index snapshots"))
    assert router.pool.index_figures() == {}
    await cluster.worker(says("ok"))
    await cluster.connected(router, 1)
    assert (await router.generation.generate(request())).text == "ok"


async def test_a_worker_that_restarts_keeps_its_index(cluster, eventually, monkeypatch) -> None:
    """An index is not closed under an instance that came after the last one had gone."""
    monkeypatch.setattr("router.pool.LINGER_S", 3600.0)
    first = await cluster.worker(says("ok"))
    router = await cluster.router()
    index = router.pool.mirror(router.models.get("demo"))
    await first.lease.close()
    await eventually(lambda: ("demo", 16) in router.pool._expiries)
    await cluster.worker(says("ok"))
    await cluster.connected(router, 1)
    router.pool._expiries[("demo", 16)].cancel()
    router.pool._expire(("demo", 16))
    assert router.pool.mirror(router.models.get("demo")) is index is not None


async def test_relisted_while_its_files_are_read(cluster, eventually, monkeypatch) -> None:
    """An instance that left and returned meanwhile, and has no usable files, is tried again at the usual pace."""
    router = await cluster.router()
    asked, answer = 0, asyncio.Event()

    async def no_blob(name: str) -> None:
        nonlocal asked
        asked += 1
        await answer.wait()

    monkeypatch.setattr(router.pool._registry, "get_blob", no_blob)
    card = ScriptedWorker("f" * 16).card()
    router.pool._on_change(Added(card))
    await eventually(lambda: asked)
    router.pool._on_change(Removed(card))
    router.pool._on_change(Added(card))
    answer.set()
    for _ in range(200):
        await asyncio.sleep(0)
    assert asked <= 2


async def test_closing_while_the_worker_does_not_answer(cluster, eventually, monkeypatch) -> None:
    """The router waits until its streams are at their end or given up; no task outlives it."""
    monkeypatch.setattr("router.worker_session.PING_S", 0.4)
    monkeypatch.setattr("router.worker_session.LINGER_S", 1.0)
    worker = await cluster.worker(silent)
    router = await cluster.router()
    batches = len(worker.batches)
    worker.hold_control = asyncio.Event()
    await eventually(lambda: len(worker.batches) > batches)
    retired: list[str] = []
    whole = WorkerSession.retire

    async def retire(session: WorkerSession) -> None:
        retired.append("begun")
        await whole(session)
        retired.append("ended")

    monkeypatch.setattr(WorkerSession, "retire", retire)
    await router.__aexit__(None, None, None)
    worker.hold_control.set()
    assert tasks_named("session of", "frames of", "control of", f"instance {worker.instance}") == []
    assert retired == ["begun", "ended"]
