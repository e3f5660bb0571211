"""Worker processes on real Triton servers, for tests that hold router and worker to what lies between them.

The router's parts run in the test, the worker's in processes of their own, over the scripted engine. Both are seen
through the wire and Redis only, so the same tests serve every host.
"""

import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import tritonclient.grpc as triton

from kvstore.cards import InstanceCard
from kvstore.connect import connect
from kvstore.embedded import EmbeddedRedis
from kvstore.keys import Keys
from kvstore.registry import Registry
from router.worker_client import WorkerConnection

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "router"))
sys.path.insert(0, str(Path(__file__).parents[1] / "dynamo_llm"))

from observer import Observer
from worker_runner import Worker

HOSTS = {"pytriton": "worker_process.py", "triton": "tritonserver_process.py"}
"""A program for each host. It gets a worker's options as JSON and, when it is ready, says so as a worker does."""
SESSION_TIMEOUT_S = 3.0
_START_S = 90.0
_EXPENDABLE = 2
"""Workers that tests may end; all are started at once, because that takes seconds."""


class Site:
    """The worker that all tests share, and some that they may end."""

    def __init__(self, program: str, redis_url: str, folder: Path) -> None:
        self.redis_url = redis_url
        self.workers = [self._start(program, folder / str(number)) for number in range(1 + _EXPENDABLE)]
        self.used = 1

    def wait_ready(self) -> None:
        deadline_s = time.monotonic() + _START_S
        while waiting := [worker for worker in self.workers if not worker.is_ready]:
            if time.monotonic() > deadline_s:
                pytest.fail(f"not ready within {_START_S:g} s: {[worker.err for worker in waiting]}")
            time.sleep(0.02)
        for worker in self.workers:
            worker.look()

    def _start(self, program: str, folder: Path) -> Worker:
        folder.mkdir()
        options = {"step_s": 0.002}
        return Worker(
            folder,
            [program],
            redis_url=self.redis_url,
            session_timeout_s=SESSION_TIMEOUT_S,
            heartbeat_s=0.2,
            engine_options=options,
        )

    def stop(self) -> None:
        for worker in self.workers:
            worker.clean()


class Rig:
    """One test's view of a site: cards, connections, observers. All that it opens ends with the test."""

    def __init__(self, site: Site, registry: Registry, stack: AsyncExitStack, eventually: Any) -> None:
        self.registry = registry
        self._site = site
        self._stack = stack
        self._eventually = eventually

    async def card(self, worker: Worker) -> InstanceCard:
        cards = {card.instance: card for card in await self.registry.instances()}
        return cards[worker.fields["instance"]]

    async def shared(self) -> InstanceCard:
        """The worker to be left as it was found."""
        return await self.card(self._site.workers[0])

    async def expendable(self) -> tuple[InstanceCard, Worker]:
        """A worker that nobody else uses, and its process."""
        worker = self._site.workers[self._site.used]
        self._site.used += 1
        return await self.card(worker), worker

    async def left_triton(self, card: InstanceCard, worker: Worker) -> None:
        """The drained worker serves no more: one of PyTriton's is the server, another one is a model among others."""
        if card.host == "triton":
            with triton.InferenceServerClient(card.grpc_address) as client:
                await self._eventually(lambda: not client.is_model_ready(card.model))
            worker.process.terminate()
        assert worker.wait() == 0

    async def connect(self, card: InstanceCard, name: str, on_change: Any = lambda: None) -> WorkerConnection:
        """A router's connection, its session open."""
        made = await self._stack.enter_async_context(WorkerConnection(card, name, 20.0, 20.0, on_change))
        await self._eventually(lambda: made.ready)
        return made

    def observe(self, card: InstanceCard) -> Observer:
        return self._stack.enter_context(Observer(card.grpc_address))


@pytest.fixture(scope="session", params=HOSTS)
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with EmbeddedRedis() as redis:
        site = Site(HOSTS[request.param], redis.url, tmp_path_factory.mktemp("site"))
        try:
            site.wait_ready()
            yield site
        finally:
            site.stop()


@pytest.fixture
async def rig(site: Site, eventually: Callable[..., Any]) -> AsyncIterator[Rig]:
    async with connect(site.redis_url) as redis, AsyncExitStack() as stack:
        yield Rig(site, Registry(redis, Keys()), stack, eventually)


@pytest.fixture
async def worker(rig: Rig) -> InstanceCard:
    """The shared worker's card."""
    return await rig.shared()


@pytest.fixture
async def observer(rig: Rig, worker: InstanceCard) -> Observer:
    return rig.observe(worker)


@pytest.fixture
async def connection(rig: Rig, worker: InstanceCard, request: pytest.FixtureRequest) -> WorkerConnection:
    """A router's connection to the shared worker, its session named after the test."""
    return await rig.connect(worker, request.node.name)
