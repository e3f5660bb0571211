"""The service over a scripted engine: admission, sessions, frames, drain, and what happens when something dies."""

import asyncio
import itertools
from collections.abc import AsyncGenerator, Iterable

import msgspec
import numpy as np
import pytest
from scripted_engine import Events, ScriptedEngine, tokens

from dynamo_llm.engines.base import RequestError, StepResult
from dynamo_llm.metrics import Metrics
from dynamo_llm.public_model import PublicModel
from dynamo_llm.service import Limits, Service, ServiceError
from dynamo_llm.session import Session
from kvstore import wire
from kvstore.wire import (
    SESSION_WINDOW,
    Cancel,
    Close,
    Command,
    ControlBatch,
    Done,
    Drain,
    Frame,
    Load,
    OpenSession,
    Output,
    Refused,
    SamplingParams,
    Snapshot,
    SnapshotReply,
    Stats,
    StatsReply,
    Submit,
)


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Rig:
    """A service over a scripted engine that steps when it is told to, and a clock of its own."""

    def __init__(self, **limits: object) -> None:
        self.engine = ScriptedEngine()
        self.events = Events()
        self.clock = Clock()
        self.service = Service(
            self.engine,
            instance="0" * 16,
            epoch=7,
            events=self.events,
            metrics=Metrics("demo"),
            limits=Limits(frame_heartbeat_s=60.0, **limits),  # type: ignore[arg-type]
            clock=self.clock,
        )
        self.service.start()

    async def open(self, name: str = "router") -> "Reader":
        reader = Reader(self.service, name)
        first = await reader.frame()
        assert first.outputs == []
        assert first.epoch == 7
        return reader

    def control(self, *commands: Command, session: str = "router", frames_read: int | None = None) -> list[wire.Reply]:
        payload = wire.encode(ControlBatch(session, list(commands), frames_read))
        return wire.decode_reply(self.service.control(payload)).replies


class Reader:
    """A router's end of a session."""

    def __init__(self, service: Service, name: str) -> None:
        self._frames: AsyncGenerator[bytes, None] = service.frames(wire.encode(OpenSession(name)))

    async def frame(self) -> Frame:
        return wire.decode_frame(await asyncio.wait_for(self._frames.__anext__(), 5.0))

    async def ended(self) -> bool:
        try:
            await asyncio.wait_for(self._frames.__anext__(), 5.0)
        except StopAsyncIteration:
            return True
        return False

    async def close(self) -> None:
        await self._frames.aclose()


async def settle() -> None:
    """Let the loop do all that it can do now."""
    for _ in range(20):
        await asyncio.sleep(0)


def submit(rid: int, last: int = 10, *, max_tokens: int | None = 3) -> Submit:
    return Submit(rid=rid, token_ids=tokens(1, last), sampling=SamplingParams(max_tokens=max_tokens))


def refusal(reply: wire.Reply) -> str:
    assert isinstance(reply, Refused)
    return reply.error.code


async def test_a_request_streams_one_frame_per_step_with_its_own_rid() -> None:
    """Tokens arrive under the router's rid, with the start first and one finish reason last."""
    rig = Rig()
    reader = await rig.open()
    assert rig.control(submit(42)) == [Done()]
    frames = []
    for _ in range(3):
        rig.engine.step()
        frames.append(await reader.frame())
    outputs = [output for frame in frames for output in frame.outputs]
    assert [output.rid for output in outputs] == [42, 42, 42]
    assert [output.token_ids for output in outputs] == [[11], [12], [13]]
    assert [output.finish_reason for output in outputs] == [None, None, "length"]
    assert [output.started is not None for output in outputs] == [True, False, False]
    assert frames[0].load.kv_blocks_total == 64
    assert rig.service.in_flight == 0


async def test_a_step_gives_each_session_one_frame_with_all_its_outputs() -> None:
    """Requests of two routers that share a step do not see each other, though their rids are the same."""
    rig = Rig()
    one, two = await rig.open("one"), await rig.open("two")
    rig.control(submit(1, 10), submit(2, 20), session="one")
    rig.control(submit(1, 30), session="two")
    rig.engine.step()
    assert [(o.rid, o.token_ids) for o in (await one.frame()).outputs] == [(1, [11]), (2, [21])]
    assert [(o.rid, o.token_ids) for o in (await two.frame()).outputs] == [(1, [31])]


async def test_a_slow_reader_gets_what_it_missed_in_one_frame() -> None:
    """Outputs of several steps are merged: tokens in order, the start kept, the finish reason last."""
    rig = Rig()
    reader = await rig.open()
    rig.control(Submit(rid=1, token_ids=tokens(5), sampling=SamplingParams(max_tokens=50, logprobs=0)))
    for _ in range(50):
        rig.engine.step()
    (output,) = (await reader.frame()).outputs
    assert output.token_ids == list(range(6, 56))
    assert [entry.token_id for entry in output.logprobs or []] == output.token_ids
    assert output.started is not None
    assert output.finish_reason == "length"


async def test_a_router_that_says_how_far_it_read_is_never_more_than_a_window_behind() -> None:
    """Beyond the window outputs wait and merge; a word from the router opens it again."""
    rig = Rig()
    reader = await rig.open()
    rig.control(submit(1, 0, max_tokens=None), frames_read=1)
    for _ in range(SESSION_WINDOW):
        rig.engine.step()
        await reader.frame()
    for _ in range(5):
        rig.engine.step()
    waiting = asyncio.ensure_future(reader.frame())
    await settle()
    assert not waiting.done()
    rig.control(frames_read=SESSION_WINDOW)
    (output,) = (await waiting).outputs
    assert output.token_ids == list(range(SESSION_WINDOW + 1, SESSION_WINDOW + 6))


async def test_many_steps_before_the_reader_runs_wake_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's thread pays for one wake-up per frame, not per output."""
    rig = Rig()
    reader = await rig.open()
    rig.control(*(submit(rid) for rid in range(8)))
    waiting = asyncio.ensure_future(reader.frame())
    await settle()
    loop, calls = asyncio.get_running_loop(), []
    real = loop.call_soon_threadsafe
    monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *args: (calls.append(args), real(*args))[1])
    rig.engine.step()
    rig.engine.step()
    assert len(calls) == 1
    assert len((await waiting).outputs) == 8


async def test_a_cancelled_request_ends_within_a_step() -> None:
    """Its one final output says so; cancelling what is unknown does nothing."""
    rig = Rig()
    reader = await rig.open()
    rig.control(submit(1, max_tokens=None), submit(2, max_tokens=None))
    assert rig.control(Cancel(1), Cancel(99)) == [Done(), Done()]
    rig.engine.step()
    outputs = {output.rid: output for output in (await reader.frame()).outputs}
    assert outputs[1].finish_reason == "cancelled"
    assert outputs[2].finish_reason is None
    assert rig.service.in_flight == 1


async def test_a_prefill_that_has_ended_can_be_cancelled_once() -> None:
    """The engine hears that nobody will fetch its blocks; a rid that handed nothing over means nothing."""
    rig = Rig()
    await rig.open()
    rig.engine.hands_over = {"do_remote_prefill": True}
    rig.control(submit(1, max_tokens=1), submit(2, max_tokens=1))
    rig.engine.step()
    rig.engine.hands_over = None
    rig.control(submit(3, max_tokens=1))
    rig.engine.step()
    assert rig.service.in_flight == 0
    rig.control(Cancel(2), Cancel(2), Cancel(3))
    assert rig.engine.cancelled == [rig.engine.submitted[1].key]


async def test_a_router_that_goes_away_leaves_no_blocks_for_readers() -> None:
    """Nobody can ask for what its prefills have handed over; each is told to the engine once."""
    rig = Rig()
    await rig.open()
    rig.engine.hands_over = {"do_remote_prefill": True}
    rig.control(submit(1, max_tokens=1), submit(2, max_tokens=2))
    rig.engine.step()
    rig.control(Close())
    rig.control(Close())
    assert sorted(rig.engine.cancelled) == [request.key for request in rig.engine.submitted]


async def test_what_was_handed_over_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest are forgotten: their blocks have a lease."""
    monkeypatch.setattr("dynamo_llm.service._MOST_HANDED_OVER", 2)
    rig = Rig()
    await rig.open()
    rig.engine.hands_over = {"do_remote_prefill": True}
    for rid in (1, 2, 3):
        rig.control(submit(rid, max_tokens=1))
        rig.engine.step()
    rig.control(Cancel(1), Cancel(2), Cancel(3))
    assert rig.engine.cancelled == [request.key for request in rig.engine.submitted[1:]]


async def test_outputs_after_the_final_one_are_dropped() -> None:
    """An engine that says too much cannot give a request two ends."""
    rig = Rig()
    reader = await rig.open()
    rig.control(submit(1, max_tokens=1))
    rig.engine.step()
    assert (await reader.frame()).outputs[0].finish_reason == "length"
    rig.service._on_step(StepResult(outputs=[Output(1, [9], "stop")], ops=[], load=Load()))
    rig.control(submit(2))
    rig.engine.step()
    assert [output.rid for output in (await reader.frame()).outputs] == [2]


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (Submit(rid=1, token_ids=b""), "invalid_request"),
        (Submit(rid=1, token_ids=b"\x01\x02\x03"), "invalid_request"),
        (Submit(rid=1, token_ids=tokens(*range(1024))), "context_length_exceeded"),
    ],
)
async def test_a_prompt_that_cannot_be_served_is_refused(command: Submit, code: str) -> None:
    """Nothing of it stays behind."""
    rig = Rig()
    await rig.open()
    (reply,) = rig.control(command)
    assert refusal(reply) == code
    assert rig.service.in_flight == 0


async def test_a_rid_in_flight_cannot_be_used_again() -> None:
    """Two requests under one name could not be told apart; after the first one's end the name is free."""
    rig = Rig()
    await rig.open()
    first, second = rig.control(submit(1, max_tokens=1), submit(1))
    assert first == Done()
    assert refusal(second) == "invalid_request"
    rig.engine.step()
    assert rig.control(submit(1)) == [Done()]


async def test_admission_is_bounded() -> None:
    """More than `max_inflight` requests are refused with a retryable code."""
    rig = Rig(max_inflight=2)
    await rig.open()
    codes = [reply if isinstance(reply, Done) else refusal(reply) for reply in rig.control(*map(submit, range(3)))]
    assert codes == [Done(), Done(), "overloaded"]


async def test_sessions_are_bounded() -> None:
    """A new name beyond the limit is refused before its first frame."""
    rig = Rig(max_sessions=1)
    await rig.open("one")
    with pytest.raises(ServiceError, match="overloaded"):
        await rig.open("two")


async def test_a_submit_without_a_session_is_refused() -> None:
    """The router has to open one first."""
    assert refusal(Rig().control(submit(1))[0]) == "no_session"


@pytest.mark.parametrize("payload", [b"", b"\xff\xff", b"\x81\xa1a\x01", wire.encode({"session": 1}), b"x" * 2000])
async def test_a_payload_that_is_no_batch_gets_one_clear_refusal(payload: bytes) -> None:
    """Garbage, foreign documents and oversized ones are answered in the wire's own form."""
    rig = Rig(max_payload_bytes=1024)
    (reply,) = wire.decode_reply(rig.service.control(payload)).replies
    assert refusal(reply) == "invalid_request"


@pytest.mark.parametrize("payload", [b"\xc1", b"", wire.encode(OpenSession("")), wire.encode(OpenSession("x" * 300))])
async def test_a_session_cannot_be_opened_by_garbage(payload: bytes) -> None:
    """The error comes before any frame."""
    with pytest.raises(ServiceError, match="invalid_request"):
        await Rig().service.frames(payload).__anext__()


async def test_wrong_sampling_values_are_refused_at_the_boundary() -> None:
    """The wire's bounds hold: a temperature below 0 never reaches the engine."""
    rig = Rig()
    await rig.open()
    command = {"type": "submit", "rid": 1, "token_ids": tokens(1), "sampling": {"temperature": -1.0}}
    payload = msgspec.msgpack.encode({"session": "router", "commands": [command]})
    (reply,) = wire.decode_reply(rig.service.control(payload)).replies
    assert refusal(reply) == "invalid_request"
    assert "temperature" in reply.error.message  # type: ignore[union-attr]


async def test_an_engine_that_throws_something_else_fails_that_request_only() -> None:
    """A bug at its boundary does not take the batch, or leak the request."""
    rig = Rig()
    await rig.open()
    rig.engine.refuse = KeyError("oops")
    assert refusal(rig.control(submit(1))[0]) == "engine_failure"
    rig.engine.refuse = RequestError("overloaded", "full")
    assert refusal(rig.control(submit(1))[0]) == "overloaded"
    assert rig.service.in_flight == 0


async def test_a_second_session_of_the_same_name_replaces_the_first() -> None:
    """The older one's requests are cancelled, and its last frame says why."""
    rig = Rig()
    older = await rig.open()
    rig.control(submit(1))
    newer = await rig.open()
    assert (await older.frame()).end == "replaced"
    assert await older.ended()
    assert set(rig.engine.cancelled) == {1}
    rig.control(submit(1, 50))
    rig.engine.step()
    assert [(o.rid, o.token_ids) for o in (await newer.frame()).outputs] == [(1, [51])]


async def test_a_session_closes_by_command() -> None:
    """What it had in flight is cancelled."""
    rig = Rig()
    reader = await rig.open()
    rig.control(submit(1))
    assert rig.control(Close()) == [Done()]
    assert (await reader.frame()).end == "closed"
    assert set(rig.engine.cancelled) == {1}
    assert rig.service.sessions == 0


async def test_a_reader_that_goes_away_takes_its_requests_along() -> None:
    """A closed generator cancels what was in flight."""
    rig = Rig()
    reader = await rig.open()
    rig.control(submit(1), submit(2))
    await reader.close()
    assert set(rig.engine.cancelled) == {1, 2}
    assert rig.service.sessions == 0
    assert rig.service.streams == 0


async def test_a_silent_router_expires_and_one_that_pings_does_not() -> None:
    """Any control batch is a sign of life, an empty one too."""
    rig = Rig(session_timeout_s=5.0)
    rig.service.limits = msgspec.structs.replace(rig.service.limits, frame_heartbeat_s=0.01)
    reader = await rig.open()
    rig.control(submit(1, max_tokens=None))
    rig.clock.now_s += 4.0
    rig.control()
    rig.clock.now_s += 4.0
    assert (await reader.frame()).end is None
    rig.clock.now_s += 4.0
    while (frame := await reader.frame()).end is None:
        pass
    assert frame.end == "expired"
    assert await reader.ended()
    assert set(rig.engine.cancelled) == {1}


async def test_an_idle_session_hears_of_the_load() -> None:
    """Without outputs a frame comes each heartbeat."""
    rig = Rig()
    rig.service.limits = msgspec.structs.replace(rig.service.limits, frame_heartbeat_s=0.01)
    reader = await rig.open()
    frame = await reader.frame()
    assert frame.outputs == []
    assert frame.load.kv_blocks_total == 64


async def test_reports_say_how_many_steps_they_cover() -> None:
    """A reply from before a step can be told from that step's frame, whichever arrives first; idle ones count on."""
    rig = Rig()
    reader = await rig.open()
    rig.control(submit(1, max_tokens=2))
    (before,) = rig.control(Stats())
    rig.engine.step()
    assert isinstance(before, StatsReply)
    assert (before.load.steps, (await reader.frame()).load.steps) == (0, 1)
    rig.engine.step()
    (idle,) = rig.control(Stats())
    assert isinstance(idle, StatsReply)
    assert (idle.load.running, idle.load.steps) == (0, 2)


async def test_a_drain_refuses_new_work_and_lets_the_old_end() -> None:
    """Submits and sessions are refused as `draining`; the request in flight gets its final output, then the end."""
    rig = Rig()
    changes = []
    rig.service.on_change = lambda: changes.append(rig.service.draining)
    reader = await rig.open()
    rig.control(submit(1, max_tokens=2))
    assert rig.control(Drain(), Drain()) == [Done(), Done()]
    assert changes == [True]
    assert refusal(rig.control(submit(2))[0]) == "draining"
    with pytest.raises(ServiceError, match="draining"):
        await rig.open("other")
    rig.engine.step()
    rig.engine.step()
    rig.service.end_sessions("drained")
    frame = await reader.frame()
    assert frame.outputs[0].finish_reason == "length"
    assert frame.end == "drained"
    assert await reader.ended()


@pytest.mark.parametrize("end", ["last token", "death"])
async def test_a_drain_waits_for_final_outputs_on_their_way(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request is in flight until its session has its final output; ending the sessions before would drop it."""
    rig = Rig()
    reader = await rig.open()
    rig.control(submit(1, max_tokens=1))
    rig.service.drain()
    put, seen = Session.put, []

    def observed_put(session: Session, outputs: Iterable[Output]) -> None:
        seen.append(rig.service.in_flight)
        put(session, outputs)

    monkeypatch.setattr(Session, "put", observed_put)
    if end == "death":
        rig.engine.die("out of memory")
    else:
        rig.engine.step()
    assert seen == [1]
    assert rig.service.in_flight == 0
    assert (await reader.frame()).outputs[0].finish_reason is not None


async def test_a_dead_engine_fails_everything_at_once() -> None:
    """Each request gets its one final output with a retryable error, sessions end, and health is gone."""
    rig = Rig()
    reader = await rig.open()
    rig.control(submit(1), submit(2))
    rig.engine.step()
    rig.engine.die("out of memory")
    outputs: dict[int, list[Output]] = {}
    while True:
        frame = await reader.frame()
        for output in frame.outputs:
            outputs.setdefault(output.rid, []).append(output)
        if frame.end is not None:
            break
    assert frame.end == "engine_failure"
    for rid in (1, 2):
        last = outputs[rid][-1]
        assert last.finish_reason == "error"
        assert last.error is not None
        assert last.error.code == "engine_failure"
        assert "out of memory" in last.error.message
    assert not rig.service.healthy
    assert rig.service.in_flight == 0
    assert refusal(rig.control(submit(3))[0]) == "engine_failure"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "either text_input or input_ids"),
        ({"input_ids": np.array([], np.int32)}, "the prompt is empty"),
        ({"input_ids": np.ones(1024, np.int32)}, "context_length_exceeded"),
    ],
)
async def test_what_the_public_model_refuses_is_counted(tensors: dict[str, object], message: str) -> None:
    """Whoever finds the fault, its parser, the service or the engine: one request refused, by the error's code."""
    rig = Rig()
    with pytest.raises(ServiceError, match=message) as caught:
        await PublicModel(rig.service, None).generate(tensors, {}).__anext__()
    assert rig.service.metrics.refusals == {caught.value.error.code: 1}
    rig.service.drain()
    with pytest.raises(ServiceError, match="draining"):
        await PublicModel(rig.service, None).generate({"input_ids": np.ones(1, np.int32)}, {}).__anext__()
    assert rig.service.metrics.refusals["draining"] == 1


async def test_stats_and_snapshot_are_answered_without_a_session() -> None:
    """Tools may ask, too."""
    rig = Rig()
    stats, snapshot = rig.control(Stats(), Snapshot(), session="")
    assert isinstance(stats, StatsReply)
    assert (stats.instance, stats.epoch, stats.draining) == ("0" * 16, 7, False)
    assert isinstance(snapshot, SnapshotReply)
    assert snapshot.seq == 3


async def test_kv_events_are_published_once_in_the_order_of_the_steps() -> None:
    """The service hands over what the engine stored, before the tokens go out."""
    rig = Rig()
    await rig.open()
    for rid in range(3):
        rig.control(submit(rid))
        rig.engine.step()
    assert [op.hashes for op in rig.events.ops] == [[1], [2], [3]]  # type: ignore[union-attr]


async def test_hundred_requests_from_another_thread_all_end_exactly_once() -> None:
    """The engine's thread and the loop race for a while; every request has one final output and all its tokens."""
    engine = ScriptedEngine(step_s=0.0005)
    service = Service(engine, instance="0" * 16, epoch=7, events=Events(), metrics=Metrics("demo"))
    service.start()
    reader = Reader(service, "router")
    await reader.frame()
    batch = ControlBatch("router", [submit(rid, rid, max_tokens=20) for rid in range(100)])
    service.control(wire.encode(batch))
    got: dict[int, list[int]] = {rid: [] for rid in range(100)}
    finals = []
    while len(finals) < 100:
        for output in (await reader.frame()).outputs:
            got[output.rid] += output.token_ids
            if output.finish_reason is not None:
                finals.append(output.rid)
    engine.close()
    assert sorted(finals) == list(range(100))
    assert all(got[rid] == list(itertools.islice(itertools.count(rid + 1), 20)) for rid in got)
