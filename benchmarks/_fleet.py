"""What a running cluster shows of itself: its workers, what they hold, and what they and the router have counted.

For disagg_kill.py and tests/e2e.
"""

import asyncio
import os
import signal
import time
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from _cluster import status

from dynamo_llm import process_tree
from kvstore.registry import Registry

WORKER, ROUTER = "dynamo_llm_worker_", "dynamo_llm_router_"
HELD = (
    "kv_blocks_used",
    "kv_blocks_pinned",
    "kv_pins",
    "kv_transfers_running",
    "kv_transfers_unsettled",
    "requests_running",
    "requests_waiting",
)
"""Gauges of a worker that are 0 when nobody asks anything."""


@dataclass(frozen=True)
class Worker:
    """One instance, as the router sees it."""

    instance: str
    role: str
    pid: int
    inflight: int
    metrics_url: str

    def kill(self, what: str) -> None:
        """With -9: the `process` with the engine, its Triton `server`, or a `node`: all of it, stubs as well."""
        family = {"process": [self.pid], "server": self._family("tritonserver"), "node": self._family("")}[what]
        if not family:
            raise LookupError(f"worker {self.pid} has no {what}")
        for pid in family:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _family(self, program: str) -> list[int]:
        """Processes of the worker that run this program; all where it is empty."""
        variables = Path(f"/proc/{self.pid}/environ").read_text().split("\0")
        mark = next(v.partition("=")[2] for v in variables if v.startswith(f"{process_tree.MARK_VARIABLE}="))
        return [pid for pid in process_tree.members(mark) if program in Path(f"/proc/{pid}/comm").read_text()]

    async def held(self) -> Counter[str]:
        """What it holds at the moment."""
        try:
            figures = await read_figures(self.metrics_url)
        except OSError:  # it is ending
            return Counter(unreachable=1)
        return Counter({name: int(total(figures, WORKER + name)) for name in HELD})


async def read_figures(url: str) -> dict[str, float]:
    """Samples by name and labels as they stand in Prometheus' text. Raises `OSError`."""

    def fetch() -> str:
        with urllib.request.urlopen(url, timeout=10) as response:
            return response.read().decode()

    lines = (await asyncio.to_thread(fetch)).splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def total(figures: dict[str, float], name: str) -> float:
    """Of all samples of that name."""
    return sum(value for key, value in figures.items() if key.partition("{")[0] == name)


def by_label(figures: dict[str, float], name: str, *labels: str) -> Counter[str]:
    """Samples of that name, by the values of their labels."""
    counts: Counter[str] = Counter()
    for key, value in figures.items():
        if key.partition("{")[0] == name:
            pairs = dict(pair.split("=", 1) for pair in key.partition("{")[2].rstrip("}").split(","))
            counts["/".join(pairs[label].strip('"') for label in labels)] += int(value)
    return counts


class Fleet:
    """See the module's docstring."""

    def __init__(self, base: str, registry: Registry) -> None:
        self.base = base
        self._registry = registry

    async def workers(self, role: str = "") -> list[Worker]:
        """Those that take requests, of this role; none while the router does not answer."""
        urls = {card.instance: card.metrics_url for card in await self._registry.instances()}
        try:
            instances = (await asyncio.to_thread(status, self.base))["instances"]
        except OSError:
            return []
        return [
            Worker(i["instance"], i["role"], i["pid"], i["inflight"], urls[i["instance"]])
            for i in instances
            if i["ready"] and i["instance"] in urls and role in ("", i["role"])
        ]

    async def until_ready(self, role: str, count: int, timeout_s: float = 120.0) -> list[Worker]:
        """So many workers of a role take requests. Raises `TimeoutError`."""
        found: list[Worker] = []

        async def enough() -> bool:
            nonlocal found
            found = await self.workers(role)
            return len(found) >= count

        await until(enough, timeout_s, f"{count} {role} workers")
        return found

    async def held(self) -> Counter[str]:
        """What all living workers hold together."""
        held: Counter[str] = Counter()
        for worker in await self.workers():
            held += await worker.held()
        return held

    async def until_quiet(self, timeout_s: float) -> tuple[float, Counter[str]]:
        """Seconds until nobody holds anything, and what is held in the end: nothing, or it has leaked."""
        start_s = time.monotonic()
        while (held := await self.held()) and time.monotonic() - start_s < timeout_s:  # noqa: ASYNC110 - as in `until`
            await asyncio.sleep(0.02)
        return time.monotonic() - start_s, held

    async def counted(self) -> Counter[str]:
        """Where prompts were computed, and failures that were made good, as the router has counted them."""
        router = await read_figures(f"{self.base}/metrics")
        counts = Counter({"prefill queued": int(total(router, ROUTER + "prefills_queued_total"))})
        for short, name, labels in (
            ("prefill", "prefills_total", ("where", "reason")),
            ("prefill failed", "remote_prefill_failures_total", ("reason",)),
            ("migration", "migrations_total", ("reason",)),
        ):
            counts.update({f"{short} {label}": n for label, n in by_label(router, ROUTER + name, *labels).items()})
        return counts

    async def pulls(self) -> dict[str, Counter[str]]:
        """By instance: pulls that failed, by reason, and pins that lasted until their lease was over."""
        found = {}
        for worker in await self.workers():
            figures = await read_figures(worker.metrics_url)
            counts = by_label(figures, WORKER + "kv_transfer_failures_total", "reason")
            counts["lease over"] = int(total(figures, WORKER + "kv_pins_expired_total"))
            found[worker.instance] = counts
        return found


@asynccontextmanager
async def hanging_pulls(
    writers: list[Worker], readers: list[Worker], send: Callable[[], Awaitable[object]] | None = None
) -> AsyncIterator[int]:
    """Pulls of these readers hang until the end; yields how many. Needs load, and a transport that needs the writer.

    Readers are stopped until there is something for them, then the writers are, and the readers go on. `send` is to
    bring the load, unless there is some.
    """
    with ExitStack() as until_the_end:
        with stopped(readers):
            if send is not None:
                await send()
            await lasting(lambda: held_of(writers, "kv_pins"))
            until_the_end.enter_context(stopped(writers))
        yield await lasting(lambda: held_of(readers, "kv_transfers_running"))


@contextmanager
def stopped(workers: list[Worker]) -> Iterator[None]:
    """Their engines stand still. Whoever is dead in the end is passed over."""
    for worker in workers:
        os.kill(worker.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for worker in workers:
            with suppress(ProcessLookupError):
                os.kill(worker.pid, signal.SIGCONT)


async def held_of(workers: list[Worker], gauge: str) -> int:
    """Together."""
    return sum([(await worker.held())[gauge] for worker in workers])


async def lasting(count: Callable[[], Awaitable[int]], timeout_s: float = 3.0) -> int:
    """A count that is not 0 three times in a row; 0 where that does not come about."""
    deadline_s, seen = time.monotonic() + timeout_s, 0
    while seen < 3 and time.monotonic() < deadline_s:
        seen = seen + 1 if (counted := await count()) else 0
        await asyncio.sleep(0.02)
    return counted if seen else 0


async def until(condition: Callable[[], Awaitable[object]], timeout_s: float, what: str) -> None:
    """Poll an awaited condition. Raises `TimeoutError`."""
    deadline_s = time.monotonic() + timeout_s
    while not await condition():
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"not within {timeout_s:g} s: {what}")
        await asyncio.sleep(0.02)
