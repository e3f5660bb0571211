"""A whole router on real ports over a real Redis, in front of scripted workers."""

import itertools
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import msgspec
import openai
import pytest
from redis.asyncio import Redis

from kvstore.keys import Keys
from kvstore.registry import Registry
from router.app import Application
from router.config import RouterConfig

sys.path.insert(0, str(Path(__file__).parent))

from scripted_worker import Script, ScriptedWorker, silent

_namespaces = itertools.count()


class Cluster:
    """What a test starts; all of it ends with the test, in reverse."""

    def __init__(self, redis: Redis, redis_url: str, stack: AsyncExitStack, eventually: Any) -> None:
        self.keys = Keys(namespace=f"router-{next(_namespaces)}")
        self.registry = Registry(redis, self.keys)
        self.config = RouterConfig(
            redis_url=redis_url,
            namespace=self.keys.namespace,
            http_port=0,
            grpc_port=0,
            drain_timeout_s=2.0,
            worker_wait_s=5.0,
        )
        self.workers: list[ScriptedWorker] = []
        self._stack = stack
        self._eventually = eventually

    async def worker(self, script: Script = silent, **options: Any) -> ScriptedWorker:
        """One more worker, registered."""
        made = ScriptedWorker(f"{len(self.workers) + 1:016x}", script, **options)
        self.workers.append(made)
        self._stack.push_async_callback(made.close)
        await made.start()
        return await made.register(self.registry, self.keys)

    async def router(self, **changes: Any) -> Application:
        """A router that is connected to all workers so far."""
        config = msgspec.structs.replace(self.config, **changes)
        application = await self._stack.enter_async_context(Application(config))
        await self.connected(application)
        return application

    async def connected(self, application: Application, workers: int | None = None) -> None:
        """Wait until so many workers take requests."""
        wanted = len(self.workers) if workers is None else workers
        await self._eventually(lambda: sum(c.ready for c in application.pool.connections()) == wanted)
        if wanted:
            await self._eventually(lambda: application.pool.can_serve())

    def client(self, application: Application) -> openai.AsyncOpenAI:
        """The real client, without its own retries."""
        made = openai.AsyncOpenAI(base_url=f"{url_of(application)}/v1", api_key="none", max_retries=0, timeout=20)
        self._stack.push_async_callback(made.close)
        return made


def url_of(application: Application) -> str:
    return f"http://127.0.0.1:{application.http_port}"


@pytest.fixture
async def cluster(redis: Redis, redis_url: str, eventually: Callable[..., Awaitable[None]]) -> AsyncIterator[Cluster]:
    async with AsyncExitStack() as stack:
        yield Cluster(redis, redis_url, stack, eventually)
