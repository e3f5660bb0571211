"""The router's connection to a worker against a real worker: what each may rely on of the other (design contract 5)."""

import asyncio
from array import array
from collections.abc import Callable
from typing import Any

import pytest
from fleet import Fleet, generation_over
from inbox import Inbox
from observer import Observer, block_until
from scripted_engine import tokens
from wire_router import Router
from worker_process import FATAL_TOKEN

from kvstore import wire
from kvstore.cards import InstanceCard
from kvstore.mirror import IndexMirror
from kvstore.residency import Residency, unpack
from kvstore.wire import SamplingParams
from router.types import Delta, GenerationRequest
from router.worker_client import WorkerConnection, next_rid
from router.worker_session import WorkerLost

Eventually = Callable[..., Any]


def submit(
    connection: WorkerConnection, last: int, max_tokens: int | None, *, wait: bool = False, sink: Inbox | None = None
) -> tuple[int, Inbox]:
    """Ask for the tokens that follow `last`; None: without end; `wait`: the engine is not to begin."""
    rid, inbox = next_rid(), sink or Inbox()
    sampling = SamplingParams(max_tokens=max_tokens, extra={"wait": True} if wait else {})
    connection.submit(wire.Submit(rid=rid, token_ids=tokens(1, last), sampling=sampling), inbox)
    return rid, inbox


def request(last: int, max_tokens: int | None) -> GenerationRequest:
    prompt = tokens(*[1] * 40, last)
    sampling = SamplingParams(max_tokens=max_tokens)
    return GenerationRequest(model="demo", token_ids=prompt, sampling=sampling, request_id=f"after-{last}")


async def serves(connection: WorkerConnection, eventually: Eventually) -> bool:
    """Whether a request that comes now gets its answer."""
    _, inbox = submit(connection, 10, 3)
    await eventually(lambda: inbox.endings)
    return (inbox.token_ids, inbox.endings) == ([11, 12, 13], ["length"])


# --- requests -------------------------------------------------------------------------------------------------------


async def test_tokens_arrive_in_order_and_once(connection: WorkerConnection, eventually: Eventually) -> None:
    """From the first, which says how the prompt fared, to the last, which alone says why it is the last."""
    _, inbox = submit(connection, 100, 60)
    await eventually(lambda: inbox.endings)
    assert inbox.token_ids == list(range(101, 161))
    assert [output.started is not None for output in inbox.outputs] == [True] + [False] * (len(inbox.outputs) - 1)
    assert [output.finish_reason for output in inbox.outputs[:-1]] == [None] * (len(inbox.outputs) - 1)
    assert inbox.endings == ["length"]
    assert connection.inflight == 0


async def test_many_at_once_share_calls(
    connection: WorkerConnection, observer: Observer, eventually: Eventually
) -> None:
    """Hundreds of requests go out in a handful of control calls, and each gets its own tokens."""
    before = observer.control_calls()
    inboxes = {last: submit(connection, last, 20)[1] for last in range(100, 30100, 100)}
    await eventually(lambda: all(inbox.endings for inbox in inboxes.values()))
    calls = observer.control_calls() - before
    assert {last: inbox.token_ids for last, inbox in inboxes.items()} == {
        last: list(range(last + 1, last + 21)) for last in inboxes
    }
    assert all(inbox.endings == ["length"] for inbox in inboxes.values())
    assert calls <= len(inboxes) // 10


async def test_two_routers_do_not_meet(rig: Any, worker: InstanceCard, eventually: Eventually) -> None:
    """Sessions of two names use the same rids at the same time, and each gets its own outputs only."""
    one, other = await rig.connect(worker, "one"), await rig.connect(worker, "other")
    inboxes = {}
    for connection, last in ((one, 1000), (other, 5000)):
        for rid in range(1, 21):
            inboxes[last + 100 * rid] = inbox = Inbox()
            prompt = tokens(1, last + 100 * rid)
            connection.submit(wire.Submit(rid=rid, token_ids=prompt, sampling=SamplingParams(max_tokens=30)), inbox)
    await eventually(lambda: all(inbox.endings for inbox in inboxes.values()))
    assert {last: inbox.token_ids for last, inbox in inboxes.items()} == {
        last: list(range(last + 1, last + 31)) for last in inboxes
    }
    assert all(inbox.endings == ["length"] for inbox in inboxes.values())


@pytest.mark.parametrize(
    ("prompt", "code"),
    [
        (tokens(*[5] * 2000), "context_length_exceeded"),
        (b"", "invalid_request"),
        (b"\1\0\0", "invalid_request"),
    ],
    ids=["over-long", "empty", "no whole tokens"],
)
async def test_a_refusal_is_told_once(
    connection: WorkerConnection, eventually: Eventually, prompt: bytes, code: str
) -> None:
    """To the request that it concerns, while the good ones beside it in the same batch go on."""
    refused = Inbox()
    _, before = submit(connection, 20, 10)
    connection.submit(wire.Submit(rid=next_rid(), token_ids=prompt), refused)
    _, after = submit(connection, 30, 10)
    await eventually(lambda: refused.endings and before.endings and after.endings)
    assert refused.endings == [code]
    assert refused.outputs == []
    assert (before.token_ids, after.token_ids) == (list(range(21, 31)), list(range(31, 41)))
    assert connection.inflight == 0


async def test_the_routing_layer_over_a_real_worker(rig: Any, worker: InstanceCard) -> None:
    """Many requests through `Generation`: each the tokens asked for, as deltas and as a whole."""
    fleet = Fleet()
    fleet.connections = [await rig.connect(worker, "generation", fleet.on_change)]
    generation = generation_over(fleet)
    streamed: dict[int, array[int]] = {last: array("I") for last in range(100, 2100, 100)}

    async def generate(last: int) -> list[int]:
        def on_delta(delta: Delta) -> None:
            streamed[last].extend(delta.token_ids)

        return (await generation.generate(request(last, 40), on_delta)).token_ids

    results = await asyncio.gather(*map(generate, streamed))
    expected = [list(range(last + 1, last + 41)) for last in streamed]
    assert results == expected
    assert [list(part) for part in streamed.values()] == expected
    assert generation.inflight == 0


# --- cancelling -----------------------------------------------------------------------------------------------------


async def test_cancel_before_the_first_output(
    connection: WorkerConnection, observer: Observer, eventually: Eventually
) -> None:
    """Be it on its way to the worker or waiting there: the engine has it no longer, and its sink is left alone."""
    waiting, one = submit(connection, 10, None, wait=True)
    await eventually(lambda: observer.load().waiting == 1)
    underway, two = submit(connection, 10, None)
    connection.release(underway)
    connection.release(waiting)
    assert connection.inflight == 0
    await eventually(lambda: observer.idle)
    assert await serves(connection, eventually)
    assert (one.endings, two.endings, one.outputs, two.outputs) == ([], [], [], [])


async def test_cancel_in_the_middle(connection: WorkerConnection, observer: Observer, eventually: Eventually) -> None:
    """The engine stops, and nothing more arrives for the request."""
    rid, inbox = submit(connection, 10, None)
    await eventually(lambda: len(inbox.token_ids) >= 5)
    connection.release(rid)
    got = list(inbox.token_ids)
    await eventually(lambda: observer.idle)
    assert await serves(connection, eventually)
    assert inbox.token_ids == got == list(range(11, 11 + len(got)))
    assert inbox.endings == []


async def test_cancel_after_the_end(connection: WorkerConnection, observer: Observer, eventually: Eventually) -> None:
    """Harmless, for the connection as for a worker that is told to cancel what it does not know."""
    rid, inbox = submit(connection, 10, 3)
    await eventually(lambda: inbox.endings)
    connection.release(rid)
    assert observer.ask(wire.Cancel(rid)) == wire.Done()
    assert await serves(connection, eventually)
    assert inbox.endings == ["length"]


async def test_a_client_that_goes_away_frees_the_engine(
    rig: Any, worker: InstanceCard, observer: Observer, eventually: Eventually
) -> None:
    """Cancelling the router's `generate` reaches the engine."""
    fleet = Fleet()
    fleet.connections = [await rig.connect(worker, "goes-away", fleet.on_change)]
    deltas: list[Delta] = []
    generating = asyncio.create_task(generation_over(fleet).generate(request(100, None), deltas.append))
    await eventually(lambda: deltas)
    assert not observer.idle
    generating.cancel()
    with pytest.raises(asyncio.CancelledError):
        await generating
    await eventually(lambda: observer.idle)


# --- sessions -------------------------------------------------------------------------------------------------------


async def test_a_session_of_the_same_name_replaces_the_first(
    rig: Any, worker: InstanceCard, observer: Observer, eventually: Eventually
) -> None:
    """The first one's requests are cancelled and told of it once; its router opens another and goes on."""
    connection = await rig.connect(worker, "same")
    _, inbox = submit(connection, 10, None)
    await eventually(lambda: inbox.outputs)
    usurper = Router(worker.grpc_address, "same")
    await usurper.open()
    await usurper.frame()
    await eventually(lambda: inbox.lost)
    assert inbox.lost == ["the worker ended the session: replaced"]
    assert await usurper.read_to_end() == "replaced"
    await usurper.channel.close()
    await eventually(lambda: connection.ready and observer.idle)
    assert await serves(connection, eventually)
    assert inbox.endings == inbox.lost


class Freezing(Inbox):
    """On its first output it keeps the router from doing anything else until a condition holds."""

    def __init__(self, until: Callable[[], bool]) -> None:
        super().__init__()
        self._until = until

    def on_output(self, output: wire.Output) -> None:
        if not self.outputs:
            block_until(self._until)
        super().on_output(output)


async def test_a_slow_reader_gets_fuller_frames(
    connection: WorkerConnection, observer: Observer, eventually: Eventually
) -> None:
    """A router that reads nothing gets no more than the window of frames; the rest waits for it in one, and none is
    lost."""
    _, inbox = submit(connection, 10, 450, sink=Freezing(lambda: observer.idle))
    await eventually(lambda: inbox.endings)
    assert inbox.token_ids == list(range(11, 461))
    assert inbox.endings == ["length"]
    assert len(inbox.outputs) <= wire.SESSION_WINDOW + 2
    assert len(inbox.outputs[-1].token_ids) > 100


async def test_a_router_without_pings_expires(
    connection: WorkerConnection, observer: Observer, eventually: Eventually
) -> None:
    """The engine is relieved of its requests, and a router that comes to itself again learns of it and goes on."""
    _, running = submit(connection, 10, None, sink=Freezing(lambda: observer.idle))
    _, waiting = submit(connection, 10, None, wait=True)
    await eventually(lambda: running.lost and waiting.lost)
    assert running.endings == waiting.endings == ["the worker ended the session: expired"]
    assert running.token_ids == list(range(11, 11 + len(running.token_ids)))
    await eventually(lambda: connection.ready)
    assert await serves(connection, eventually)


# --- loads and blocks -----------------------------------------------------------------------------------------------


async def test_load_figures_arrive(connection: WorkerConnection, eventually: Eventually) -> None:
    """With the frames while something runs, with the pings when nothing does."""

    def told() -> tuple[int, int, int] | None:
        report = connection.load.report
        return (report.running, report.waiting, report.kv_blocks_total) if report is not None else None

    class Noting(Inbox):
        def on_output(self, output: wire.Output) -> None:
            super().on_output(output)
            notes.append(told())

    notes: list[tuple[int, int, int] | None] = []
    rids = [submit(connection, 10, None, wait=True)[0], submit(connection, 10, None, sink=Noting())[0]]
    await eventually(lambda: notes)
    assert notes[0] == (1, 1, 64)
    for rid in rids:
        connection.release(rid)
    await eventually(lambda: told() == (0, 0, 64))


async def test_a_snapshot_is_what_was_published(
    rig: Any, connection: WorkerConnection, worker: InstanceCard, eventually: Eventually
) -> None:
    """The blocks that a worker names on request are those of its event stream; with the stream gone, a router's index
    gets there by the snapshot alone."""
    inboxes = [submit(connection, 10, 5)[1] for _ in range(10)]
    await eventually(lambda: all(inbox.endings for inbox in inboxes))
    redis, keys = rig.registry.redis, rig.registry.keys
    stream = {"model": worker.model, "block_size": worker.block_size}

    async def fetch(instance: str) -> wire.SnapshotReply | None:
        return await connection.snapshot() if instance == worker.instance else None

    reply = await connection.snapshot()
    assert (reply.instance, reply.epoch) == (worker.instance, worker.epoch)
    held = Residency()
    for tier, hashes in unpack(reply.tiers):
        held.store(hashes.tolist(), tier)
    assert held.digest().count >= len(inboxes)
    async with IndexMirror(redis, keys, fetch_snapshot=fetch, **stream) as mirror:
        await eventually(lambda: mirror.digest(worker.instance) == held.digest())
        assert mirror.stats().resyncs == 0
    await redis.delete(keys.events(**stream), keys.index(**stream))
    async with IndexMirror(redis, keys, fetch_snapshot=fetch, **stream) as mirror:
        await eventually(lambda: mirror.digest(worker.instance) == held.digest())
        assert mirror.stats().resyncs == 1


# --- the end of a worker --------------------------------------------------------------------------------------------


async def test_drain(rig: Any, eventually: Eventually) -> None:
    """What is in flight goes on to its end, what is new is refused, then the session ends `drained`, and the worker is
    not ready any more."""
    card, process = await rig.expendable()
    observer, connection = rig.observe(card), await rig.connect(card, "drained")
    onlooker = Router(card.grpc_address, "onlooker")
    await onlooker.open()
    await onlooker.frame()
    last_rid, last = submit(connection, 10, None, wait=True)
    _, inflight = submit(connection, 100, 50)
    await eventually(lambda: observer.load().waiting == 1)
    assert observer.ask(wire.Drain()) == wire.Done()
    _, refused = submit(connection, 10, 5)
    await eventually(lambda: refused.endings and inflight.endings)
    assert refused.endings == ["draining"]
    assert (inflight.token_ids, inflight.endings) == (list(range(101, 151)), ["length"])
    assert connection.connected
    assert not connection.ready
    connection.release(last_rid)
    assert await onlooker.read_to_end() == "drained"
    await onlooker.channel.close()
    await eventually(lambda: not connection.connected)
    await rig.left_triton(card, process)
    assert not connection.ready
    with pytest.raises(WorkerLost):
        submit(connection, 10, 5)
    assert last.endings == []


async def test_a_dead_engine_is_told_once_to_each(
    rig: Any, worker: InstanceCard, connection: WorkerConnection, eventually: Eventually
) -> None:
    """Every request in flight has one ending; one of the router's own `generate` goes on elsewhere, token for token.

    The instance comes back with another engine under a later epoch, and the router's connection finds it.
    """
    card, _ = await rig.expendable()
    fleet = Fleet()
    doomed = await rig.connect(card, "doomed", fleet.on_change)
    fleet.connections, fleet.holder = [doomed, connection], doomed.instance
    deltas: list[Delta] = []
    generating = asyncio.create_task(generation_over(fleet).generate(request(1000, 300), deltas.append))
    await eventually(lambda: len(deltas) > 5)
    inboxes = [submit(doomed, 10 * number, None, wait=number % 2 == 0)[1] for number in range(1, 11)]
    await eventually(lambda: all(inbox.outputs for inbox in inboxes[::2]))
    inboxes.append(submit(doomed, FATAL_TOKEN, 5)[1])
    await eventually(lambda: all(inbox.endings for inbox in inboxes))
    result = await asyncio.wait_for(generating, 20)
    assert result.token_ids == list(range(1001, 1301))
    assert result.token_ids == [token for delta in deltas for token in delta.token_ids]
    assert (result.placed.instance, result.placed.reason) == (worker.instance, "migration")
    assert [len(inbox.endings) for inbox in inboxes] == [1] * len(inboxes)
    assert {output.error.code for inbox in inboxes for output in inbox.outputs if output.error} <= {"engine_failure"}

    await eventually(lambda: doomed.ready)  # another engine has followed, on the same server
    again = submit(doomed, 10, 5)[1]
    await eventually(lambda: again.endings)
    assert [token for output in again.outputs for token in output.token_ids] == [11, 12, 13, 14, 15]
    now = {other.instance: other.epoch for other in await rig.registry.instances()}
    assert now[card.instance] > card.epoch
