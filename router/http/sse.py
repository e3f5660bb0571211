"""Server-sent events from a frame's handler to the socket, with back-pressure and without a task per token.

`EventStream` writes chunks of one response; a `Choice` turns the deltas of one sequence into events, and merges them
while the socket takes no more, so a slow client gets fuller events and never an unbounded buffer.
"""

import asyncio
from collections.abc import Callable

from kvstore.wire import FinishReason, TokenLogprob
from router.http.protocol import Connection
from router.types import Delta

DONE = b"data: [DONE]\n\n"
HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]

Encode = Callable[[str, list[TokenLogprob] | None, FinishReason | None], bytes]
"""Text, logprobs and finish reason of one choice to whole events; empty if there is nothing to say."""


class EventStream:
    """The body of one streamed response. `Exchange` opens it when the head of the response has been written."""

    def __init__(self, connection: Connection, max_pending_bytes: int, on_overrun: Callable[[], None]) -> None:
        self.opened = False
        self.spoken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when there is something to send."""
        self.choices: list[Choice] = []
        self._connection = connection
        self._transport = connection.transport
        self._left_bytes = max_pending_bytes
        self._on_overrun = on_overrun

    @property
    def writable(self) -> bool:
        return self.opened and not self._connection.paused

    def write(self, events: bytes) -> None:
        """Straight to the socket, as one chunk. Only while `writable`."""
        if events:
            self._transport.write(b"%x\r\n%b\r\n" % (len(events), events))

    def flush(self) -> None:
        """Send what was merged, as far as the socket takes it."""
        for choice in self.choices:
            if not self.writable:
                return
            self.write(choice.take())

    def take(self) -> bytes:
        """What is left at the end, of all choices."""
        return b"".join([choice.take() for choice in self.choices])

    def held(self, size: int) -> None:
        """So many bytes more wait for the client (fewer, if negative)."""
        self._left_bytes -= size
        if not self.spoken.done():
            self.spoken.set_result(None)
        if self._left_bytes < 0:
            self._on_overrun()


class Choice:
    """One sequence's part of a stream."""

    __slots__ = ("_encode", "_events", "_finish", "_logprobs", "_size", "_text", "_waits_for_end")

    def __init__(self, events: EventStream, encode: Encode, waits_for_end: bool) -> None:
        """`waits_for_end`: the last delta goes out together with the end of the stream (which follows at once)."""
        self._events = events
        self._encode = encode
        self._waits_for_end = waits_for_end
        self._text: list[str] = []
        self._logprobs: list[TokenLogprob] | None = None
        self._finish: FinishReason | None = None
        self._size = 0
        events.choices.append(self)

    def on_delta(self, delta: Delta) -> None:
        """Called from the frame's handler: the hot path."""
        finish = delta.finish_reason
        if not self._size and self._events.writable and not (finish and self._waits_for_end):
            self._events.write(self._encode(delta.text, delta.logprobs, finish))
            return
        self._text.append(delta.text)
        self._finish = finish
        size = 1 + len(delta.text)
        if delta.logprobs:
            if self._logprobs is None:
                self._logprobs = []
            self._logprobs += delta.logprobs
            size += sum(64 * (1 + len(logprob.top)) for logprob in delta.logprobs)
        self._size += size
        self._events.held(size)

    def take(self) -> bytes:
        """What was merged, as events."""
        if not self._size:
            return b""
        events = self._encode("".join(self._text), self._logprobs, self._finish)
        self._events.held(-self._size)
        self._text, self._logprobs, self._finish, self._size = [], None, None, 0
        return events
