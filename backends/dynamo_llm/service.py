"""Puts an engine at the service of routers: admission, requests in flight, sessions, drain. It knows nothing of Triton.

A host (`hosts/`) carries the bytes: `control` answers one call of `M.control`, `frames` is one stream of `M.session`,
and the public model `M` (`public_model.py`) submits through a session of its own. `instance.py` makes the `Service`,
and gives it another engine when one has died: hosts keep the same service for good.

Threads: hosts call in from several event loops, the engine calls back on a thread of its own. One lock guards the
tables and is held for dictionary work only, never while the engine or a session is called. Every accepted request
gets exactly one final output: `_finish` takes it out of the table, and what comes for a key that is not in the table
is dropped.
"""

import contextlib
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from typing import Protocol

import msgspec
from msgspec import Struct

from dynamo_llm.engines.base import Engine, EngineRequest, RequestError, StepResult
from dynamo_llm.metrics import Metrics
from dynamo_llm.session import Session
from kvstore import wire
from kvstore.cards import KvOp
from kvstore.wire import ControlBatch, ControlReply, ErrorCode, Load, Output, Refused, SnapshotReply, Submit, WireError

_MOST_HANDED_OVER = 4096
"""Per session. Nobody says which of them have been fetched, so the oldest give way: their blocks have a lease."""


class ServiceError(Exception):
    """A call that is not carried out. `code` is one of the wire's; the message is one line for the caller."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.error = WireError(code, message)


class Events(Protocol):
    """Where KV events go and residency is known: `kvstore.events.EventPublisher`. Thread-safe; never blocks."""

    def publish(self, ops: list[KvOp]) -> None: ...

    def snapshot(self) -> SnapshotReply: ...


class Limits(Struct, frozen=True, kw_only=True):
    """Bounds of a service; `WorkerConfig` says what they are for."""

    max_inflight: int = 1024
    max_payload_bytes: int = 32 << 20
    session_timeout_s: float = 5.0
    frame_heartbeat_s: float = 1.0
    """A session without outputs gets a frame with the load this often."""
    max_sessions: int = 256


class InFlight:
    """One accepted request, until its final output."""

    __slots__ = ("first_s", "generated_tokens", "last_s", "prompt_tokens", "received_s", "rid", "session")

    def __init__(self, session: Session, rid: int, prompt_tokens: int, received_s: float) -> None:
        self.session = session
        self.rid = rid
        self.prompt_tokens = prompt_tokens
        self.generated_tokens = 0
        self.received_s = received_s
        self.first_s = 0.0
        self.last_s = 0.0
        """When its first and its last tokens came; 0 before."""


class Service:
    """See the module's docstring."""

    def __init__(
        self,
        engine: Engine,
        *,
        instance: str,
        epoch: int,
        events: Events,
        metrics: Metrics,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.engine = engine
        self.instance = instance
        self.epoch = epoch
        self.metrics = metrics
        self.limits = limits or Limits()
        self.failure: str | None = None
        """Why the engine died; None while one lives. Until then everything is answered with `engine_failure`."""
        self.draining = False
        self.on_change: Callable[[], None] = lambda: None
        """Called, on any thread, after a drain began or the engine died. Set before `start`."""
        self._events = events
        self._clock = clock
        self._lock = threading.Lock()
        self._inflight: dict[int, InFlight] = {}
        self._handing_over = False
        """Whether the engine's thread holds outputs that are in neither `_inflight` nor their session."""
        self._next_key = 1
        self._sessions: dict[str, Session] = {}
        self._local: set[Session] = set()
        self._load = Load()
        self.streams = 0
        """Session streams that a host is reading, ended ones included until their last frame is out."""

    # --- what hosts call ---------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Let the engine step."""
        self.engine.start(self._on_step, self._on_death)

    def restart(self, engine: Engine, *, epoch: int, events: Events) -> None:
        """Go on with another engine after the last one died, under an epoch of its own."""
        with self._lock:
            self.engine, self.epoch, self._events = engine, epoch, events
            self.failure = None
        self.start()

    def control(self, payload: bytes) -> bytes:
        """Carry out one `ControlBatch` and encode its `ControlReply`. What is no batch gets a single `Refused`."""
        if len(payload) > self.limits.max_payload_bytes:
            text = f"a control batch of {len(payload)} bytes is over the limit of {self.limits.max_payload_bytes}"
            return wire.encode(ControlReply([_refused("invalid_request", text)]))
        try:
            batch = wire.decode_batch(payload)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            text = f"the payload is no ControlBatch: {error}"
            return wire.encode(ControlReply([_refused("invalid_request", text)]))
        return wire.encode(self.carry_out(batch))

    def carry_out(self, batch: ControlBatch) -> ControlReply:
        session = self._sessions.get(batch.session)
        if session is not None:
            session.ack(batch.frames_read)
        return ControlReply([self._command(command, batch.session) for command in batch.commands])

    async def frames(self, payload: bytes) -> AsyncGenerator[bytes, None]:
        """The frames of the session that `payload` (an `OpenSession`) opens. Raises `ServiceError` before the first."""
        try:
            name = wire.decode_open(payload).session
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ServiceError("invalid_request", f"the payload is no OpenSession: {error}") from None
        session = self.open_session(name)
        self.streams += 1
        try:
            async with aclosing(session.frames(self.epoch, self.load, self.limits.frame_heartbeat_s)) as frames:
                async for frame in frames:
                    self.metrics.frames += 1
                    yield frame
        finally:
            self.streams -= 1
            self.end_session(session, "closed")

    def open_session(self, name: str) -> Session:
        """A session for a router, on the running loop. One of the same name is ended with `replaced`."""
        if not name or len(name) > 256:
            raise ServiceError("invalid_request", "a session's name is 1 to 256 characters long")
        session = Session(name, clock=self._clock, timeout_s=self.limits.session_timeout_s)
        with self._lock:
            self._refuse_if_leaving()
            older = self._sessions.get(name)
            if older is None and len(self._sessions) >= self.limits.max_sessions:
                raise ServiceError("overloaded", f"{len(self._sessions)} sessions are open already")
            self._sessions[name] = session
        if older is not None:
            self.end_session(older, "replaced")
        return session

    def local_session(self) -> Session:
        """A session for a reader in this process: no name, no signs of life. To be ended with `end_session`."""
        session = Session("", clock=self._clock, timeout_s=None)
        with self._lock:
            self._refuse_if_leaving()
            self._local.add(session)
        return session

    def end_session(self, session: Session, reason: str) -> None:
        """Cancel what the session has in flight, or has left for a reader, and let its reader finish. May be called
        twice."""
        with self._lock:
            if self._sessions.get(session.name) is session:
                del self._sessions[session.name]
            self._local.discard(session)
            keys = [*session.keys.values(), *session.handed_over.values()]
            session.handed_over.clear()
        session.end(reason)
        for key in keys:
            self.engine.cancel(key)

    def submit(self, session: Session, command: Submit) -> None:
        """Accept a request, or raise `ServiceError`. Once accepted, exactly one final output follows in the session."""
        request = EngineRequest(
            key=self._admit(session, command),
            token_ids=command.token_ids,
            sampling=command.sampling,
            generated=command.generated,
            lora=command.lora,
            cache_salt=command.cache_salt,
            priority=command.priority,
            kv_transfer_params=command.kv_transfer_params,
        )
        engine = self.engine
        try:
            engine.submit(request)
        except RequestError as error:
            self._take_back(request.key, error.to_wire())
        except Exception as error:  # noqa: BLE001 - the engine's boundary: a bug in it must not leak the request
            self._take_back(
                request.key, WireError("engine_failure", f"the engine could not take the request: {error!r}")
            )
        if session.ended:  # it ended after we were admitted, when its other requests were cancelled
            engine.cancel(request.key)

    def cancel(self, session: Session, rid: int) -> None:
        """End a request within a step; of one that has handed over, nobody will fetch the blocks. Unknown rids are
        ignored."""
        with self._lock:
            key = session.keys.get(rid) or session.handed_over.pop(rid, None)
        if key is not None:
            self.engine.cancel(key)

    def load(self) -> Load:
        """The load after the last step."""
        return self._load if self._inflight or self.failure is not None else self._load_now()

    def _load_now(self) -> Load:
        """With what was queued since the last step."""
        steps = self._load.steps  # before the engine is asked: what it says may be newer than that, never older
        return msgspec.structs.replace(self.engine.load(), steps=steps)

    # --- what the worker calls ---------------------------------------------------------------------------------------

    @property
    def healthy(self) -> bool:
        return self.failure is None and not self.draining

    @property
    def in_flight(self) -> int:
        """0 only when every final output has reached its session: then the sessions may end."""
        with self._lock:
            return len(self._inflight) or int(self._handing_over)

    @property
    def sessions(self) -> int:
        return len(self._sessions)

    def drain(self) -> None:
        """Refuse new requests and sessions from now on; what is in flight goes on."""
        with self._lock:
            began, self.draining = not self.draining, True
        if began:
            self.on_change()

    def cancel_all(self) -> None:
        with self._lock:
            keys = list(self._inflight)
        for key in keys:
            self.engine.cancel(key)

    def end_sessions(self, reason: str, *, local: bool = True) -> None:
        """Those of routers and, with `local`, those of readers in this process."""
        with self._lock:
            sessions = [*self._sessions.values(), *(self._local if local else ())]
        for session in sessions:
            self.end_session(session, reason)

    @contextlib.contextmanager
    def counting_refusals(self) -> Iterator[None]:
        """A `ServiceError` on the way out is one request refused."""
        try:
            yield
        except ServiceError as error:
            with self._lock:
                self.metrics.refused(error.error.code)
            raise

    # --- commands ----------------------------------------------------------------------------------------------------

    def _command(self, command: wire.Command, name: str) -> wire.Reply:
        session = self._sessions.get(name)
        try:
            match command:
                case Submit():
                    with self.counting_refusals():
                        self.submit(self._session(name), command)
                case wire.Cancel(rid):
                    if session is not None:
                        self.cancel(session, rid)
                case wire.Stats():
                    self._refuse_if_dead()
                    return wire.StatsReply(self.instance, self.epoch, self._load_now(), self.draining)
                case wire.Snapshot():
                    self._refuse_if_dead()
                    return self._events.snapshot()
                case wire.Drain():
                    self.drain()
                case wire.Close():
                    if session is not None:
                        self.end_session(session, "closed")
        except ServiceError as error:
            return Refused(error.error)
        return wire.Done()

    def _session(self, name: str) -> Session:
        with self._lock:
            self._refuse_if_leaving()
        session = self._sessions.get(name)
        if session is None:
            raise ServiceError("no_session", f"no session {name!r} is open on this worker")
        return session

    def _admit(self, session: Session, command: Submit) -> int:
        """Enter a request into the tables and name it for the engine, or raise `ServiceError`."""
        if not command.token_ids or len(command.token_ids) % 4:
            raise ServiceError("invalid_request", "token_ids must be little-endian uint32, at least one token")
        if command.generated >= len(command.token_ids) // 4:
            raise ServiceError("invalid_request", "generated must be less than the number of token_ids")
        with self._lock:
            self._refuse_if_leaving()
            if session.ended:
                raise ServiceError("no_session", "the session has ended")
            if command.rid in session.keys:
                raise ServiceError("invalid_request", f"request {command.rid} of this session is in flight already")
            if len(self._inflight) >= self.limits.max_inflight:
                raise ServiceError("overloaded", f"{len(self._inflight)} requests are in flight, as many as allowed")
            key, self._next_key = self._next_key, self._next_key + 1
            session.keys[command.rid] = key
            self._inflight[key] = InFlight(session, command.rid, len(command.token_ids) // 4, self._clock())
        return key

    def _take_back(self, key: int, error: WireError) -> None:
        """Refuse a request after all, unless the engine died meanwhile and its final output is on the way."""
        with self._lock:
            entry = self._finish(key)
        if entry is not None:
            raise ServiceError(error.code, error.message)

    def _refuse_if_dead(self) -> None:
        if self.failure is not None:
            raise ServiceError("engine_failure", self.failure)

    def _refuse_if_leaving(self) -> None:
        self._refuse_if_dead()
        if self.draining:
            raise ServiceError("draining", "this worker is about to stop")

    def _finish(self, key: int) -> InFlight | None:
        """Take a request out of the tables; None where it was not in them. The lock is held."""
        entry = self._inflight.pop(key, None)
        if entry is not None:
            entry.session.keys.pop(entry.rid, None)
        return entry

    # --- what the engine calls, on its thread ------------------------------------------------------------------------

    def _on_step(self, step: StepResult) -> None:
        if step.ops:
            self._events.publish(step.ops)
        now_s = self._clock()
        by_session: dict[Session, list[Output]] = {}
        with self._lock:
            self._load = msgspec.structs.replace(step.load, steps=self._load.steps + 1)
            for output in step.outputs:
                final = output.finish_reason is not None
                entry = self._finish(output.rid) if final else self._inflight.get(output.rid)
                if entry is not None:
                    self.metrics.output(output, entry, now_s)
                    if final and output.kv_transfer_params is not None:
                        _keep(entry.session.handed_over, entry.rid, output.rid)
                    output.rid = entry.rid
                    by_session.setdefault(entry.session, []).append(output)
            self.metrics.stepped(step)
            self._handing_over = True
        for session, outputs in by_session.items():
            session.put(outputs)
        self._handing_over = False

    def _on_death(self, reason: str) -> None:
        error = WireError("engine_failure", reason)
        with self._lock:
            self.failure = reason
            self._load = Load(steps=self._load.steps)
            entries = [entry for key in list(self._inflight) if (entry := self._finish(key)) is not None]
            self.metrics.finish_reasons["error"] += len(entries)
            self._handing_over = True
        for entry in entries:
            entry.session.put([Output(entry.rid, [], "error", error=error)])
        self.end_sessions("engine_failure")
        self._handing_over = False
        self.on_change()


def _keep(handed_over: dict[int, int], rid: int, key: int) -> None:
    handed_over[rid] = key
    if len(handed_over) > _MOST_HANDED_OVER:
        del handed_over[next(iter(handed_over))]


def _refused(code: ErrorCode, message: str) -> Refused:
    return Refused(WireError(code, message))
