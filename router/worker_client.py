"""One worker as the router uses it: a session stream that brings frames, and a control caller (design contract 5).

`pool.Pool` holds a `WorkerConnection` per instance. Requests hand in a `Sink`, and each frame's outputs are given to
their sinks synchronously: no task, queue or future per token. The stream is never reset, because a reset around a
response can hurt a Triton server; a session ends by a command, from the worker's side, or by expiry when pings stop.
"""

import asyncio
import contextlib
import itertools
import logging
import random
import time
from collections.abc import Callable
from typing import Any, Protocol

import grpc
import msgspec
from tritonclient.grpc import service_pb2, service_pb2_grpc

from kvstore import wire
from kvstore.cards import InstanceCard
from kvstore.tasks import stop
from router.loads import WorkerLoad

logger = logging.getLogger(__name__)

PING_S = 1.0
"""A session without commands for 5 s expires on the worker."""
LINGER_S = 7.0
"""How long a given-up session's stream is read to its end before the channel is closed all the same."""
MAX_MESSAGE_BYTES = 64 * 2**20
MAX_BATCH_BYTES = 16 * 2**20
_BACKOFF_S = (0.1, 5.0)

next_rid = itertools.count(1).__next__
"""Request ids, unique within this process (and so within each of its sessions)."""


class Sink(Protocol):
    """Where a request's outputs go. All methods are called on the event loop and must not block."""

    def on_output(self, output: wire.Output) -> None:
        """What a frame brought. The one with a finish reason is the last call."""

    def on_refused(self, error: wire.WireError) -> None:
        """The worker did not take the request. The last call."""

    def on_lost(self, reason: str) -> None:
        """The worker or the session is gone. The last call."""


class WorkerLost(Exception):
    """The connection is (or was just) given up; the message says why."""


class WorkerConnection:
    """Keeps one session open, and reopens it with back-off when it is lost. Use as an async context manager."""

    def __init__(
        self,
        card: InstanceCard,
        session: str,
        connect_timeout_s: float,
        control_timeout_s: float,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_change` is called whenever `ready` may have changed."""
        self.card = card
        self.instance = card.instance
        self.load = WorkerLoad(card.block_size)
        self.last_error = "not connected yet"
        self.paused = False
        """Set by the owner: it is to take no new requests, while those in flight go on."""
        self._on_change = on_change
        self._idle = asyncio.Event()
        self._idle.set()
        self._session = session
        self._timeouts_s = (connect_timeout_s, control_timeout_s)
        self._link: _Link | None = None
        self._draining = False
        self._closing = False
        self._task: asyncio.Task[None] | None = None
        self._lingering: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> "WorkerConnection":
        self._task = asyncio.create_task(self._keep_open(), name=f"worker {self.instance}")
        return self

    async def __aexit__(self, *_: object) -> None:
        """Ends the session by a command, where the worker still listens, and closes the channel."""
        self._closing = True
        if self._link is not None:
            await self._link.end()
        await stop(self._task)
        self._lose("the router is closing")
        await asyncio.gather(*self._lingering, return_exceptions=True)

    @property
    def connected(self) -> bool:
        """A session is open."""
        return self._link is not None

    @property
    def ready(self) -> bool:
        """It takes new requests."""
        return self._link is not None and not (self._draining or self._closing or self.paused)

    @property
    def inflight(self) -> int:
        """Requests of this router that have not had their last output."""
        return len(self._link.inflight) if self._link else 0

    def submit(self, command: wire.Submit, sink: Sink) -> None:
        """Send a request. Raises `WorkerLost` when no session is open; later losses go to the sink."""
        if self._link is None:
            raise WorkerLost(self.last_error)
        self._link.inflight[command.rid] = sink
        self._idle.clear()
        self._link.send(command)

    def release(self, rid: int) -> None:
        """No more output of this request is wanted: cancels it on the worker unless it has ended."""
        if self._link is not None and self._link.inflight.pop(rid, None) is not None:
            self._link.send(wire.Cancel(rid))
            self._note_idle()

    async def wait_idle(self) -> None:
        """Wait until no request of this router is in flight there."""
        await self._idle.wait()

    def _note_idle(self) -> None:
        if self._link is None or not self._link.inflight:
            self._idle.set()

    async def snapshot(self) -> wire.SnapshotReply:
        """All block hashes the worker holds. Raises `WorkerLost`."""
        if self._link is None:
            raise WorkerLost(self.last_error)
        reply = await self._link.ask(wire.Snapshot())
        if not isinstance(reply, wire.SnapshotReply):
            raise WorkerLost(f"no snapshot but {reply!r}")
        return reply

    async def _keep_open(self) -> None:
        low_s, high_s = _BACKOFF_S
        wait_s = low_s
        while not self._closing:
            link = _Link(self.card, self._session, self._timeouts_s, self)
            try:
                await link.open()
            except (grpc.RpcError, asyncio.InvalidStateError, WorkerLost) as error:
                self.last_error = _one_line(error)
                logger.debug("instance %s: %s", self.instance, self.last_error)
            else:
                opened_at_s = time.monotonic()
                self._link, self._draining = link, False
                self._on_change()
                logger.info("instance %s at %s: session open", self.instance, self.card.grpc_address)
                self._lose(await link.run())
                if time.monotonic() - opened_at_s > high_s:
                    wait_s = low_s
            finally:
                self._retire(link)
            await asyncio.sleep(wait_s * random.uniform(0.5, 1.0))
            wait_s = min(2 * wait_s, high_s)

    def _retire(self, link: "_Link") -> None:
        task = asyncio.create_task(link.retire(), name=f"end of a session of {self.instance}")
        self._lingering.add(task)
        task.add_done_callback(self._lingering.discard)

    def _lose(self, reason: str) -> None:
        link, self._link = self._link, None
        self._on_change()
        if link is None:
            return
        self.last_error = reason
        if not self._closing:
            logger.warning("instance %s: session lost: %s", self.instance, reason)
        sinks = list(link.inflight.values())
        link.inflight.clear()
        self._idle.set()
        self.load.clear()
        for sink in sinks:
            _guarded(sink.on_lost, reason)

    # --- called by the link ---

    def on_frame(self, frame: wire.Frame, inflight: dict[int, Sink]) -> None:
        """Give each output to its request. Outputs of requests that were released meanwhile are dropped."""
        self.load.on_report(frame.load, time.monotonic())
        for output in frame.outputs:
            sink = inflight.get(output.rid)
            if sink is not None:
                if output.finish_reason is not None:
                    del inflight[output.rid]
                    self._note_idle()
                _guarded(sink.on_output, output)

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
                _guarded(sink.on_refused, reply.error)
            if reply.error.code == "no_session":
                raise WorkerLost("the worker has let the session expire")

    def _set_draining(self, draining: bool) -> None:
        if draining != self._draining:
            self._draining = draining
            self._on_change()


class _Link:
    """One session from its opening to its end: a channel, the stream's reader and the control caller."""

    def __init__(
        self, card: InstanceCard, session: str, timeouts_s: tuple[float, float], owner: WorkerConnection
    ) -> None:
        self.inflight: dict[int, Sink] = {}
        self._session = session
        self._connect_timeout_s, self._control_timeout_s = timeouts_s
        self._owner = owner
        self._model = card.model
        self._channel = grpc.aio.insecure_channel(card.grpc_address, options=_channel_options())
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._stream: Any = None
        self._reader: asyncio.Task[None] | None = None
        loop = asyncio.get_running_loop()
        self._opened: asyncio.Future[None] = loop.create_future()
        self._over: asyncio.Future[str] = loop.create_future()
        self._pending: list[tuple[wire.Command, asyncio.Future[wire.Reply] | None]] = []
        self._wake = asyncio.Event()
        self._frames_read = 0
        self._frames_told = 0

    async def open(self) -> None:
        """Check Triton's health, open the session, wait for its first frame.

        Raises `grpc.RpcError`, `asyncio.TimeoutError` or `WorkerLost`.
        """
        server = await self._stub.ServerReady(service_pb2.ServerReadyRequest(), timeout=self._connect_timeout_s)
        if not server.ready:
            raise WorkerLost("its Triton server is not ready")
        self._stream = self._stub.ModelStreamInfer()
        await self._stream.write(_request(self._model + wire.SESSION_SUFFIX, wire.OpenSession(self._session)))
        await self._stream.done_writing()
        self._reader = asyncio.create_task(self._read(), name=f"frames of {self._owner.instance}")
        opening = (self._opened, self._over)
        await asyncio.wait(opening, timeout=self._connect_timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if self._over.done():
            raise WorkerLost(self._over.result())
        if not self._opened.done():
            raise WorkerLost(f"its session did not open within {self._connect_timeout_s:g} s")

    async def run(self) -> str:
        """Until the session ends or fails: why it did."""
        control = asyncio.create_task(self._control(), name=f"control of {self._owner.instance}")
        try:
            return await self._over
        finally:
            control.cancel()
            await asyncio.gather(control, return_exceptions=True)
            for _, waiter in self._pending:
                if waiter is not None and not waiter.done():
                    waiter.set_exception(WorkerLost("the session was lost"))
            self._pending.clear()

    async def end(self) -> None:
        """Ask the worker to close the session, and wait until it has, for as long as two pings."""
        with contextlib.suppress(WorkerLost, asyncio.TimeoutError):
            await asyncio.wait_for(self.ask(wire.Close()), 2 * PING_S)
            await asyncio.wait((self._over,), timeout=2 * PING_S)

    async def retire(self) -> None:
        """Let the reader come to the stream's end, so that it is not reset under the worker's hands; then close."""
        self._give_up("given up")
        try:
            if self._reader is not None:
                await asyncio.wait((self._reader,), timeout=LINGER_S)
        finally:
            if self._reader is not None:
                self._reader.cancel()
                await asyncio.gather(self._reader, return_exceptions=True)
            await self._channel.close()

    def send(self, command: wire.Command) -> None:
        """Queue a command for the next control call."""
        self._pending.append((command, None))
        self._wake.set()

    async def ask(self, command: wire.Command) -> wire.Reply:
        """Send a command and wait for its reply. Raises `WorkerLost`."""
        reply: asyncio.Future[wire.Reply] = asyncio.get_running_loop().create_future()
        self._pending.append((command, reply))
        self._wake.set()
        return await reply

    def _give_up(self, reason: str) -> None:
        if not self._over.done():
            self._over.set_result(reason)

    # --- frames ---

    async def _read(self) -> None:
        """Read the stream to its end. After the session was given up, what still comes is dropped."""
        try:
            while (message := await self._stream.read()) is not grpc.aio.EOF:
                if not self._over.done():
                    self._take(message)
        except grpc.RpcError as error:
            self._give_up(_one_line(error))
        except Exception as error:  # the boundary of one session: its requests must hear of it
            logger.exception("instance %s: the reader failed", self._owner.instance)
            self._give_up(f"the reader failed: {_one_line(error)}")
        else:
            self._give_up("the session's stream ended")

    def _take(self, message: Any) -> None:
        if message.error_message:
            self._give_up(message.error_message.splitlines()[0])
            return
        contents = message.infer_response.raw_output_contents
        if not contents:  # the final response of a decoupled model is empty
            return
        try:
            frame = wire.decode_frame(contents[0])
        except msgspec.DecodeError as error:
            self._give_up(f"a frame cannot be read: {error}")
            return
        self._frames_read += 1
        if self._frames_read - self._frames_told >= wire.SESSION_WINDOW // 4:
            self._wake.set()
        self._owner.on_frame(frame, self.inflight)
        if frame.end is not None:
            self._give_up(f"the worker ended the session: {frame.end}")
        elif not self._opened.done():
            self._opened.set_result(None)

    # --- control ---

    async def _control(self) -> None:
        """One call at a time: what arrives while it is in flight goes into the next one together."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                ping = loop.call_later(PING_S, self._wake.set)
                await self._wake.wait()
                ping.cancel()
                await self._exchange(self._take_batch())
        except (grpc.RpcError, WorkerLost) as error:
            self._give_up(f"control: {_one_line(error)}")
        except Exception as error:  # the boundary of one session: its requests must hear of it
            logger.exception("instance %s: the control caller failed", self._owner.instance)
            self._give_up(f"the control caller failed: {_one_line(error)}")

    def _take_batch(self) -> list[tuple[wire.Command, asyncio.Future[wire.Reply] | None]]:
        size = count = 0
        for command, _ in self._pending:
            size += len(command.token_ids) if isinstance(command, wire.Submit) else 0
            if count and size > MAX_BATCH_BYTES:
                break
            count += 1
        batch, self._pending = self._pending[:count], self._pending[count:]
        if not self._pending:
            self._wake.clear()
        return batch or [(wire.Stats(), None)]

    async def _exchange(self, batch: list[tuple[wire.Command, asyncio.Future[wire.Reply] | None]]) -> None:
        try:
            replies = await self._call([command for command, _ in batch])
        except BaseException:
            self._pending = batch + self._pending  # whoever waits for one of them is told when the session is over
            raise
        for (command, waiter), reply in zip(batch, replies, strict=True):
            if waiter is not None and not waiter.done():
                waiter.set_result(reply)
            self._owner.on_answer(command, reply, self.inflight)

    async def _call(self, commands: list[wire.Command]) -> list[wire.Reply]:
        self._frames_told = self._frames_read
        document = wire.ControlBatch(self._session, commands, self._frames_read)
        response = await self._stub.ModelInfer(
            _request(self._model + wire.CONTROL_SUFFIX, document), timeout=self._control_timeout_s
        )
        try:
            replies = wire.decode_reply(response.raw_output_contents[0]).replies
        except (msgspec.DecodeError, IndexError) as error:
            raise WorkerLost(f"a reply cannot be read: {error}") from error
        if len(replies) != len(commands):
            raise WorkerLost(f"{len(replies)} replies to {len(commands)} commands")
        return replies


def _request(model: str, payload: wire.OpenSession | wire.ControlBatch) -> Any:
    """A KServe request with one UINT8 tensor, as raw bytes."""
    document = wire.encode(payload)
    request = service_pb2.ModelInferRequest(model_name=model)
    tensor = request.inputs.add()
    tensor.name, tensor.datatype = wire.PAYLOAD, "UINT8"
    tensor.shape.append(len(document))
    request.raw_input_contents.append(document)
    return request


def _channel_options() -> list[tuple[str, int]]:
    return [
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.use_local_subchannel_pool", 1),
    ]


def _one_line(error: BaseException) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}".splitlines()[0]
    return (str(error) or type(error).__name__).splitlines()[0]


def _guarded(callback: Any, argument: Any) -> None:
    """A request's handler that fails must not take the other requests of its frame with it."""
    try:
        callback(argument)
    except Exception:  # the boundary of one request; its sink has to answer for itself
        logger.exception("a request's handler failed")
