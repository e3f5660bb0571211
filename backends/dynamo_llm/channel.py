"""Messages over a local stream socket: each a header (mark and length) and a msgpack document.

A worker and its engine's process talk so (`engines/isolated`), and Triton's stub processes (`hosts/tritonserver`).
"""

import contextlib
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import TypeVar

import msgspec

MAX_BYTES = 1 << 30
"""No message is longer: prompt logprobs of a million tokens fit, a length made of garbage does not."""
_HEADER = struct.Struct("<4sI")
_MARK = b"dyn\x01"
_BUFFER_BYTES = 1 << 16

T = TypeVar("T")


class ChannelError(Exception):
    """What came is no message, or what was to go is too long. The message is one line."""


def frame(document: bytes) -> bytes:
    """A message as it travels. Raises `ChannelError` for one that is too long."""
    if len(document) > MAX_BYTES:
        raise ChannelError(f"a message of {len(document)} bytes is over the limit of {MAX_BYTES}")
    return _HEADER.pack(_MARK, len(document)) + document


def _length_of(header: bytes) -> int:
    if header[: len(_MARK)] != _MARK:
        raise ChannelError(f"what is no message: {header!r}")
    length: int = _HEADER.unpack(header)[1]
    if length > MAX_BYTES:
        raise ChannelError(f"a message of {length} bytes, over the limit of {MAX_BYTES}")
    return length


class FrameBuffer:
    """Cuts what comes from a stream into documents; for event loops."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The documents that are complete with `data`. Raises `ChannelError` for what is no message."""
        self._data += data
        while len(self._data) >= _HEADER.size:
            end = _HEADER.size + _length_of(bytes(self._data[: _HEADER.size]))
            if len(self._data) < end:
                return
            yield bytes(self._data[_HEADER.size : end])
            del self._data[:end]


class Channel:
    """One end. `send` may be called from any thread, `receive` from one."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._stream = end.makefile("rb", _BUFFER_BYTES)
        self._lock = threading.Lock()

    def send(self, document: bytes) -> None:
        """Blocks while the other side does not read. Raises `OSError` when it is gone, `ChannelError` when too long."""
        self.send_framed(frame(document))

    def send_framed(self, data: bytes) -> None:
        with self._lock:
            self._socket.sendall(data)

    def receive(self, decode: Callable[[bytes], T], timeout_s: float | None = None) -> T | None:
        """The next message; None at the end of the stream, half a message before it or not: so ends who is killed.

        Raises `ChannelError` for what is no message, and `TimeoutError`, after which the channel is of no more use.
        """
        self._socket.settimeout(timeout_s)
        try:
            header = self._stream.read(_HEADER.size)
            if len(header) < _HEADER.size:
                return None
            length = _length_of(header)
            document = self._stream.read(length)
        except ConnectionResetError:  # the other side ended with messages unread
            return None
        if len(document) < length:
            return None
        try:
            return decode(document)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ChannelError(f"a message that cannot be read: {error}") from None

    def close(self) -> None:
        self._stream.close()
        self._socket.close()


class Outbox:
    """Sends on a thread of its own, so that `put` never waits for the other side. What piles up shares one send."""

    def __init__(self, channel: Channel, max_bytes: int) -> None:
        self._channel = channel
        self._max_bytes = max_bytes
        self._changed = threading.Condition()
        self._queue: deque[bytes] = deque()
        self._bytes = 0
        self._open = True
        self._thread = threading.Thread(target=self._run, name="engine-outbox", daemon=True)
        self._thread.start()

    def put(self, document: bytes, *, force: bool = False) -> bool:
        """False when it was not taken because too much waits already; with `force` it always is."""
        data = frame(document)
        with self._changed:
            if self._bytes + len(data) > self._max_bytes and self._queue and not force:
                return False
            self._queue.append(data)
            self._bytes += len(data)
            self._changed.notify()
        return True

    def close(self) -> None:
        """Drop what was not sent and join the thread. The other side must be gone, or a send may hold it."""
        with self._changed:
            self._open = False
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        with contextlib.suppress(OSError):  # the other side is gone: whoever receives learns of it too
            while data := self._take():
                self._channel.send_framed(data)

    def _take(self) -> bytes:
        with self._changed:
            while self._open and not self._queue:
                self._changed.wait()
            data = b"".join(self._queue) if self._open else b""
            self._queue.clear()
            self._bytes = 0
        return data
