"""The response of `generate_stream`: Server-Sent Events, one per response of the model. `http.py` is the only caller.

An ASGI response of its own, because it may choose a status only after the first result, and must notice a client that
goes away while nothing is being sent.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import msgspec
from starlette.responses import Response as HttpResponse
from starlette.types import Receive, Scope, Send

from kvstore.tasks import stop, within
from router.errors import RouterError
from router.http.asgi import ClientGone
from router.http.protocol import EXTENSION, Connection
from router.kserve.outbox import Outbox, Prepare, Run
from router.kserve.response import Parameters, Response
from router.types import Generator

STALL_TIMEOUT_S = 60.0
"""How long an event waits for a client that does not read."""

_T = TypeVar("_T")


class EventStream(HttpResponse):
    """An error before the first result is an error response; a later one is an event, and the status stays 200."""

    def __init__(
        self,
        generator: Generator,
        prepare: Prepare,
        encode: Callable[[Response], bytes],
        count: Callable[[int], None],
        error_response: Callable[[RouterError], HttpResponse],
        headers: Callable[[Parameters], dict[str, str]],
    ) -> None:
        super().__init__()
        self._generator = generator
        self._prepare = prepare
        self._encode = encode
        self._count = count
        self._error_response = error_response
        self._headers_of = headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status = 499
        writer = _Writer(send, scope.get("extensions", {}).get(EXTENSION), self._encode)
        try:
            async with Outbox(self._generator, writer.write_now) as outbox:
                outbox.start("", self._prepare)
                outbox.close()
                status = await until_disconnect(receive, self._send_all(outbox, writer, scope, receive, send))
        except ClientGone:
            pass
        finally:
            self._count(status)

    async def _send_all(self, outbox: Outbox, writer: "_Writer", scope: Scope, receive: Receive, send: Send) -> int:
        """Send all events; returns the status."""
        while items := await outbox.next():
            for _, response in items:
                if not writer.opened:
                    if isinstance(response, RouterError):
                        refusal = self._error_response(response)
                        await refusal(scope, receive, send)
                        return refusal.status_code
                    await send(self._start(response.parameters))
                await writer.write(response)
        await send({"type": "http.response.body", "body": b""})
        return 200

    def _start(self, parameters: Parameters) -> dict[str, Any]:
        headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
        headers |= self._headers_of(parameters)
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        return {"type": "http.response.start", "status": 200, "headers": raw}


class _Writer:
    """Writes events: by ASGI, or straight to the socket from the frame's handler where the connection allows it."""

    def __init__(self, send: Send, connection: Connection | None, encode: Callable[[Response], bytes]) -> None:
        self.opened = False
        """The first event was written by ASGI, so the head of the response is out."""
        self._send = send
        self._connection = connection
        self._encode = encode
        self._waiting = False
        """An event is on its way by ASGI: others must not overtake it."""

    async def write(self, response: Response | RouterError) -> None:
        """By ASGI, which waits while the socket is full. Raises `ClientGone` for a client that does not read at all."""
        message = {"type": "http.response.body", "body": self._event(response), "more_body": True}
        self._waiting = True
        try:
            await within(STALL_TIMEOUT_S, self._send(message))
        except asyncio.TimeoutError:
            if self._connection is not None:
                self._connection.transport.abort()
            raise ClientGone from None
        self._waiting = False
        self.opened = True

    def write_now(self, run: Run) -> bool:
        """An `Outbox` sink: takes what is there if the socket takes it now."""
        connection = self._connection
        if connection is None or not self.opened or self._waiting or connection.paused:
            return False
        for response in run.take():
            event = self._event(response)
            connection.transport.write(b"%x\r\n%b\r\n" % (len(event), event))
        return True

    def _event(self, response: Response | RouterError) -> bytes:
        if isinstance(response, RouterError):
            return b"data: " + msgspec.json.encode({"error": response.message}) + b"\n\n"
        return b"data: " + self._encode(response) + b"\n\n"


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, _T]) -> _T:
    """Await `work`; cancel it and raise `ClientGone` when the client goes away first. The body has been read."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        await stop(task, gone)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
