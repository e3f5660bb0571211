"""Which tokens the next step computes, as vLLM decides it. Pure: no clock, no tokens, no I/O.

`MockEngine` drives it in real time, `SimulatedInstance` in simulated time; both call `begin`, let the time pass that
the run takes, and call `end`. Running sequences decode first, one token each; what is left of the step's token budget
goes to prompts that are half computed and then to waiting requests, by priority and arrival. A sequence enters with
blocks for all its tokens, so only decoding can run out of them: then the running sequence that is least urgent gives
its blocks back, waits again, and recomputes its tokens later, mostly from the cache.

Of a disaggregated request, the sequence of the prefill worker keeps its blocks when it ends (`release`), and that of
the decode worker enters the batch with blocks for the caller to fill (`take_arriving`, `arrived`). One that has to give
these back computes its tokens itself.

Every decoding sequence gets a token in every step, so a length is an offset to the count of steps, and a run of many
steps in which nothing else happens costs no more than one. What is to happen (a block is full, a sequence ends) stands
in an agenda, a heap by the count of steps.
"""

from bisect import bisect_left, insort
from heapq import heappop, heappush
from operator import attrgetter
from typing import Generic, TypeVar

from dynamo_llm.engines.mock_engine.blocks import BlockPool
from dynamo_llm.engines.mock_engine.sequence import MockSequence
from dynamo_llm.engines.mock_engine.timing import Timing
from kvstore.wire import Load

_S = TypeVar("_S", bound=MockSequence)
_urgency = attrgetter("urgency")


class Run(Generic[_S]):
    """`steps` equal steps. More than one where nothing but decoding happens in them."""

    __slots__ = ("chunks", "decoding", "finished", "first", "preempted", "prefill_tokens", "step_ms", "steps")

    def __init__(self, steps: int, step_ms: float, chunks: list[tuple[_S, int]], decoding: int, preempted: int) -> None:
        self.steps = steps
        """May be lowered, to 1 at least, before the run ends: somebody came who wants to join."""
        self.step_ms = step_ms
        """What each of them takes, in the time of the timing model."""
        self.chunks = chunks
        """Sequences whose prompt is computed, and how many tokens of it."""
        self.prefill_tokens = sum(tokens for _, tokens in chunks)
        self.decoding = decoding
        """Sequences that get a token in each step."""
        self.preempted = preempted
        """Sequences that had to give their blocks back before it."""
        self.first: list[_S] = []
        """Set by `end`: their prompt is computed, and they got the token that follows it."""
        self.finished: list[_S] = []
        """Set by `end`: they got their last token, and hold nothing any more, unless they keep their blocks."""


class MockScheduler(Generic[_S]):
    """Holds every sequence of an engine."""

    def __init__(self, blocks: BlockPool, timing: Timing, *, max_batch_tokens: int = 8192, max_seqs: int = 256) -> None:
        """`max_batch_tokens` is at least `max_seqs`, or sequences could not all decode in a step."""
        self.blocks, self.timing = blocks, timing
        self.max_batch_tokens, self.max_seqs = max_batch_tokens, max_seqs
        self.waiting: list[_S] = []
        """The most urgent last."""
        self.prefilling: dict[_S, None] = {}
        """In the batch, some of the prompt to be computed; in the order in which they entered."""
        self.arriving: dict[_S, None] = {}
        """In the batch, their blocks to be filled from elsewhere; in the order in which they entered."""
        self.decoding: dict[_S, None] = {}
        self.steps = 0
        """Steps that have ended."""
        self.preemptions = 0
        """So far."""
        self._arrivals = 0
        self._tickets = 0
        self._queued_tokens = 0
        """To be computed, of the sequences in `waiting` and `prefilling`."""
        self._agenda: list[tuple[int, int, _S]] = []
        """(count of steps, ticket, sequence); what has another ticket now is void."""
        self._growing: list[_S] = []
        """Decoding sequences whose next token begins a block."""
        self._entered: list[_S] = []
        """See `take_arriving`."""

    # --- between runs, or during one ----------------------------------------------------------------------------------

    def add(self, sequence: _S, priority: int = 0) -> None:
        """Queue a new sequence. The lower its priority, the sooner; equal ones by arrival."""
        self._arrivals += 1
        sequence.urgency = (-priority, -self._arrivals)
        self._wait(sequence)

    def load(self, prefill_tokens_per_s: float = 0.0, decode_step_ms: float = 0.0) -> Load:
        """The speeds are the caller's to measure."""
        return Load(
            running=self._running,
            waiting=len(self.waiting),
            waiting_prefill_tokens=self._queued_tokens,
            kv_blocks_used=self.blocks.used,
            kv_blocks_cached=self.blocks.cached,
            kv_blocks_total=self.blocks.kv_blocks,
            prefill_tokens_per_s=prefill_tokens_per_s,
            decode_step_ms=decode_step_ms,
        )

    def length_of(self, sequence: _S) -> int:
        """Its tokens so far, prompt and output."""
        return sequence.offset + self.steps if sequence.ticket >= 0 else sequence.length

    # --- between runs -------------------------------------------------------------------------------------------------

    def take_arriving(self) -> list[_S]:
        """Those that have entered the batch since the last call and await their blocks: the caller has them filled,
        but for the leading `computed` tokens of each, which were in the cache."""
        entered, self._entered = self._entered, []
        return entered

    def arrived(self, sequence: _S) -> None:
        """The blocks of one in `arriving` are filled. It decodes from the next run on."""
        del self.arriving[sequence]
        sequence.awaits_blocks = False
        sequence.computed = sequence.length - 1
        self.blocks.commit(sequence, sequence.computed)
        self._start_decoding(sequence)

    def release(self, sequence: _S) -> None:
        """Free what a sequence that has ended was to keep."""
        self.blocks.release(sequence)

    def remove(self, sequence: _S) -> None:
        """Forget a sequence that has not ended, and free its blocks."""
        if sequence.ticket >= 0:
            self._stop_decoding(sequence)
        elif sequence in self.prefilling:
            del self.prefilling[sequence]
            self._queued_tokens -= sequence.length - sequence.computed
        elif sequence in self.arriving:
            del self.arriving[sequence]
        else:
            del self.waiting[bisect_left(self.waiting, sequence.urgency, key=_urgency)]
            self._queued_tokens -= _to_compute(sequence)
        self.blocks.release(sequence)

    def begin(self, most_steps: int | None = None) -> Run[_S] | None:
        """The next run, at most `most_steps` long; None when there is nothing to do."""
        preemptions = self.preemptions
        if self._growing:
            self._grow()
        preempted = self.preemptions - preemptions
        budget = self.max_batch_tokens - len(self.decoding)
        chunks: list[tuple[_S, int]] = []
        for sequence in self.prefilling:
            budget -= self._chunk(chunks, sequence, budget)
        # After a preemption nobody enters: the victim would come straight back.
        while budget and not preempted and (admitted := self._admit()):
            if admitted.awaits_blocks:
                continue
            budget -= self._chunk(chunks, admitted, budget)
        decoding = len(self.decoding)
        if not chunks and not decoding:
            return None if not preempted else self.begin(most_steps)
        steps = 1 if chunks else self._quiet_steps()
        if most_steps is not None:
            steps = min(steps, most_steps)
        run = Run(steps, 0.0, chunks, decoding, preempted)
        run.step_ms = self.timing.prefill_ms(run.prefill_tokens)
        if decoding:
            run.step_ms += self.timing.decode_ms(self.blocks.used / self.blocks.kv_blocks)
        return run

    def end(self, run: Run[_S]) -> None:
        """The run's time has passed: all that it computed is there. Fills in `run.first` and `run.finished`."""
        self.steps += run.steps
        agenda = self._agenda
        while agenda and agenda[0][0] <= self.steps:
            _, ticket, sequence = heappop(agenda)
            if sequence.ticket == ticket:
                self._keep_appointment(sequence, run)
        for sequence, tokens in run.chunks:
            sequence.computed += tokens
            self._queued_tokens -= tokens
            self.blocks.commit(sequence, sequence.computed)
            if sequence.computed == sequence.length:
                del self.prefilling[sequence]
                self._first_token(sequence, run)
        if not self.decoding:
            agenda.clear()

    # --- parts of a run -----------------------------------------------------------------------------------------------

    def _wait(self, sequence: _S) -> None:
        insort(self.waiting, sequence, key=_urgency)
        self._queued_tokens += _to_compute(sequence)

    @property
    def _running(self) -> int:
        return len(self.prefilling) + len(self.arriving) + len(self.decoding)

    def _grow(self) -> None:
        """A block for each sequence that needs one, the most urgent first, so that no victim has got one yet."""
        growing, self._growing = sorted(self._growing, key=_urgency, reverse=True), []
        for sequence in growing:
            while sequence.ticket >= 0 and not self.blocks.extend(sequence):
                self._preempt(min((*self.prefilling, *self.arriving, *self.decoding), key=_urgency))

    def _preempt(self, sequence: _S) -> None:
        self.preemptions += 1
        self.remove(sequence)
        sequence.awaits_blocks = False  # whatever comes would come into blocks of others
        self._wait(sequence)

    def _admit(self) -> _S | None:
        """The most urgent waiting sequence, in the batch now; None when there is none or it does not fit.

        Each running sequence keeps a block to grow into, or admissions would be preempted at once.
        """
        running = self._running
        if not self.waiting or running >= self.max_seqs:
            return None
        sequence = self.waiting[-1]
        if not self.blocks.admit(sequence, reserve=running):
            return None
        self.waiting.pop()
        if sequence.awaits_blocks:
            self.arriving[sequence] = None
            self._entered.append(sequence)
        else:
            self.prefilling[sequence] = None
            self._queued_tokens -= sequence.computed
        if sequence.cached_tokens < 0:
            sequence.cached_tokens = sequence.computed
        return sequence

    @staticmethod
    def _chunk(chunks: list[tuple[_S, int]], sequence: _S, budget: int) -> int:
        """Append as much of the sequence's prompt as the budget allows; returns its tokens."""
        tokens = min(sequence.length - sequence.computed, budget)
        if tokens:
            chunks.append((sequence, tokens))
        return tokens

    def _quiet_steps(self) -> int:
        """Steps until something happens to a decoding sequence; there is one, so something will."""
        agenda = self._agenda
        while agenda[0][2].ticket != agenda[0][1]:
            heappop(agenda)
        return agenda[0][0] - self.steps

    def _first_token(self, sequence: _S, run: Run[_S]) -> None:
        """The prompt is computed, and with it the token that follows."""
        sequence.length += 1
        run.first.append(sequence)
        if sequence.length >= sequence.max_length:
            self._finish(sequence, run)
        else:
            self._start_decoding(sequence)

    def _start_decoding(self, sequence: _S) -> None:
        """All its tokens but the last one are computed."""
        self.decoding[sequence] = None
        sequence.offset = sequence.length - self.steps
        sequence.last_step = sequence.max_length - sequence.offset
        self._make_appointment(sequence, sequence.length - 1)

    def _make_appointment(self, sequence: _S, computed: int) -> None:
        """Come back to a decoding sequence when its block is full, or it ends before."""
        size = self.blocks.block_size
        in_block = computed % size
        if computed == sequence.held * size:
            self._growing.append(sequence)
        self._tickets += 1
        sequence.ticket = self._tickets
        due = min(self.steps + size - in_block, sequence.last_step)
        heappush(self._agenda, (due, self._tickets, sequence))

    def _keep_appointment(self, sequence: _S, run: Run[_S]) -> None:
        computed = sequence.offset + self.steps - 1
        self.blocks.commit(sequence, computed)
        if self.steps < sequence.last_step:
            self._make_appointment(sequence, computed)
        else:
            self._stop_decoding(sequence)
            self._finish(sequence, run)

    def _stop_decoding(self, sequence: _S) -> None:
        del self.decoding[sequence]
        sequence.length = sequence.offset + self.steps
        sequence.ticket = -1

    def _finish(self, sequence: _S, run: Run[_S]) -> None:
        run.finished.append(sequence)
        if not sequence.keeps_blocks:
            self.blocks.release(sequence)


def _to_compute(sequence: MockSequence) -> int:
    """Tokens of a waiting sequence that this engine has to compute before it decodes."""
    return 0 if sequence.awaits_blocks else sequence.length
