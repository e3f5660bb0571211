"""The mock engine in simulated time. Pure: the caller owns the clock; simulators and the tests drive it.

Several instances share one clock: deliver what arrives until the earliest `next_ms` of all, then `advance` that
instance. What arrives at the same instant is delivered before any instance advances to it, and so shares a step.
"""

from math import ceil, inf

from msgspec import Struct

from dynamo_llm.engines.mock_engine.scheduler import MockScheduler, Run
from dynamo_llm.engines.mock_engine.sequence import MockSequence


class Ended(Struct, frozen=True, gc=False):
    """A run that is over."""

    start_ms: float
    end_ms: float
    run: Run[MockSequence]
    """Every decoding sequence got `run.steps` tokens, one each `run.step_ms`; each of `run.first` one at the end."""


class SimulatedInstance:
    """One engine."""

    def __init__(self, scheduler: MockScheduler[MockSequence]) -> None:
        self.scheduler = scheduler
        self.next_ms = inf
        """When something happens next by itself: `advance` is to be called then. Infinite: it has nothing to do."""
        self._run: Run[MockSequence] | None = None
        self._start_ms = 0.0
        self._cancelled: list[MockSequence] = []

    def submit(self, sequence: MockSequence, now_ms: float, priority: int = 0) -> None:
        """A request arrives. It can join the step that begins next."""
        self.scheduler.add(sequence, priority)
        self._interrupt(now_ms)

    def cancel(self, sequence: MockSequence, now_ms: float) -> None:
        """Forget a sequence that has not ended when the step that is on ends, as a real engine does.

        Once more changes nothing."""
        if sequence not in self._cancelled:
            self._cancelled.append(sequence)
        self._interrupt(now_ms)

    def advance(self) -> Ended | None:
        """Go to `next_ms`: end the run, if one is on, and begin the next. `now` is what `next_ms` was."""
        now_ms, run, start_ms = self.next_ms, self._run, self._start_ms
        if run is not None:
            self.scheduler.end(run)
        for sequence in self._cancelled:
            if run is None or sequence not in run.finished:
                self.scheduler.remove(sequence)
        self._cancelled.clear()
        self._start_ms, self._run = now_ms, self.scheduler.begin()
        self.next_ms = inf if self._run is None else now_ms + self._run.steps * self._run.step_ms
        return None if run is None else Ended(start_ms, now_ms, run)

    def _interrupt(self, now_ms: float) -> None:
        """End a run of several steps with the one that is on; begin one where there is none."""
        run = self._run
        if run is None:
            self.next_ms = min(self.next_ms, now_ms)
        elif run.steps > 1 and run.step_ms:
            run.steps = min(run.steps, max(1, ceil((now_ms - self._start_ms) / run.step_ms)))
            self.next_ms = self._start_ms + run.steps * run.step_ms
