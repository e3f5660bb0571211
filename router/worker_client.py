"""One worker as the router uses it: always one session (`worker_session.py`), opened anew when it is lost.

`pool.Pool` holds a `WorkerConnection` per instance. Requests hand in a `Sink`, and each frame's outputs are given to
their sinks synchronously: no task, queue or future per token.
"""

import asyncio
import itertools
import logging
import random
import time
from collections.abc import Callable
from typing import Any

import grpc

from kvstore import wire
from kvstore.cards import InstanceCard
from kvstore.tasks import spawn, stop
from router.config import PlacementSettings
from router.loads import WorkerLoad
from router.predicted_cache import PredictedCache
from router.worker_session import Sink, WorkerLost, WorkerSession, one_line

logger = logging.getLogger(__name__)

_BACKOFF_S = (0.1, 5.0)

next_rid = itertools.count(1).__next__
"""Request ids, unique within this process (and so within each of its sessions)."""


class WorkerConnection:
    """Keeps one session open, and reopens it with back-off when it is lost. Use as an async context manager."""

    def __init__(
        self,
        card: InstanceCard,
        session_name: str,
        connect_timeout_s: float,
        control_timeout_s: float,
        on_change: Callable[[], None] = lambda: None,
        predicted_ttl_s: float = PlacementSettings().predicted_ttl_s,
    ) -> None:
        """`on_change` is called whenever `ready` may have changed."""
        self.card = card
        self.instance = card.instance
        self.load = WorkerLoad(card.block_size)
        self.predicted = None if card.kv_events else PredictedCache(card.kv_blocks, predicted_ttl_s)
        """Of an engine that announces no blocks."""
        self.sessions = 0
        """Opened so far: what was sent while the number was another one went with its session."""
        self.last_error = "not connected yet"
        self.paused = False
        """Set by the owner: it is to take no new requests, while those in flight go on."""
        self._on_change = on_change
        self._idle = asyncio.Event()
        self._idle.set()
        self._session_name = session_name
        self._timeouts_s = (connect_timeout_s, control_timeout_s)
        self._session: WorkerSession | None = None
        self._draining = False
        self._closing = False
        self._task: asyncio.Task[None] | None = None
        self._lingering: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> "WorkerConnection":
        self._task = spawn(f"worker {self.instance}", self._keep_open())
        return self

    async def __aexit__(self, *_: object) -> None:
        """Ends the session by a command, where the worker still listens, and closes the channel."""
        self._closing = True
        try:
            if self._session is not None:
                await self._session.end()
        finally:  # an impatient owner cancels the good manners, never the closing
            try:
                await stop(self._task)
            finally:
                self._lose("the router is closing")
                await asyncio.gather(*self._lingering, return_exceptions=True)

    @property
    def connected(self) -> bool:
        """A session is open."""
        return self._session is not None

    @property
    def ready(self) -> bool:
        """It takes new requests."""
        return self._session is not None and not (self._draining or self._closing or self.paused)

    @property
    def inflight(self) -> int:
        """Requests of this router that have not had their last output."""
        return len(self._session.inflight) if self._session else 0

    def submit(self, command: wire.Submit, sink: Sink) -> None:
        """Send a request. Raises `WorkerLost` when no session is open; later losses go to the sink."""
        if self._session is None:
            raise WorkerLost(self.last_error)
        self._session.inflight[command.rid] = sink
        self._idle.clear()
        self._session.send(command)

    def release(self, rid: int) -> None:
        """No more output of this request is wanted: cancels it on the worker unless it has ended."""
        if self._session is not None and self._session.inflight.pop(rid, None) is not None:
            self._session.send(wire.Cancel(rid))
            self._note_idle()

    def withdraw(self, rid: int) -> None:
        """A request has ended, but nobody will fetch what it left: the worker is told to let go of its KV blocks."""
        if self._session is not None:
            self._session.send(wire.Cancel(rid))

    def first_token(self, rid: int) -> None:
        """A request's prompt has been computed there."""
        hashes = self.load.first_token(rid)
        if self.predicted is not None:
            self.predicted.hold(hashes, time.monotonic())

    async def wait_idle(self) -> None:
        """Wait until no request of this router is in flight there."""
        await self._idle.wait()

    def _note_idle(self) -> None:
        if self._session is None or not self._session.inflight:
            self._idle.set()

    async def snapshot(self) -> wire.SnapshotReply:
        """All block hashes the worker holds. Raises `WorkerLost`."""
        if self._session is None:
            raise WorkerLost(self.last_error)
        reply = await self._session.ask(wire.Snapshot())
        if not isinstance(reply, wire.SnapshotReply):
            raise WorkerLost(f"no snapshot but {reply!r}")
        return reply

    async def _keep_open(self) -> None:
        low_s, high_s = _BACKOFF_S
        wait_s = low_s
        while not self._closing:
            began_s = time.monotonic()
            try:
                await self._one_session()
            except (grpc.RpcError, asyncio.InvalidStateError, WorkerLost) as error:
                self.last_error = one_line(error)
                logger.debug("instance %s: %s", self.instance, self.last_error)
            except Exception as error:  # the boundary of one session: the next one may fare better
                logger.exception("instance %s: a session failed", self.instance)
                self._lose(one_line(error))
                self.last_error = one_line(error)
            if time.monotonic() - began_s > 2 * high_s:
                wait_s = low_s
            await asyncio.sleep(wait_s * random.uniform(0.5, 1.0))
            wait_s = min(2 * wait_s, high_s)

    async def _one_session(self) -> None:
        """From its opening to its loss. Raises what `WorkerSession.open` raises."""
        session = WorkerSession(self.card, self._session_name, self._timeouts_s, self)
        try:
            await session.open()
            self._session, self._draining = session, False
            self.sessions += 1
            self._on_change()
            logger.info("instance %s at %s: session open", self.instance, self.card.grpc_address)
            self._lose(await session.run())
        finally:
            self._retire(session)

    def _retire(self, session: WorkerSession) -> None:
        task = spawn(f"end of a session of {self.instance}", session.retire())
        self._lingering.add(task)
        task.add_done_callback(self._lingering.discard)

    def _lose(self, reason: str) -> None:
        session, self._session = self._session, None
        self._on_change()
        if session is None:
            return
        self.last_error = reason
        if not self._closing:
            logger.warning("instance %s: session lost: %s", self.instance, reason)
        sinks = list(session.inflight.values())
        session.inflight.clear()
        self._idle.set()
        self.load.clear()
        if self.predicted is not None:
            self.predicted.clear()
        for sink in sinks:
            _guarded(sink, sink.on_lost, reason)

    # --- called by the session ---

    def on_frame(self, frame: wire.Frame, inflight: dict[int, Sink]) -> None:
        """Give each output to its request. Outputs of requests that were released meanwhile are dropped."""
        self.load.on_report(frame.load, time.monotonic())
        for output in frame.outputs:
            sink = inflight.get(output.rid)
            if sink is not None:
                if output.finish_reason is not None:
                    del inflight[output.rid]
                    self._note_idle()
                _guarded(sink, sink.on_output, output)

    def on_answer(self, command: wire.Command, reply: wire.Reply, inflight: dict[int, Sink]) -> None:
        """One command was carried out or refused."""
        if isinstance(reply, wire.StatsReply):
            self.load.on_report(reply.load, time.monotonic())
            self._set_draining(reply.draining)
        elif isinstance(command, wire.Submit):
            if not isinstance(reply, wire.Refused):
                self.load.accepted(command.rid)
                return
            if reply.error.code == "draining":
                self._set_draining(True)
            sink = inflight.pop(command.rid, None)
            self._note_idle()
            if sink is not None:
                _guarded(sink, sink.on_refused, reply.error)
            if reply.error.code == "no_session":
                raise WorkerLost("the worker has let the session expire")

    def _set_draining(self, draining: bool) -> None:
        if draining != self._draining:
            self._draining = draining
            self._on_change()


def _guarded(sink: Sink, callback: Callable[[Any], None], argument: Any) -> None:
    """A request's handler that fails must not take the other requests of its frame with it."""
    try:
        callback(argument)
    except Exception:  # the boundary of one request
        logger.exception("a request's handler failed")
        sink.on_failed("the router failed on an output")
