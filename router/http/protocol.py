"""uvicorn's HTTP protocol, opened just so far that a stream can write to its socket from a frame's handler.

Through ASGI alone every token would need a task to wake, await `send` and go back to sleep: 3 us of 9 per token. Here
the endpoint still starts and ends its response by ASGI. In between it writes to `transport`, and learns from here what
ASGI has no synchronous word for: the client is gone, its socket is full or takes more. Nothing else is touched.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

EXTENSION = "dynamo_llm.connection"


class Watcher(Protocol):
    """What one request wants to hear of its connection. All methods are called on the event loop."""

    def on_disconnect(self) -> None: ...

    def on_writable(self) -> None: ...


class Connection(HttpToolsProtocol):
    """One client connection. `scope["extensions"][EXTENSION]` of its requests."""

    paused = False
    """The socket's buffer is full: write nothing until `on_writable`."""
    _watcher: Watcher | None = None

    write_buffer_bytes = 64 * 2**10

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

    def on_message_begin(self) -> None:
        super().on_message_begin()
        scope: Any = self.scope
        scope["extensions"] = {EXTENSION: self}

    def connection_lost(self, exc: Exception | None) -> None:
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
