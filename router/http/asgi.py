"""What endpoints need of ASGI: read a bounded body, send a whole answer, find or make the request's id."""

import asyncio
import os
import re
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from router.errors import InvalidRequest, RouterError, TooLarge
from router.http.protocol import EXTENSION

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = Iterable[tuple[bytes, bytes]]

JSON = b"application/json"
REQUEST_ID = b"x-request-id"

_BODY_TIMEOUT_S = 60.0
_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")


class ClientGone(Exception):
    """The client closed the connection: there is nobody left to answer."""


async def read_body(scope: Scope, receive: Receive, limit_bytes: int) -> bytes:
    """The whole body. Raises `TooLarge` as soon as the limit is passed, `InvalidRequest` for one that never ends."""
    declared = header(scope, b"content-length")
    if declared is not None and declared.isdigit() and int(declared) > limit_bytes:
        raise _too_large(limit_bytes)
    if scope["extensions"][EXTENSION].body_complete:  # as nearly always: no need for a timer, which costs a task
        return await _read_all(receive, limit_bytes)
    try:
        return await asyncio.wait_for(_read_all(receive, limit_bytes), _BODY_TIMEOUT_S)
    except asyncio.TimeoutError:
        raise InvalidRequest(f"the body did not arrive within {_BODY_TIMEOUT_S:g} s") from None


async def _read_all(receive: Receive, limit_bytes: int) -> bytes:
    pieces = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        pieces += message["body"]
        if len(pieces) > limit_bytes:
            raise _too_large(limit_bytes)
        if not message["more_body"]:
            return bytes(pieces)


def _too_large(limit_bytes: int) -> RouterError:
    return TooLarge(f"the body is larger than {limit_bytes} bytes")


async def send_whole(send: Send, status: int, body: bytes, headers: Headers = (), content_type: bytes = JSON) -> None:
    """A complete response."""
    all_headers = [(b"content-type", content_type), (b"content-length", str(len(body)).encode()), *headers]
    await send({"type": "http.response.start", "status": status, "headers": all_headers})
    await send({"type": "http.response.body", "body": body})


def header(scope: Scope, name: bytes) -> bytes | None:
    """The first header of a name (lower case)."""
    for key, value in scope["headers"]:
        if key == name:
            found: bytes = value
            return found
    return None


def request_id(scope: Scope) -> str:
    """The client's own, where it is printable and short, else a new one."""
    given = header(scope, REQUEST_ID)
    if given is not None and _REQUEST_ID.fullmatch(given):
        return given.decode()
    return os.urandom(12).hex()


def trace_context(scope: Scope) -> dict[str, str]:
    """W3C trace context, to be passed on as it came."""
    found = ((name, header(scope, name.encode())) for name in ("traceparent", "tracestate"))
    return {name: value.decode("latin-1") for name, value in found if value is not None}
