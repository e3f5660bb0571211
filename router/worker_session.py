"""One session on a worker: the stream that brings frames, and the control caller (design contract 5).

`worker_client.WorkerConnection` opens one after the other. The stream is never reset, because a reset around a response
can hurt a Triton server; a session ends by a command, from the worker's side, or by expiry when the pings stop.
"""

import asyncio
import contextlib
import logging
from typing import Any, Protocol

import grpc
import msgspec
from tritonclient.grpc import service_pb2, service_pb2_grpc

from kvstore import wire
from kvstore.cards import InstanceCard

logger = logging.getLogger(__name__)

PING_S = 1.0
"""A session without commands for 5 s expires on the worker."""
LINGER_S = 7.0
"""How long a given-up session's stream is read to its end before the channel is closed all the same."""
MAX_MESSAGE_BYTES = 64 * 2**20
MAX_BATCH_BYTES = 16 * 2**20


class Sink(Protocol):
    """Where a request's outputs go. All methods are called on the event loop and must not block."""

    def on_output(self, output: wire.Output) -> None:
        """What a frame brought. The one with a finish reason is the last call."""

    def on_refused(self, error: wire.WireError) -> None:
        """The worker did not take the request. The last call."""

    def on_lost(self, reason: str) -> None:
        """The worker or the session is gone. The last call."""

    def on_failed(self, reason: str) -> None:
        """One of the other methods raised: the request cannot go on here or elsewhere. The last call."""


class Owner(Protocol):
    """What a session tells its connection."""

    def on_frame(self, frame: wire.Frame, inflight: dict[int, Sink]) -> None:
        """A frame came; `inflight` are the session's requests."""

    def on_answer(self, command: wire.Command, reply: wire.Reply, inflight: dict[int, Sink]) -> None:
        """A command was answered. Raises `WorkerLost` if the answer means that the session is over."""


class WorkerLost(Exception):
    """The session is (or was just) given up; the message says why."""


class WorkerSession:
    """One session from its opening to its end: a channel, the stream's reader and the control caller.

    `open`, `run` and `retire` are to be called once each, in this order; `retire` also when `open` failed.
    """

    def __init__(self, card: InstanceCard, session: str, timeouts_s: tuple[float, float], owner: Owner) -> None:
        self.inflight: dict[int, Sink] = {}
        self._session = session
        self._connect_timeout_s, self._control_timeout_s = timeouts_s
        self._owner = owner
        self._instance = card.instance
        self._model = card.triton_model or card.model
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
        self._reader = asyncio.create_task(self._read(), name=f"frames of {self._instance}")
        opening = (self._opened, self._over)
        await asyncio.wait(opening, timeout=self._connect_timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if self._over.done():
            raise WorkerLost(self._over.result())
        if not self._opened.done():
            raise WorkerLost(f"its session did not open within {self._connect_timeout_s:g} s")

    async def run(self) -> str:
        """Until the session ends or fails: why it did."""
        control = asyncio.create_task(self._control(), name=f"control of {self._instance}")
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
            self._give_up(one_line(error))
        except Exception as error:  # the boundary of one session: its requests must hear of it
            logger.exception("instance %s: the reader failed", self._instance)
            self._give_up(f"the reader failed: {one_line(error)}")
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
            self._give_up(f"control: {one_line(error)}")
        except Exception as error:  # the boundary of one session: its requests must hear of it
            logger.exception("instance %s: the control caller failed", self._instance)
            self._give_up(f"the control caller failed: {one_line(error)}")

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
        for (_, waiter), reply in zip(batch, replies, strict=True):
            if waiter is not None and not waiter.done():
                waiter.set_result(reply)
        for (command, _), reply in zip(batch, replies, strict=True):  # one of these can end the session
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
        ("grpc.enable_http_proxy", 0),  # a proxy of the environment is for the world outside, not for our workers
    ]


def one_line(error: BaseException) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}".splitlines()[0]
    return (str(error) or type(error).__name__).splitlines()[0]
