"""Fixtures that every package's tests may use: a real Redis, and waiting for conditions instead of sleeping."""

import asyncio
import inspect
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from kvstore.connect import connect
from kvstore.embedded import EmbeddedRedis

os.environ.setdefault("UCX_NET_DEVICES", "lo")  # NIXL's transport would listen on every interface

sys.path.insert(0, str(Path(__file__).parent))  # for their modules: there are no packages under tests


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """A Redis for the whole run, on a unix socket. Use `redis` to get it emptied, or a key prefix of your own."""
    with EmbeddedRedis() as server:
        yield server.url


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    """A client of an empty Redis."""
    async with connect(redis_url) as client:
        await client.flushall()
        yield client


@pytest.fixture
def redis_server() -> Iterator[EmbeddedRedis]:
    """A Redis of the test's own on a loopback port: `kill` and `start` it as you like."""
    with EmbeddedRedis(port=0) as server:
        yield server


async def eventually(condition: Callable[[], bool | Awaitable[bool]], timeout_s: float = 10.0) -> None:
    """Wait until a condition holds; fail, naming it, when it does not within the deadline."""
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + timeout_s
    while True:
        result: Any = condition()
        if inspect.isawaitable(result):
            result = await result
        if result:
            return
        if loop.time() > deadline_s:
            pytest.fail(f"not within {timeout_s:g} s: {inspect.getsource(condition).strip()}")
        await asyncio.sleep(0.005)


@pytest.fixture(name="eventually", scope="session")
def eventually_fixture() -> Callable[..., Awaitable[None]]:
    """`await eventually(lambda: condition)`."""
    return eventually
