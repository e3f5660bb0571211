"""A worker connection against a real gRPC server: coalescing, losses, and what is told to whom."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
from inbox import Inbox
from scripted_worker import Refusal, ScriptedWorker, says, silent

from kvstore import wire
from router.worker_client import WorkerConnection, next_rid
from router.worker_session import WorkerLost, WorkerSession


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as opened:
        yield opened


@pytest.fixture
async def worker(stack) -> ScriptedWorker:
    made = await ScriptedWorker("a" * 16).start()
    stack.push_async_callback(made.close)
    return made


@pytest.fixture
async def connection(worker, stack, eventually) -> WorkerConnection:
    made = await stack.enter_async_context(WorkerConnection(worker.card(), "router-1", 2.0, 2.0))
    await eventually(lambda: made.ready)
    return made


def submit(connection: WorkerConnection, prompt: bytes = b"\1\0\0\0") -> tuple[int, Inbox]:
    rid, inbox = next_rid(), Inbox()
    connection.submit(wire.Submit(rid=rid, token_ids=prompt), inbox)
    return rid, inbox


async def test_outputs_come_to_their_request(worker, connection, eventually) -> None:
    """Each request gets its own outputs, in order, until the last."""
    worker.script = says("hello world", per_frame=2)
    inboxes = [submit(connection)[1] for _ in range(3)]
    await eventually(lambda: all(i.outputs and i.outputs[-1].finish_reason for i in inboxes))
    assert len({tuple(i.token_ids) for i in inboxes}) == 1
    assert connection.inflight == 0


async def test_commands_coalesce_while_a_call_is_in_flight(worker, connection, eventually) -> None:
    """What is submitted during one control call goes out in the next one, together."""
    worker.hold_control = asyncio.Event()
    before = len(worker.batches)
    submit(connection)
    await eventually(lambda: len(worker.batches) == before + 1)
    for _ in range(50):
        submit(connection)
    worker.hold_control.set()
    await eventually(lambda: len(worker.submits) == 51)
    sizes = [len(batch.commands) for batch in worker.batches[before:] if isinstance(batch.commands[0], wire.Submit)]
    assert sizes == [1, 50]


async def test_batches_have_a_size(worker, connection, eventually, monkeypatch) -> None:
    """Prompts beyond the bound of a message go out in several batches, and all arrive."""
    monkeypatch.setattr("router.worker_session.MAX_BATCH_BYTES", 1000)
    for _ in range(10):
        submit(connection, b"\1\0\0\0" * 100)
    await eventually(lambda: len(worker.submits) == 10)
    assert max(len(batch.commands) for batch in worker.batches) == 2


async def test_pings_keep_the_session(worker, connection, eventually) -> None:
    """An idle session asks for the load, which counts as a sign of life, and learns it."""
    worker.load = wire.Load(running=7, kv_blocks_used=3)
    await eventually(lambda: connection.load.report is not None and connection.load.report.running == 7)
    assert worker.batches[-1].session == "router-1"
    assert worker.batches[-1].frames_read == 1


async def test_refused(worker, connection, eventually) -> None:
    """A refusal is told to its request only."""

    def script(worker: ScriptedWorker, command: wire.Submit) -> None:
        if command.priority:
            raise Refusal(wire.WireError("overloaded", "full"))

    worker.script = script
    _, kept = submit(connection)
    refused = Inbox()
    connection.submit(wire.Submit(rid=next_rid(), token_ids=b"\1\0\0\0", priority=1), refused)
    await eventually(lambda: refused.refused)
    assert refused.refused == [wire.WireError("overloaded", "full")]
    assert kept.refused == []
    assert connection.inflight == 1


async def test_release_cancels_on_the_worker(worker, connection, eventually) -> None:
    """A released request is cancelled by a command, and what still comes for it is dropped."""
    rid, inbox = submit(connection)
    await eventually(lambda: worker.submits)
    connection.release(rid)
    connection.release(rid)
    await eventually(lambda: worker.cancels == [rid])
    worker.emit(wire.Output(rid, [1], "cancelled"))
    _, other = submit(connection)
    worker.emit(wire.Output(rid + 1, [2], "stop"))
    await eventually(lambda: other.outputs)
    assert inbox.outputs == []


async def test_a_dead_worker_is_told_to_everybody(worker, connection, eventually) -> None:
    """When the server dies, each request in flight hears it once, and nothing can be submitted."""
    inboxes = [submit(connection)[1] for _ in range(5)]
    await eventually(lambda: len(worker.submits) == 5)
    await worker.kill()
    await eventually(lambda: all(len(i.lost) == 1 for i in inboxes))
    assert not connection.ready
    with pytest.raises(WorkerLost):
        submit(connection)


async def test_it_comes_back(worker, connection, eventually) -> None:
    """After a session ended, a new one of the same name is opened."""
    _, inbox = submit(connection)
    await eventually(lambda: worker.submits)
    worker.end_session("engine_failure")
    await eventually(lambda: len(worker.sessions) == 2 and connection.ready)
    assert inbox.lost == ["the worker ended the session: engine_failure"]
    assert set(worker.sessions) == {"router-1"}


async def test_an_unreadable_frame_ends_the_session_in_good_order(worker, connection, eventually) -> None:
    """A frame that does not decode is told to all requests; the stream is read on to its end instead of being reset."""
    _, inbox = submit(connection)
    await eventually(lambda: worker.submits)
    frames = worker._frames
    worker.emit_raw(b"\xc1 not msgpack")
    await eventually(lambda: inbox.lost)
    assert "cannot be read" in inbox.lost[0]
    worker._frames = frames  # the first session's again: it goes on for a moment
    worker.emit(wire.Output(worker.submits[0].rid, [1], "stop"))
    worker.end_session("expired")
    await eventually(lambda: frames.empty())
    assert inbox.outputs == []


async def test_a_silent_control_is_a_loss(worker, stack, eventually) -> None:
    """A worker that answers no control call within the timeout is given up."""
    connection = await stack.enter_async_context(WorkerConnection(worker.card(), "router-2", 2.0, 0.3))
    await eventually(lambda: connection.ready)
    worker.hold_control = asyncio.Event()
    _, inbox = submit(connection)
    await eventually(lambda: inbox.lost)
    assert "DEADLINE_EXCEEDED" in inbox.lost[0]
    worker.hold_control.set()
    worker.end_session("expired")


async def test_no_server(stack, eventually) -> None:
    """Without a server the connection keeps trying, says why it is not there, and closes at once."""
    worker = await ScriptedWorker("b" * 16).start()
    await worker.kill()
    async with WorkerConnection(worker.card(), "router-3", 0.5, 0.5) as connection:
        await eventually(lambda: "UNAVAILABLE" in connection.last_error)
        with pytest.raises(WorkerLost):
            await connection.snapshot()
    assert tasks_of(worker) == []


def tasks_of(worker: ScriptedWorker) -> list[str]:
    """Names of the tasks that serve a worker."""
    return [task.get_name() for task in asyncio.all_tasks() if worker.instance in task.get_name()]


async def test_an_impatient_owner(worker, connection, eventually, monkeypatch) -> None:
    """A connection whose closing is cancelled, while the worker does not answer, leaves no task and no stream."""
    monkeypatch.setattr("router.worker_session.LINGER_S", 0.2)
    worker.hold_control = asyncio.Event()
    _, inbox = submit(connection)
    closing = asyncio.create_task(connection.__aexit__())
    await eventually(lambda: not connection.ready)
    closing.cancel()
    await asyncio.gather(closing, return_exceptions=True)
    assert tasks_of(worker) == []
    assert inbox.lost == ["the router is closing"]
    worker.hold_control.set()


async def test_an_unforeseen_error_does_not_end_reconnection(worker, stack, eventually, monkeypatch, caplog) -> None:
    """Whatever a session raises is logged, and another one is opened."""
    whole = WorkerSession.open
    calls: list[WorkerSession] = []

    async def fails_once(session: WorkerSession) -> None:
        calls.append(session)
        if len(calls) == 1:
            raise RuntimeError("unforeseen")
        await whole(session)

    monkeypatch.setattr(WorkerSession, "open", fails_once)
    connection = await stack.enter_async_context(WorkerConnection(worker.card(), "router-6", 2.0, 2.0))
    await eventually(lambda: connection.ready)
    assert "unforeseen" in caplog.text


async def test_a_batch_that_ends_the_session_answers_its_waiters(worker, connection, eventually) -> None:
    """A snapshot asked for behind a command that finds the session gone gets its answer."""

    def script(worker: ScriptedWorker, command: wire.Submit) -> None:
        raise Refusal(wire.WireError("no_session", "expired"))

    worker.script = script
    snapshot = asyncio.create_task(connection.snapshot())  # runs before the control caller wakes
    _, inbox = submit(connection)
    assert (await asyncio.wait_for(snapshot, 5)).instance == worker.instance
    assert len(inbox.refused) == 1
    assert [type(c) for c in worker.batches[-1].commands] == [wire.Submit, wire.Snapshot]
    worker.end_session("expired")


async def test_snapshot(worker, connection) -> None:
    """The worker's resident blocks, for the index."""
    assert (await connection.snapshot()).instance == worker.instance


async def test_leaving_closes_the_session_by_a_command(worker, eventually) -> None:
    """A connection that closes says so, and the stream ends from the worker's side."""
    async with WorkerConnection(worker.card(), "router-4", 2.0, 2.0) as connection:
        await eventually(lambda: connection.ready)
        _, inbox = submit(connection)
    assert any(isinstance(c, wire.Close) for batch in worker.batches for c in batch.commands)
    assert len(inbox.lost) == 1


async def test_a_failing_handler_harms_nobody_else(worker, connection, eventually, caplog) -> None:
    """An exception in one request's handler ends that request; the other outputs of the frame arrive."""

    class Broken(Inbox):
        def on_output(self, output: wire.Output) -> None:
            raise RuntimeError("broken handler")

    rid = next_rid()
    broken = Broken()
    connection.submit(wire.Submit(rid=rid, token_ids=b"\1\0\0\0"), broken)
    other_rid, other = submit(connection)
    worker.script = silent
    await eventually(lambda: len(worker.submits) == 2)
    worker.emit(wire.Output(rid, [1]), wire.Output(other_rid, [2], "stop"))
    await eventually(lambda: other.outputs)
    assert "broken handler" in caplog.text
    assert (broken.failed, broken.lost) == (["the router failed on an output"], [])
    connection.release(rid)


async def test_draining_worker_takes_nothing_new(worker, connection, eventually) -> None:
    """A refusal because of a drain takes the worker out of placement, while its session goes on."""

    def script(worker: ScriptedWorker, command: wire.Submit) -> None:
        raise Refusal(wire.WireError("draining", "going away"))

    worker.script = script
    _, inbox = submit(connection)
    await eventually(lambda: inbox.refused)
    assert connection.connected
    assert not connection.ready
