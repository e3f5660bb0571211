"""The ASGI side of generate_stream that no well-behaved client shows."""

import asyncio

from router.errors import RouterError
from router.kserve import event_stream
from router.kserve.event_stream import EventStream
from router.kserve.request import InferRequest, prepare


class _Transport:
    aborted = False

    def abort(self):
        self.aborted = True


class _Connection:
    """A socket whose buffer is full."""

    paused = True

    def __init__(self):
        self.transport = _Transport()


async def test_client_that_never_reads_is_cut_off(echo, model, monkeypatch):
    """A client that stays connected and reads nothing loses its connection, and its request ends."""
    monkeypatch.setattr(event_stream, "STALL_TIMEOUT_S", 0.01)
    echo.hold_after = 2
    connection, counted, sent = _Connection(), [], []

    async def prepared():
        inputs = {"text_input": [b"one two three four"], "stream": [True]}
        return await prepare(InferRequest(model="demo", id="r", inputs=inputs), model), model

    async def receive():
        await asyncio.Event().wait()

    async def send(message):
        sent.append(message["type"])
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    def refuse(error: RouterError):
        raise error

    stream = EventStream(echo, prepared, lambda response: b"{}", counted.append, refuse, lambda parameters: {})
    scope = {"type": "http", "extensions": {event_stream.EXTENSION: connection}}
    await asyncio.wait_for(stream(scope, receive, send), 10)
    assert sent == ["http.response.start", "http.response.body"]
    assert connection.transport.aborted
    assert counted == [499]
    assert echo.cancelled == ["r"]
