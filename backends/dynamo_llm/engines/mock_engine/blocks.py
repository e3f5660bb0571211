"""KV blocks by their hashes: reference counts, prefix cache, eviction. Pure; only the scheduler calls it.

There are no bytes behind these blocks, so a block needs no number. A sequence holds `held` blocks; the first `named` of
them are registered under the hashes of its chain (design contract 1), the others are a mere count. A registered block
that nobody references stays *cached* until the pool needs it; the one released longest ago goes first, a sequence's end
before its beginning. The hash alone says what a block is: nothing of one prompt could reach another one, for there are
no keys and values. Each operation costs constant time per block.
"""

from collections import OrderedDict

from dynamo_llm.engines.mock_engine.sequence import MockSequence
from kvstore.cards import KvOp, Removed, Stored


class BlockPool:
    """`kv_blocks` blocks: used (referenced by sequences), cached, or free."""

    def __init__(self, kv_blocks: int, block_size: int, *, prefix_caching: bool = True) -> None:
        self.kv_blocks, self.block_size = kv_blocks, block_size
        self._prefix_caching = prefix_caching
        self._free = kv_blocks
        self._references: dict[int, int] = {}
        """Of each registered block, by its hash."""
        self._cached: OrderedDict[int, None] = OrderedDict()
        """Registered blocks without a reference, the first to go first."""
        self._ops: list[KvOp] = []
        self._evicted: list[int] = []
        """Of the `Removed` that is not among the ops yet."""

    @property
    def used(self) -> int:
        return self.kv_blocks - self._free - len(self._cached)

    @property
    def cached(self) -> int:
        return len(self._cached)

    @property
    def available(self) -> int:
        """Blocks that can be handed out."""
        return self._free + len(self._cached)

    @property
    def resident(self) -> set[int]:
        """Hashes of all registered blocks."""
        return set(self._references)

    def take_ops(self) -> list[KvOp]:
        """What was stored and removed since the last call, in order."""
        self._seal_evicted()
        ops, self._ops = self._ops, []
        return ops

    def match(self, sequence: MockSequence) -> int:
        """How many of its leading blocks are resident. The last token is never taken from the cache: somebody has to
        compute what comes after it."""
        most = min((sequence.length - 1) // self.block_size, len(sequence.chain))
        references = self._references
        for index, block in enumerate(sequence.chain[:most]):
            if block not in references:
                return index
        return most

    def admit(self, sequence: MockSequence, *, reserve: int) -> bool:
        """Give it blocks for all its tokens, resident ones where its beginning is known.

        False, and nothing has changed, when fewer than `reserve` blocks would be left.
        """
        needed = -(-sequence.length // self.block_size)
        resident = self.match(sequence)
        reused = sequence.chain[:resident]
        references, cached = self._references, self._cached
        revived = sum(not references[block] for block in reused)
        if self.available - revived - (needed - resident) < reserve:
            return False
        for block in reused:
            if not references[block]:
                del cached[block]
            references[block] += 1
        self._take(needed - resident)
        sequence.held, sequence.named = needed, resident
        sequence.computed = resident * self.block_size
        return True

    def extend(self, sequence: MockSequence) -> bool:
        """One more block. False when none is left."""
        if not self.available:
            return False
        self._take(1)
        sequence.held += 1
        return True

    def commit(self, sequence: MockSequence, computed: int) -> None:
        """Register the blocks that are whole now that `computed` tokens are computed, and announce the new ones."""
        whole = computed // self.block_size
        first = sequence.named
        if whole <= first or not self._prefix_caching:
            return
        chain, references = sequence.chain_to(whole), self._references
        run: list[int] = []
        for index in range(first, whole):
            block = chain[index]
            if block in references:  # computed side by side with another sequence: go on with the one that was first
                self._announce(chain, index, run)
                if not references[block]:
                    del self._cached[block]
                references[block] += 1
                self._free += 1
            else:
                references[block] = 1
                run.append(block)
        self._announce(chain, whole, run)
        sequence.named = whole

    def release(self, sequence: MockSequence) -> None:
        """Take all its blocks back; registered ones nobody else references become the newest of the cache."""
        references, cached = self._references, self._cached
        for block in reversed(sequence.chain[: sequence.named]):
            references[block] -= 1
            if not references[block]:
                cached[block] = None
        self._free += sequence.held - sequence.named
        sequence.held = sequence.named = sequence.computed = 0

    def _take(self, count: int) -> None:
        """`count` blocks that are available; evicts what the free ones do not cover."""
        evict = count - self._free
        if evict <= 0:
            self._free -= count
            return
        self._free = 0
        pop, references, evicted = self._cached.popitem, self._references, self._evicted
        for _ in range(evict):
            block = pop(last=False)[0]
            del references[block]
            evicted.append(block)

    def _announce(self, chain: list[int], end: int, run: list[int]) -> None:
        """The newly registered blocks of `chain` that end before block `end`."""
        if run:
            self._seal_evicted()
            first = end - len(run)
            self._ops.append(Stored(chain[first - 1] if first else None, run.copy()))
            run.clear()

    def _seal_evicted(self) -> None:
        if self._evicted:
            self._ops.append(Removed(self._evicted))
            self._evicted = []
