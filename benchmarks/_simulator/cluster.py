"""Workers on one clock, their reports, and a prefix index that follows their block events. `routing.py` drives it."""

from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from math import inf
from typing import Protocol

from msgspec import Struct

from dynamo_llm.engines.mock_engine.blocks import BlockPool
from dynamo_llm.engines.mock_engine.scheduler import MockScheduler
from dynamo_llm.engines.mock_engine.sequence import MockSequence
from dynamo_llm.engines.mock_engine.simulation import Ended, SimulatedInstance
from dynamo_llm.engines.mock_engine.timing import Timing
from dynamo_llm.engines.torch_engine.speed import Speed
from kvstore.index.memory import MemoryIndex
from router.loads import WorkerLoad


class EngineOptions(Struct, frozen=True, kw_only=True):
    """Of one mock engine (docs/engine-mock.md)."""

    block_size: int = 64
    kv_blocks: int = 16384
    max_batch_tokens: int = 8192
    max_seqs: int = 256
    timing: Timing = Timing()

    def scheduler(self) -> MockScheduler[MockSequence]:
        return MockScheduler(
            BlockPool(self.kv_blocks, self.block_size),
            self.timing,
            max_batch_tokens=self.max_batch_tokens,
            max_seqs=self.max_seqs,
        )


class Worker:
    """One instance, with what a router knows of it."""

    def __init__(self, name: str, role: str, options: EngineOptions) -> None:
        self.name, self.role = name, role
        self.instance = SimulatedInstance(options.scheduler())
        self.load = WorkerLoad(options.block_size)
        self.link_free_ms = 0.0
        """When its link to other workers has carried all that it was given."""
        self._speed = Speed()
        self._steps = 0

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens that it has still to compute."""
        return self.instance.scheduler.load().waiting_prefill_tokens

    def report(self, ended: Ended) -> None:
        """As a real worker does after a step. It tells the router of all that it was given by then."""
        run = ended.run
        self._speed.note(run.prefill_tokens, run.decoding, run.step_ms / 1e3, run.steps)
        load = self.instance.scheduler.load(self._speed.prefill_tokens_per_s, self._speed.decode_step_ms)
        self.load.on_report(load, ended.end_ms / 1e3)


def make_workers(shape: Sequence[tuple[str, int]], options: EngineOptions) -> list[Worker]:
    """`shape`: how many workers of which role."""
    return [Worker(f"{role}-{number}", role, options) for role, count in shape for number in range(count)]


class Observer(Protocol):
    """Who is told what happens on the workers, while the clock stands at it."""

    def on_ended(self, worker: Worker, ended: Ended) -> None:
        """Its report has been taken in before."""

    def on_arriving(self, worker: Worker, sequence: MockSequence) -> None:
        """The sequence has blocks there, which are to be filled: see `MockScheduler.take_arriving`."""

    def on_preempted(self, worker: Worker) -> None:
        """Some of its sequences had to give their blocks back: they are waiting, or prefilling again."""


class Cluster:
    """See the module's docstring."""

    def __init__(self, workers: Sequence[Worker]) -> None:
        self.workers = workers
        self.index = MemoryIndex()
        self.now_ms = 0.0
        self.advances = 0
        """So far: what a simulation costs."""
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._entries = 0

    def at(self, time_ms: float, action: Callable[[], None]) -> None:
        """Call `action` at that time; of several at the same one in this order, and before any worker gets to it."""
        self._entries += 1
        heappush(self._agenda, (time_ms, self._entries, action))

    def run(self, observer: Observer) -> None:
        """Until nothing is left to happen."""
        agenda, workers = self._agenda, self.workers
        while True:
            worker = min(workers, key=_next_ms)
            next_ms = worker.instance.next_ms
            if agenda and agenda[0][0] <= next_ms:
                time_ms, _, action = heappop(agenda)
                self.now_ms = max(self.now_ms, time_ms)
                action()
            elif next_ms < inf:
                self.now_ms = max(self.now_ms, next_ms)
                self._advance(worker, observer)
            else:
                return

    def _advance(self, worker: Worker, observer: Observer) -> None:
        self.advances += 1
        scheduler = worker.instance.scheduler
        preemptions = scheduler.preemptions
        ended = worker.instance.advance()
        if ops := scheduler.blocks.take_ops():
            self.index.apply(worker.name, ops)
        if ended is not None:
            worker.report(ended)
            observer.on_ended(worker, ended)
        if scheduler.preemptions != preemptions:
            observer.on_preempted(worker)
        for sequence in scheduler.take_arriving():
            observer.on_arriving(worker, sequence)


def _next_ms(worker: Worker) -> float:
    return worker.instance.next_ms
