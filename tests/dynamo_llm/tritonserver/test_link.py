"""Calls between stub processes: answers, errors, and ends from either side."""

import asyncio
import contextlib
import os
import socket
import threading
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import pytest

from dynamo_llm.channel import frame
from dynamo_llm.hosts.tritonserver.link import CallError, Link, LinkLost, LinkServer, ask_once, link_name, links_of
from kvstore.wire import WireError

ERROR = WireError("overloaded", "too many")


class Methods:
    """What the tests call, and what became of it."""

    def __init__(self) -> None:
        self.running = 0

    async def count(self, payload: bytes) -> AsyncGenerator[bytes, None]:
        self.running += 1
        try:
            for number in range(int(payload)):
                yield b"%d," % number
        finally:
            self.running -= 1

    async def wait(self, payload: bytes) -> AsyncGenerator[bytes, None]:
        self.running += 1
        try:
            yield b"begun"
            await asyncio.Event().wait()
        finally:
            self.running -= 1

    async def refuse(self, payload: bytes) -> AsyncGenerator[bytes, None]:
        yield b"one"
        raise CallError(ERROR)

    async def fail(self, payload: bytes) -> AsyncGenerator[bytes, None]:
        raise RuntimeError("a bug")
        yield b""


@pytest.fixture
def name() -> str:
    return link_name(os.getpid(), uuid.uuid4().hex)


@pytest.fixture
def methods() -> Methods:
    return Methods()


@pytest.fixture
async def server(name: str, methods: Methods) -> AsyncIterator[LinkServer]:
    made = LinkServer(name, {key: getattr(methods, key) for key in ("count", "wait", "refuse", "fail")})
    await made.open()
    yield made
    await made.close()


@pytest.fixture
def link(name: str) -> Any:
    with contextlib.closing(Link(name)) as made:
        yield made


async def test_calls_follow_each_other_on_one_connection(server: LinkServer, link: Link) -> None:
    """However many answers each has, and however large."""
    for number in (1, 0, 1000):
        wanted = b"".join(b"%d," % n for n in range(number))
        assert await asyncio.to_thread(link.ask, "count", b"%d" % number) == wanted


async def test_errors_of_a_call(server: LinkServer, link: Link, caplog: pytest.LogCaptureFixture) -> None:
    """The wire's come as they are, a bug as `engine_failure`; the connection goes on."""
    answers = link.call("refuse")
    assert await asyncio.to_thread(next, answers) == b"one"
    with pytest.raises(CallError) as caught:
        await asyncio.to_thread(next, answers)
    assert caught.value.error == ERROR
    with pytest.raises(CallError, match="engine_failure: the worker failed: RuntimeError"):
        await asyncio.to_thread(link.ask, "fail")
    assert "a bug" in caplog.text
    assert await asyncio.to_thread(link.ask, "count", b"1") == b"0,"


async def test_leaving_cancels_the_call(server: LinkServer, link: Link, methods: Methods, eventually: Any) -> None:
    """By the iterator's end, or because there is no reason to stay: that is asked although no answer comes."""
    answers = link.call("wait")
    assert await asyncio.to_thread(next, answers) == b"begun"
    answers.close()
    await eventually(lambda: methods.running == 0)
    stay = threading.Event()
    answers = link.call("wait", b"", lambda: not stay.is_set())
    assert await asyncio.to_thread(next, answers) == b"begun"
    stay.set()
    assert await asyncio.to_thread(list, answers) == []
    await eventually(lambda: methods.running == 0)


async def test_a_server_that_closes(server: LinkServer, link: Link, methods: Methods) -> None:
    """Ends its calls; whoever asks then is told, and the name is free."""
    answers = link.call("wait")
    assert await asyncio.to_thread(next, answers) == b"begun"
    await server.close()
    assert methods.running == 0
    with pytest.raises(LinkLost, match="has gone"):
        await asyncio.to_thread(next, answers)
    with pytest.raises(LinkLost, match="no model listens"):
        await asyncio.to_thread(link.ask, "count", b"1")


async def test_a_kept_connection_finds_the_next_server(server: LinkServer, link: Link, name: str) -> None:
    """A model that was loaded again answers the next call."""
    assert await asyncio.to_thread(link.ask, "count", b"1") == b"0,"
    await server.close()
    await server.open()
    assert await asyncio.to_thread(link.ask, "count", b"2") == b"0,1,"


async def test_one_listens_under_a_name(server: LinkServer, name: str) -> None:
    """Another one is refused; who listens under a server's pid can be found."""
    with pytest.raises(OSError, match="in use"):
        await LinkServer(name, {}).open()
    assert name in links_of(os.getpid())
    assert links_of(0) == []


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\n\r\n", frame(b"\xc1"), b"dyn\x01\xff\xff\xff\xff"])
async def test_garbage_ends_the_connection(server: LinkServer, name: str, garbage: bytes) -> None:
    """And nothing else: others are served."""
    reader, writer = await asyncio.open_unix_connection("\0" + name)
    writer.write(garbage)
    with contextlib.suppress(ConnectionError):
        assert await reader.read() == b""
    writer.close()
    assert await asyncio.to_thread(ask_once, name, "count", b"1") == b"0,"


async def test_another_users_process_is_turned_away(
    server: LinkServer, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Either side looks at the other one's user."""
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(LinkLost, match="another user's"):
        await asyncio.to_thread(ask_once, name, "count", b"1")
    reader, writer = await asyncio.open_unix_connection("\0" + name)
    with contextlib.suppress(ConnectionError):
        assert await reader.read() == b""
    writer.close()


def test_a_call_to_a_listener_that_says_nothing(name: str) -> None:
    """A process that hangs up without a word is one that has gone."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("\0" + name)
        listener.listen()
        thread = threading.Thread(target=lambda: listener.accept()[0].close())
        thread.start()
        with pytest.raises(LinkLost, match="has gone"):
            ask_once(name, "count", b"1")
        thread.join()
