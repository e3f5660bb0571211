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

from router.errors import RouterError
from router.http.asgi import ClientGone
from router.kserve.outbox import Outbox, Prepare
from router.kserve.response import Parameters, Response
from router.types import Generator

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
        try:
            async with Outbox(self._generator) as outbox:
                outbox.start("", self._prepare)
                outbox.close()
                status = await until_disconnect(receive, self._pump(outbox, scope, receive, send))
        except ClientGone:
            pass
        finally:
            self._count(status)

    async def _pump(self, outbox: Outbox, scope: Scope, receive: Receive, send: Send) -> int:
        """Send all events; returns the status."""
        started = False
        while items := await outbox.next():
            for _, response in items:
                if isinstance(response, RouterError):
                    if not started:
                        refusal = self._error_response(response)
                        await refusal(scope, receive, send)
                        return refusal.status_code
                    event = msgspec.json.encode({"error": response.message})
                else:
                    event = self._encode(response)
                    if not started:
                        started = True
                        await send(self._start(response.parameters))
                await send({"type": "http.response.body", "body": b"data: " + event + b"\n\n", "more_body": True})
        await send({"type": "http.response.body", "body": b""})
        return 200

    def _start(self, parameters: Parameters) -> dict[str, Any]:
        headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
        headers |= self._headers_of(parameters)
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        return {"type": "http.response.start", "status": 200, "headers": raw}


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, _T]) -> _T:
    """Await `work`; cancel it and raise `ClientGone` when the client goes away first. The body has been read."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
