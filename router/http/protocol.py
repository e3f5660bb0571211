"""uvicorn's HTTP protocol, opened just so far that a stream can write to its socket from a frame's handler.

Through ASGI alone every token would need a task to wake, await `send` and go back to sleep: 3 us of 9 per token. Here
the endpoint still starts and ends its response by ASGI. In between it writes to `transport`, and learns from here what
ASGI has no synchronous word for: the client is gone, its socket is full or takes more. Beside that, a request's head
gets the bounds of size and time that uvicorn does not have.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

EXTENSION = "dynamo_llm.connection"

_MAX_HEAD_BYTES = 64 * 2**10
_HEAD_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


class Watcher(Protocol):
    """What one request wants to hear of its connection. All methods are called on the event loop."""

    def on_disconnect(self) -> None: ...

    def on_writable(self) -> None: ...


class Connection(HttpToolsProtocol):
    """One client connection. `scope["extensions"][EXTENSION]` of its requests."""

    paused = False
    """The socket's buffer is full: write nothing until `on_writable`."""
    _watcher: Watcher | None = None
    _reading_head = False
    _head_bytes = 0
    """Received of a head that is not complete; the piece that it began in is not counted."""
    _field_bytes = 0
    """Of the complete header fields, trailers included."""
    _head_timer: asyncio.TimerHandle | None = None

    write_buffer_bytes = 64 * 2**10
    head_timeout_s = 30.0
    """Between the first byte of a head, or the connection's start, and the end of the head."""

    @contextmanager
    def watched(self, watcher: Watcher) -> Iterator[None]:
        """For as long as a request is served. One request at a time: uvicorn answers pipelined ones in turn."""
        self._watcher = watcher
        try:
            if self.transport.is_closing():
                watcher.on_disconnect()
            yield
        finally:
            self._watcher = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=self.write_buffer_bytes)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        was_reading_head = self._reading_head
        super().data_received(data)
        if not self._reading_head or self.transport.is_closing():
            return
        self._head_bytes = self._head_bytes + len(data) if was_reading_head else 0
        if self._head_bytes > _MAX_HEAD_BYTES:
            self._refuse_head()
        elif self._head_timer is None:
            self._expect_head()

    def _refuse_head(self) -> None:
        self.transport.write(_HEAD_TOO_LARGE)
        self.transport.close()

    def _expect_head(self) -> None:
        self._head_timer = self.loop.call_later(self.head_timeout_s, self._on_head_late)

    def _on_head_late(self) -> None:
        """Close the connection, unless it is still busy with the answer to the request before."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._expect_head()
        else:
            self.transport.close()

    def _forget_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._reading_head = True
        self._field_bytes = 0
        scope: Any = self.scope
        scope["extensions"] = {EXTENSION: self}

    def on_header(self, name: bytes, value: bytes) -> None:
        self._field_bytes += len(name) + len(value)
        if self._field_bytes > _MAX_HEAD_BYTES:
            raise ValueError("the header fields are too large")  # ends the parsing: `send_400_response`
        super().on_header(name, value)

    def send_400_response(self, msg: str) -> None:
        if self._field_bytes > _MAX_HEAD_BYTES:
            self._refuse_head()
        else:
            super().send_400_response(msg)

    def on_headers_complete(self) -> None:
        self._reading_head = False
        self._forget_head_timer()
        super().on_headers_complete()

    @property
    def body_complete(self) -> bool:
        """Whether all is here of the request that came last, and so of those before it."""
        return not self._reading_head and not self.cycle.more_body

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_head_timer()
        super().connection_lost(exc)
        if self._watcher is not None:
            self._watcher.on_disconnect()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.paused = True

    def resume_writing(self) -> None:
        super().resume_writing()
        self.paused = False
        if self._watcher is not None:
            self._watcher.on_writable()
