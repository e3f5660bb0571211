"""The router as a process: it starts, says so, refuses in one line, and drains on a signal."""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx2 as httpx
import pytest
from scripted_worker import EOS, ids_of, says

from kvstore import wire

CHAT = {"model": "demo", "messages": [{"role": "user", "content": "hi"}]}


@asynccontextmanager
async def running(*arguments: str, **environment: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "router",
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "NO_COLOR": "1", **environment},
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


def started(cluster: Any, redis_url: str) -> Any:
    ports = ("--http-port", "0", "--grpc-port", "0")
    return running("--namespace", cluster.keys.namespace, *ports, DYNAMO_LLM_REDIS=redis_url)


async def ready_url(process: asyncio.subprocess.Process) -> str:
    line = await asyncio.wait_for(process.stdout.readline(), 20)
    word, url, grpc, _ = line.decode().split()
    assert (word, grpc) == ("ready", "grpc")
    return url


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_drains_on_a_signal(
    cluster, redis_url: str, eventually: Callable[..., Awaitable[None]], number: signal.Signals
) -> None:
    """After a signal the answer in flight comes to its end, nothing new is taken, and the exit code is 0."""
    worker = await cluster.worker(says("one two", until=1))
    async with started(cluster, redis_url) as process, httpx.AsyncClient(timeout=20) as http:
        url = await ready_url(process)

        async def is_ready() -> bool:
            return (await http.get(f"{url}/ready")).status_code == 200

        await eventually(is_ready)
        answer = asyncio.create_task(http.post(f"{url}/v1/chat/completions", json=CHAT))
        await eventually(lambda: worker.submits)
        process.send_signal(number)

        async def refuses() -> bool:
            try:
                async with httpx.AsyncClient() as other:
                    await other.get(f"{url}/live")
            except httpx.TransportError:  # refused, or taken just before the listener closed, and dropped
                return True
            return False

        await eventually(refuses)
        worker.emit(wire.Output(worker.submits[0].rid, [*ids_of("one two")[1:], EOS], "stop"))
        assert (await answer).json()["choices"][0]["message"]["content"] == "one two"
        assert await asyncio.wait_for(process.wait(), 20) == 0
        assert await process.stderr.read() == b""


async def refusal(*arguments: str) -> str:
    async with running(*arguments) as process:
        out, err = await asyncio.wait_for(process.communicate(), 20)
        assert (process.returncode, out) == (2, b"")
        return err.decode()


async def test_a_busy_port(redis_url: str) -> None:
    """A port in use is one line that names the flag, for either port."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for flag, other in (("--http-port", "--grpc-port"), ("--grpc-port", "--http-port")):
            message = await refusal("--redis", redis_url, flag, port, other, "0")
            assert message.count("\n") == 1
            assert port in message
            assert flag in message


async def test_a_redis_that_is_not_there() -> None:
    """Without its Redis the router does not start, and says why in one line."""
    message = await refusal("--redis", "redis://127.0.0.1:1", "--http-port", "0", "--grpc-port", "0")
    assert message.count("\n") == 1
    assert "127.0.0.1:1" in message


async def test_help() -> None:
    """The help names what one needs to know, without starting anything."""
    async with running("--help", COLUMNS="120") as process:
        out, _ = await asyncio.wait_for(process.communicate(), 20)
    text = out.decode()
    assert process.returncode == 0
    assert all(word in text for word in ("--redis", "--policy", "Examples", "SIGTERM"))


async def test_imports_are_lean() -> None:
    """A router loads none of the heavy packages that workers and tests need."""
    heavy = ["torch", "transformers", "pandas", "numba", "pytriton", "aiohttp", "dynamo_llm"]
    code = f"import sys, router.app; print([m for m in {heavy!r} if m in sys.modules])"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()
    assert out.decode().strip() == "[]"
