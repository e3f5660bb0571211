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
    joined: list[MockSequence]
    """Of those that decoded: the ones whose blocks came from another worker, and which had no token here before."""


class SimulatedInstance:
    """One engine."""

    def __init__(self, scheduler: MockScheduler[MockSequence]) -> None:
        self.scheduler = scheduler
        self.next_ms = inf
        """When something happens next by itself: `advance` is to be called then. Infinite: it has nothing to do."""
        self._run: Run[MockSequence] | None = None
        self._start_ms = 0.0
        self._cancelled: list[MockSequence] = []
        self._arrived: list[MockSequence] = []
        self._released: list[MockSequence] = []
        self._joined: list[MockSequence] = []

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

    def arrive(self, sequence: MockSequence, now_ms: float) -> None:
        """The blocks that a sequence awaited are filled: it joins the step that begins next unless it was preempted."""
        self._arrived.append(sequence)
        self._interrupt(now_ms)

    def release(self, sequence: MockSequence, now_ms: float) -> None:
        """Another worker has read what a sequence kept: free it when the step that is on ends."""
        self._released.append(sequence)
        self._interrupt(now_ms)

    def advance(self) -> Ended | None:
        """Go to `next_ms`: end the run, if one is on, and begin the next. `now` is what `next_ms` was."""
        now_ms, run, start_ms, joined = self.next_ms, self._run, self._start_ms, self._joined
        if run is not None:
            self.scheduler.end(run)
        self._heed(run)
        self._start_ms, self._run = now_ms, self.scheduler.begin()
        self._joined = [sequence for sequence in self._arrived if sequence in self.scheduler.decoding]
        self._arrived.clear()
        self.next_ms = inf if self._run is None else now_ms + self._run.steps * self._run.step_ms
        return None if run is None else Ended(start_ms, now_ms, run, joined)

    def _heed(self, run: Run[MockSequence] | None) -> None:
        """What was asked for during the run that has ended, or while there was none."""
        for sequence in self._cancelled:
            if run is None or sequence not in run.finished:
                self.scheduler.remove(sequence)
        self._cancelled.clear()
        for sequence in self._released:
            self.scheduler.release(sequence)
        self._released.clear()
        for sequence in self._arrived:
            if sequence in self.scheduler.arriving:
                self.scheduler.arrived(sequence)

    def _interrupt(self, now_ms: float) -> None:
        """End a run of several steps with the one that is on; begin one where there is none."""
        run = self._run
        if run is None:
            self.next_ms = min(self.next_ms, now_ms)
        elif run.steps > 1 and run.step_ms:
            run.steps = min(run.steps, max(1, ceil((now_ms - self._start_ms) / run.step_ms)))
            self.next_ms = self._start_ms + run.steps * run.step_ms
