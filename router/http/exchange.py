"""One HTTP request that generates: its sequences run side by side, and all end when the client goes.

`chat.py` and `completions.py` make one `Exchange` per request and let it answer whole or as a stream.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from kvstore.tasks import stop, within
from router.errors import RouterError
from router.http.asgi import REQUEST_ID, ClientGone, Message, Scope, Send, send_whole
from router.http.errors import body_of
from router.http.protocol import EXTENSION, Connection
from router.http.sse import DONE, HEADERS, Choice, Encode, EventStream
from router.types import Delta, GenerationRequest, Generator, Placed, Result

_STALL_TIMEOUT_S = 60.0
"""How long a finished answer waits for a client that does not read it."""


class Exchange:
    """See the module's docstring. Implements `protocol.Watcher`."""

    def __init__(
        self,
        scope: Scope,
        send: Send,
        request_id: str,
        generator: Generator,
        max_pending_bytes: int,
        body_bytes: int,
    ) -> None:
        self.request_id = request_id
        self.body_bytes = body_bytes
        """Of the request: how much work it may be to prepare it."""
        self._connection: Connection = scope["extensions"][EXTENSION]
        self._send = send
        self._generator = generator
        self._max_pending_bytes = max_pending_bytes
        self._tasks: list[asyncio.Task[Result]] = []
        self._events: EventStream | None = None
        self._placed: Placed | None = None
        self._gone = False

    async def answer_whole(
        self, requests: Sequence[GenerationRequest], encode: Callable[[list[Result]], bytes]
    ) -> None:
        """One JSON document. Raises `RouterError` or `ClientGone`; then nothing was sent."""
        with self._connection.watched(self):
            try:
                self._start(requests, [None] * len(requests))
                results = await self._results()
            finally:
                await self._stop()
        await send_whole(self._send, 200, encode(results), self._headers())

    async def answer_stream(
        self,
        requests: Sequence[GenerationRequest],
        encoders: Sequence[Encode],
        tail: Callable[[list[Result]], bytes],
    ) -> int:
        """Server-sent events: those of `encoders` (one per sequence), then `tail` (usage), then `[DONE]`.

        Returns the status to count: an error after the first event can only be told by an event of its own. Raises
        `RouterError` or `ClientGone` before anything was sent, `ClientGone` after it too.
        """
        with self._connection.watched(self):
            events = self._events = EventStream(self._connection, self._max_pending_bytes, self._overrun)
            choices = [Choice(events, encode, waits_for_end=len(encoders) == 1) for encode in encoders]
            try:
                self._start(requests, [choice.on_delta for choice in choices])
                first: list[asyncio.Future[Any]] = [events.spoken, *self._tasks]
                await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
                if self._gone or not events.spoken.done():
                    await self._results()  # raises what ended a sequence before its first token
                await self._send(
                    {"type": "http.response.start", "status": 200, "headers": [*HEADERS, *self._headers()]}
                )
                events.opened = True
                events.flush()
                return await self._finish_stream(events, tail)
            finally:
                await self._stop()

    async def _finish_stream(self, events: EventStream, tail: Callable[[list[Result]], bytes]) -> int:
        status = 200
        try:
            end = tail(await self._results()) + DONE
        except RouterError as error:
            status, end = 500, b"data: " + msgspec.json.encode(body_of(error)) + b"\n\n"
        last: Message = {"type": "http.response.body", "body": events.take() + end, "more_body": False}
        try:
            await within(_STALL_TIMEOUT_S, self._send(last))
        except asyncio.TimeoutError:
            self._connection.transport.abort()
        if self._gone:
            raise ClientGone
        return status

    def _start(
        self, requests: Sequence[GenerationRequest], on_deltas: Sequence[Callable[[Delta], None] | None]
    ) -> None:
        if self._gone:
            raise ClientGone
        for request, on_delta in zip(requests, on_deltas, strict=True):
            on_placed = None if self._tasks else self._on_placed
            self._tasks.append(asyncio.create_task(self._generator.generate(request, on_delta, on_placed)))

    async def _results(self) -> list[Result]:
        """Of all sequences. The first that fails fails the request."""
        done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_EXCEPTION)
        if self._gone:
            raise ClientGone
        for task in done:
            task.result()
        return [task.result() for task in self._tasks]

    async def _stop(self) -> None:
        """Nothing that was started outlives the request."""
        await stop(*self._tasks)

    def _on_placed(self, placed: Placed) -> None:
        self._placed = placed

    def _headers(self) -> list[tuple[bytes, bytes]]:
        headers = [(REQUEST_ID, self.request_id.encode())]
        if self._placed is not None:
            headers += [
                (b"x-dynamo-instance", self._placed.instance.encode()),
                (b"x-dynamo-prompt-blocks", str(self._placed.prompt_blocks).encode()),
                (b"x-dynamo-reused-blocks", str(self._placed.reused_blocks).encode()),
            ]
            if self._placed.prefill_instance:
                headers.append((b"x-dynamo-prefill-instance", self._placed.prefill_instance.encode()))
        return headers

    # --- what the connection and the stream tell ---

    def on_disconnect(self) -> None:
        self._gone = True
        if self._events is not None:
            self._events.opened = False
        for task in self._tasks:
            task.cancel()

    def on_writable(self) -> None:
        if self._events is not None:
            self._events.flush()

    def _overrun(self) -> None:
        """The client reads too slowly for what it asked for."""
        self._connection.transport.abort()
        self.on_disconnect()
