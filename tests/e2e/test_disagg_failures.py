"""Disaggregated clusters lose no request and no block when workers are killed or stand still, or clients leave.

The parts are real, NIXL goes over TCP as between machines. `benchmarks/disagg_kill.py` does at length what the first
test does in short.
"""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import router  # noqa: F401 - before benchmarks/router.py can be taken for it
from kvstore.connect import connect
from kvstore.embedded import EmbeddedRedis
from kvstore.keys import Keys
from kvstore.registry import Registry

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from _cluster import status  # noqa: E402
from _fleet import Fleet, Worker, hanging_pulls, held_of, lasting, read_figures, stopped, total, until  # noqa: E402
from _streams import Answer, Client, make_prompts  # noqa: E402

SOON_S = 10.0
"""Blocks are free again long before this, and the lease of 30 s is over long after."""
CLIENTS = 12


@pytest.mark.timeout(300)
def test_workers_are_killed() -> None:
    """Two of each role, with -9 and under load: each answer comes and is right, and each block is free again."""
    program = [sys.executable, str(BENCHMARKS / "disagg_kill.py"), "--kills", "2", "--keep-one", "--json"]
    ran = subprocess.run(program, capture_output=True, text=True, timeout=280)
    assert ran.returncode == 0, ran.stderr[-3000:] + ran.stdout[-3000:]
    figures = json.loads(ran.stdout)
    assert figures["kills"] == {"prefill": 2, "decode": 2}
    assert figures["phases"]["one at a time"]["requests"] >= 4 * CLIENTS
    assert figures["counted"]["migration lost"] >= 1
    assert figures["leaked"] == 0


class Cluster:
    """A running one, and its client, who knows the answers."""

    def __init__(self, fleet: Fleet, client: Client, registry: Registry) -> None:
        self.fleet, self.client, self._registry = fleet, client, registry

    async def set(self, **settings: Any) -> None:
        """In force when it returns."""
        for name, value in settings.items():
            await self._registry.set_setting(name, value)

        async def in_force() -> bool:
            return settings.items() <= (await self.status())["disaggregation"].items()

        await until(in_force, 10.0, f"{settings} in force")

    async def status(self) -> dict[str, Any]:
        return await asyncio.to_thread(status, self.fleet.base)

    async def expired(self) -> float:
        """Pins whose lease was over before somebody gave them up."""
        return sum([pulls["lease over"] for pulls in (await self.fleet.pulls()).values()])


@pytest.fixture(scope="module")
def base(start_cluster: Callable[..., Any]) -> Iterator[tuple[str, str]]:
    """Addresses of the router and of Redis."""
    with EmbeddedRedis() as redis, pytest.MonkeyPatch.context() as patch:
        patch.setenv("UCX_TLS", "tcp")
        up = start_cluster("--redis", redis.url, "--mode", "disagg-router", "--prefill", "2", "--decode", "2")
        yield up.base, redis.url
        up.stop()


@pytest.fixture
async def cluster(base: tuple[str, str]) -> AsyncIterator[Cluster]:
    """All prompts are prefilled remotely."""
    async with connect(base[1]) as redis:
        registry = Registry(redis, Keys(namespace="default"))
        made = Cluster(Fleet(base[0], registry), Client(base[0], make_prompts(CLIENTS, 1900), 128), registry)
        await made.fleet.until_ready("prefill", 2)
        await made.fleet.until_ready("decode", 2)
        await made.set(remote_prefill="never", busy_prefill_tokens=0)
        await made.client.learn(CLIENTS)
        await made.set(remote_prefill="always", max_local_prefill_tokens=0)
        yield made


Send = Callable[[], Awaitable[object]]


@asynccontextmanager
async def queued(cluster: Cluster, send: Send) -> AsyncIterator[None]:
    """Prefill workers stand still with what they have, and others wait for them."""
    await cluster.set(busy_prefill_tokens=16)
    with stopped(await cluster.fleet.workers("prefill")):
        await send()
        await until(lambda: _router(cluster, "prefill_queue_depth"), 30.0, "tickets in the queue")
        yield


@asynccontextmanager
async def prefilling(cluster: Cluster, send: Send) -> AsyncIterator[None]:
    """Prefill workers have taken prompts on."""
    await send()
    workers = await cluster.fleet.workers("prefill")
    await until(lambda: held_of(workers, "requests_running"), 30.0, "prefills")
    yield


@asynccontextmanager
async def handed_over(cluster: Cluster, send: Send) -> AsyncIterator[None]:
    """Prefill workers hold blocks for decode workers that stand still. They let go while those still do."""
    workers = await cluster.fleet.workers("prefill")
    with stopped(await cluster.fleet.workers("decode")):
        await send()
        assert await lasting(lambda: held_of(workers, "kv_pins"), 30.0)
        yield
        await until(lambda: _none(workers, "kv_pins"), SOON_S, "no pins")


@asynccontextmanager
async def pulling(cluster: Cluster, send: Send) -> AsyncIterator[None]:
    """Decode workers wait for blocks of prefill workers that stand still. They give up while those still do."""
    writers, readers = await cluster.fleet.workers("prefill"), await cluster.fleet.workers("decode")
    async with hanging_pulls(writers, readers, send) as pulls:
        assert pulls
        yield
        await until(lambda: _none(readers, "requests_running"), SOON_S, "no decodes")


@asynccontextmanager
async def decoding(cluster: Cluster, send: Send) -> AsyncIterator[None]:
    """Streams go on behind their first tokens."""
    await send()
    workers = await cluster.fleet.workers("decode")
    await until(lambda: held_of(workers, "requests_running"), 30.0, "decodes")
    yield


async def _none(workers: list[Worker], gauge: str) -> bool:
    return not await held_of(workers, gauge)


async def _router(cluster: Cluster, name: str) -> float:
    return total(await read_figures(f"{cluster.fleet.base}/metrics"), f"dynamo_llm_router_{name}")


Stage = Callable[[Cluster, Send], Any]


@pytest.mark.timeout(180)
@pytest.mark.parametrize("stage", [queued, prefilling, handed_over, pulling, decoding])
async def test_clients_leave(cluster: Cluster, stage: Stage) -> None:
    """At whatever stage: both workers hear of it, and hold nothing long before any lease is over."""
    before, writers = await cluster.expired(), list[asyncio.StreamWriter]()

    async def send() -> None:
        for _ in range(CLIENTS):
            writers.append((await cluster.client.open(CLIENTS - 1))[1])

    async with stage(cluster, send):
        for writer in writers:
            writer.transport.abort()
    _, held = await cluster.fleet.until_quiet(SOON_S)
    assert held == {}
    assert await cluster.expired() == before
    await cluster.fleet.until_ready("prefill", 2)
    await answers_are_right(cluster)


async def answers_are_right(cluster: Cluster, tasks: list[Awaitable[Answer]] | None = None) -> None:
    """All of them; without any asked yet, of one request a prompt."""
    asked = tasks or [cluster.client.ask(Answer(prompt)) for prompt in range(CLIENTS)]
    for answer in await asyncio.gather(*asked):
        assert (answer.error, answer.text) == ("", cluster.client.known[answer.prompt])


async def pulled_bytes(cluster: Cluster) -> float:
    figures = [await read_figures(worker.metrics_url) for worker in await cluster.fleet.workers("decode")]
    return sum(total(each, "dynamo_llm_worker_kv_transfer_bytes_total") for each in figures)


@pytest.mark.timeout(180)
async def test_transfers_stall(cluster: Cluster) -> None:
    """Prefill workers stand still: past the deadline of a pull its prompt is computed by the decode worker. Later they
    go on, hold nothing, and are read from as before."""
    writers, readers = await cluster.fleet.workers("prefill"), await cluster.fleet.workers("decode")
    before = await cluster.fleet.pulls()
    asked: list[Awaitable[Answer]] = []

    async def send() -> None:
        asked.extend(asyncio.create_task(cluster.client.ask(Answer(prompt))) for prompt in range(CLIENTS))

    async with hanging_pulls(writers, readers, send) as pulls:
        assert pulls
        await answers_are_right(cluster, asked)
    after = await cluster.fleet.pulls()
    late = [after[reader.instance]["deadline"] - before[reader.instance]["deadline"] for reader in readers]
    assert sum(late) >= 1
    await cluster.fleet.until_ready("prefill", 2)
    _, held = await cluster.fleet.until_quiet(SOON_S)
    assert held == {}
    moved = await pulled_bytes(cluster)

    async def moves_again() -> bool:
        await answers_are_right(cluster)
        return await pulled_bytes(cluster) > moved

    await until(moves_again, 60.0, "blocks are pulled again")


@pytest.mark.timeout(180)
async def test_a_decode_worker_stands_still(cluster: Cluster) -> None:
    """For so long that it counts as lost: its streams go on elsewhere. Later it holds nothing, and is used again."""
    asked = [asyncio.create_task(cluster.client.ask(Answer(prompt))) for prompt in range(CLIENTS)]
    workers = await cluster.fleet.workers("decode")
    await until(lambda: held_of(workers[:1], "requests_running"), 30.0, "decodes")
    with stopped(workers[:1]):
        await answers_are_right(cluster, list(asked))
    await cluster.fleet.until_ready("decode", 2)
    _, held = await cluster.fleet.until_quiet(SOON_S)
    assert held == {}

    async def used_again() -> bool:
        answers = [await cluster.client.ask(Answer(0)) for _ in range(4)]
        return workers[0].instance in {answer.instance for answer in answers}

    await until(used_again, 60.0, "the worker is used")
