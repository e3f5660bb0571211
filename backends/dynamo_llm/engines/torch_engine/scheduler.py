"""Which tokens the next step computes. Pure: no torch, no clock, no I/O; the engine's step and the tests call it.

Running sequences decode first, one token each; what is left of the step's token budget goes to prompts that are being
prefilled and then to waiting requests, by priority and arrival. A sequence enters the batch with blocks for all its
tokens, so only decoding can run out of them: then the running sequence that is least urgent (lowest priority, latest
arrival) gives its blocks back and waits again; its tokens are kept and recomputed, mostly from the prefix cache.
"""

from bisect import insort
from collections.abc import Iterable

from msgspec import Struct

from dynamo_llm.engines.torch_engine.blocks import BlockManager
from dynamo_llm.engines.torch_engine.sequence import Sequence


class Work(Struct, frozen=True, gc=False):
    """`tokens` tokens of a sequence, from `sequence.computed` on."""

    sequence: Sequence
    tokens: int

    @property
    def completes(self) -> bool:
        """After it the next token can be sampled."""
        return self.sequence.computed + self.tokens == len(self.sequence.tokens)


def _urgency(sequence: Sequence) -> tuple[int, int]:
    return sequence.priority, sequence.order


class Scheduler:
    """Holds every sequence of the engine, waiting and running, each list most urgent first."""

    def __init__(self, blocks: BlockManager, *, max_batch_tokens: int, max_seqs: int) -> None:
        self.blocks = blocks
        self.max_batch_tokens, self.max_seqs = max_batch_tokens, max_seqs
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self.preemptions = 0
        """So far."""
        self._arrivals = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        self._arrivals += 1
        sequence.order = self._arrivals
        insort(self.waiting, sequence, key=_urgency)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, finished or cancelled, and free its blocks."""
        (self.running if sequence.row >= 0 else self.waiting).remove(sequence)
        self.blocks.release(sequence)

    def restart(self, sequence: Sequence) -> None:
        """Take a running sequence out of the batch; it waits for its turn again, with what is cached and new blocks."""
        self.running.remove(sequence)
        self.blocks.release(sequence)
        insort(self.waiting, sequence, key=_urgency)

    def schedule(self) -> list[Work]:
        """The work of the next step, at most `max_batch_tokens` tokens; empty when there is nothing to do."""
        preemptions = self.preemptions
        work = self._decodes()
        budget = self.max_batch_tokens - len(work)
        for sequence in self._prefilling():
            budget -= self._take(work, sequence, budget)
        # After a preemption nobody enters: the victim would come straight back.
        while budget and self.preemptions == preemptions and (admitted := self._admit()):
            if not admitted.awaits_blocks:
                budget -= self._take(work, admitted, budget)
        return work

    def advance(self, work: Iterable[Work]) -> None:
        """The work has been computed."""
        for item in work:
            item.sequence.computed += item.tokens
            self.blocks.commit(item.sequence)

    def _decodes(self) -> list[Work]:
        """One token of each sequence whose prompt is done, most urgent first, so that no victim has been chosen yet."""
        return [
            Work(sequence, 1)
            for sequence in tuple(self.running)
            if sequence.row >= 0
            and not sequence.awaits_blocks
            and sequence.computed == len(sequence.tokens) - 1
            and self._make_room(sequence)
        ]

    def _make_room(self, sequence: Sequence) -> bool:
        """A place for its newest token; False when the sequence itself had to give way."""
        while not self.blocks.extend(sequence):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        self.restart(sequence)

    def _prefilling(self) -> list[Sequence]:
        return [s for s in self.running if s.computed < len(s.tokens) - 1 and not s.awaits_blocks]

    def _admit(self) -> Sequence | None:
        """The most urgent waiting sequence, in the batch now; None when there is none or it does not fit.

        Each running sequence keeps a free block to grow into, or admissions would be preempted at once.
        """
        if not self.waiting or len(self.running) >= self.max_seqs:
            return None
        sequence = self.waiting[0]
        if not self.blocks.admit(sequence, reserve=len(self.running)):
            return None
        del self.waiting[0]
        insort(self.running, sequence, key=_urgency)
        return sequence

    @staticmethod
    def _take(work: list[Work], sequence: Sequence, budget: int) -> int:
        """Append as much of the sequence's work as the budget allows; returns its tokens."""
        tokens = min(len(sequence.tokens) - sequence.computed, budget)
        if tokens:
            work.append(Work(sequence, tokens))
        return tokens
