"""The socket between a model's stub process and its companions': calls with a stream of answers each.

The model opens a `LinkServer` on its event loop; a companion makes a `Link`, which blocks. The socket's name is in
Linux' abstract namespace, so that nothing of it is left when a process is killed; both sides make sure that the other
one is of the same user. A client that closes its connection cancels the call that is running on it.
"""

import asyncio
import contextlib
import logging
import os
import socket
import struct
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import aclosing
from pathlib import Path

import msgspec
from msgspec import Struct

from dynamo_llm.channel import Channel, ChannelError, FrameBuffer, frame
from kvstore.wire import WireError

_STILL_S = 0.5
"""A call without answers says this often that it goes on, so that the companion looks whether its client has left."""
_CONNECT_TIMEOUT_S = 5.0
_CREDENTIALS = struct.Struct("3i")
_log = logging.getLogger(__name__)

Method = Callable[[bytes], AsyncGenerator[bytes, None]]
"""Answers one call. A `CallError` becomes the caller's."""


class Call(Struct, frozen=True, array_like=True):
    method: str
    payload: bytes = b""


class Answer(Struct, frozen=True, array_like=True, tag="answer"):
    payload: bytes


class Still(Struct, frozen=True, array_like=True, tag="still"):
    """Nothing yet."""


class End(Struct, frozen=True, array_like=True, tag="end"):
    """The last message of a call."""

    error: WireError | None = None


class Status(Struct, frozen=True):
    """What an instance answers to `status` once it is registered, in JSON."""

    model: str
    version: str
    instance: str


class CallError(Exception):
    """A call that is not carried out, with the error of the wire."""

    def __init__(self, error: WireError) -> None:
        super().__init__(f"{error.code}: {error.message}")
        self.error = error


class LinkLost(Exception):
    """Nobody listens, or the one who did has gone. The message is one line."""


_encode = msgspec.msgpack.Encoder().encode
_decode_call = msgspec.msgpack.Decoder(Call).decode
_decode_message = msgspec.msgpack.Decoder(Answer | Still | End).decode
_STILL = frame(_encode(Still()))


def prefix(server_pid: int) -> str:
    """What the names of all links of one tritonserver begin with; a namespace of pids may share one of sockets."""
    return f"dynamo-llm/{os.stat('/proc/self/ns/pid').st_ino}/{server_pid}/"


def link_name(server_pid: int, model: str) -> str:
    """Of the instance whose companions are `model.control` and `model.session`."""
    return prefix(server_pid) + model


def links_of(server_pid: int) -> list[str]:
    """The names of all that listen under a tritonserver."""
    start = "@" + prefix(server_pid)
    entries = (line.split() for line in Path("/proc/net/unix").read_text(errors="replace").splitlines()[1:])
    return sorted({entry[7][1:] for entry in entries if len(entry) == 8 and entry[7].startswith(start)})


class LinkServer:
    """The model's end. To be used on one event loop."""

    def __init__(self, name: str, methods: Mapping[str, Method]) -> None:
        self._name = name
        self._methods = methods
        self._server: asyncio.AbstractServer | None = None
        self._connections: set[_Connection] = set()

    async def open(self) -> None:
        """Raises `OSError` where another one listens."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(
            lambda: _Connection(self._methods, self._connections), path="\0" + self._name
        )

    def free_name(self) -> None:
        """Another one may listen. Calls that are under way go on to their end, and with it their connection ends. May
        be called twice."""
        server, self._server = self._server, None
        if server is not None:
            server.close()
        for connection in list(self._connections):
            connection.end_when_idle()

    async def close(self) -> None:
        """Cancel all calls and free the name. May be called twice."""
        self.free_name()
        connections = list(self._connections)
        for connection in connections:
            connection.abort()
        for connection in connections:
            await connection.closed


class _Connection(asyncio.Protocol):
    """One companion's connection; one call at a time."""

    def __init__(self, methods: Mapping[str, Method], connections: "set[_Connection]") -> None:
        self._methods = methods
        self._connections = connections
        self._loop = asyncio.get_running_loop()
        self._frames = FrameBuffer()
        self._calls: list[Call] = []
        self._ending = False
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self.closed: asyncio.Future[None] = self._loop.create_future()
        self._transport: asyncio.Transport

    def abort(self) -> None:
        self._transport.abort()

    def end_when_idle(self) -> None:
        self._ending = True
        self._go_on()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # of a stream, as this is its protocol
        self._connections.add(self)
        if not _is_ours(transport.get_extra_info("socket")):
            self.abort()

    def data_received(self, data: bytes) -> None:
        try:
            self._calls += [_decode_call(document) for document in self._frames.feed(data)]
        except (ChannelError, msgspec.DecodeError):
            _log.error("what came over the link of %s is no call", next(iter(self._methods)))
            self.abort()
        self._go_on()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.discard(self)
        self._calls.clear()
        if self._task is None:
            self.closed.set_result(None)
        else:
            self._task.cancel()

    def _go_on(self) -> None:
        if self._task is not None:
            return
        if self._ending:
            self._transport.close()
        elif self._calls:
            self._task = self._loop.create_task(self._carry_out(self._calls.pop(0)))
            self._task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._task = None
        if self._transport.is_closing():
            if not self.closed.done():
                self.closed.set_result(None)
        else:
            self._go_on()

    async def _carry_out(self, call: Call) -> None:
        self._timer = self._loop.call_later(_STILL_S, self._still)
        error: WireError | None = None
        try:
            async with aclosing(self._methods[call.method](call.payload)) as answers:
                async for answer in answers:
                    await self._write(Answer(answer))
        except CallError as failed:
            error = failed.error
        except Exception as failed:  # noqa: BLE001 - a request's boundary: a bug must reach the client, too
            _log.exception("call of %s failed", call.method)
            error = WireError("engine_failure", f"the worker failed: {failed!r}")
        finally:
            self._timer.cancel()
        await self._write(End(error))

    async def _write(self, message: Answer | End) -> None:
        self._transport.write(frame(_encode(message)))
        await self._writable.wait()

    def _still(self) -> None:
        self._transport.write(_STILL)
        self._timer = self._loop.call_later(_STILL_S, self._still)


class Link:
    """A companion's end: one connection, kept from call to call. One thread at a time."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._channel: Channel | None = None

    def ask(self, method: str, payload: bytes = b"") -> bytes:
        """The one answer of a call. Raises `CallError` and `LinkLost`.

        Another connection is tried where the kept one has broken: the model may have been loaded again.
        """
        kept = self._channel is not None
        try:
            return b"".join(self.call(method, payload))
        except LinkLost:
            if not kept:
                raise
        return b"".join(self.call(method, payload))

    def call(self, method: str, payload: bytes = b"", stay: Callable[[], bool] = lambda: True) -> Iterator[bytes]:
        """The answers of a call. It is cancelled when `stay` becomes false, which is asked at each answer and at least
        twice a second, and when the iterator is closed."""
        channel = self._channel = self._channel or self._connect()
        ended = False
        try:
            channel.send(_encode(Call(method, payload)))
            while (message := channel.receive(_decode_message)) is not None and stay():
                if isinstance(message, End):
                    ended = True
                    if message.error is not None:
                        raise CallError(message.error)
                    return
                if isinstance(message, Answer):
                    yield message.payload
            if message is None:
                raise LinkLost(f"the model behind {self._name} has gone")
        except (OSError, ChannelError) as error:
            raise LinkLost(f"the model behind {self._name} has gone: {error}") from None
        finally:
            if not ended:
                self.close()

    def close(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()

    def _connect(self) -> Channel:
        end = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            end.settimeout(_CONNECT_TIMEOUT_S)
            end.connect("\0" + self._name)
            if not _is_ours(end):
                raise OSError("it is another user's")
            end.settimeout(None)
        except OSError as error:
            end.close()
            raise LinkLost(f"no model listens behind {self._name}: {error}") from None
        return Channel(end)


def _is_ours(end: socket.socket) -> bool:
    """Whether the process at the other end is of our user."""
    credentials = end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    uid: int = _CREDENTIALS.unpack(credentials)[1]
    return uid == os.getuid()


def ask_once(name: str, method: str, payload: bytes = b"") -> bytes:
    """As `Link.ask`, over a connection of its own."""
    with contextlib.closing(Link(name)) as link:
        return link.ask(method, payload)
