"""Which KV block belongs to whom: reference counts, prefix caching, eviction. Pure: no torch, no clock, no I/O.

A block is in one of three states: referenced by sequences; free but *cached* (it still holds a prefix somebody may ask
for); or free. A block whose tokens are all computed is registered under its hash (design contract 1) and announced as
`Stored`; when it is handed out again it is announced as `Removed`. No hash ever names two registered blocks, and a
registered block's predecessor is registered as long as it is.
"""

from collections import OrderedDict
from collections.abc import Collection
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from dynamo_llm.engines.torch_engine.sequence import Sequence
from kvstore.cards import KvOp, Removed, Stored
from kvstore.hashing import block_hashes, root_seed


class BlockManager:
    """Owns the numbers of the blocks, not their bytes. Only the scheduler calls it."""

    def __init__(
        self,
        kv_blocks: int,
        block_size: int,
        *,
        model: str = "",
        max_seqs: int = 1,
        max_context: int | None = None,
        prefix_caching: bool = True,
    ) -> None:
        self.kv_blocks, self.block_size = kv_blocks, block_size
        self.tables: npt.NDArray[np.int32] = np.zeros(
            (max_seqs, -(-(max_context or kv_blocks * block_size) // block_size)), dtype=np.int32
        )
        """Blocks of the running sequences by `Sequence.row`: what the attention reads."""
        self._model, self._prefix_caching = model, prefix_caching
        self._rows = list(range(max_seqs))[::-1]
        self._references = [0] * kv_blocks
        self._name: list[tuple[int, bytes] | None] = [None] * kv_blocks
        self._registered: dict[int, int] = {}
        self._free = list(range(kv_blocks))[::-1]
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._ops: list[KvOp] = []

    @property
    def used(self) -> int:
        """Blocks that sequences reference, or that are held."""
        return self.kv_blocks - len(self._free) - len(self._cached)

    @property
    def cached(self) -> int:
        """Free blocks that hold a reusable prefix."""
        return len(self._cached)

    @property
    def available(self) -> int:
        """Blocks that can be handed out."""
        return len(self._free) + len(self._cached)

    @property
    def resident(self) -> set[int]:
        """Hashes of all registered blocks."""
        return set(self._registered)

    def take_ops(self) -> list[KvOp]:
        """What was stored and removed since the last call, in order."""
        ops, self._ops = self._ops, []
        return ops

    def admit(self, sequence: Sequence, *, reserve: int = 0) -> bool:
        """Give it a row and blocks for all its tokens, cached ones where its beginning is known.

        The last token is never taken from the cache: somebody has to compute the next one's logits. False, and nothing
        has changed, when fewer than `reserve` blocks would be left.
        """
        needed = -(-len(sequence.tokens) // self.block_size)
        cached = self._match(sequence)
        revived = sum(block in self._cached for block in cached)
        if not self._rows or self.available - revived - (needed - len(cached)) < reserve:
            return False
        for block in cached:
            self._reference(block)
        sequence.row = self._rows.pop()
        sequence.blocks = cached
        sequence.committed = len(cached)
        sequence.computed = len(cached) * self.block_size
        self.tables[sequence.row, : len(cached)] = cached
        for _ in range(needed - len(cached)):
            self._append(sequence)
        return True

    def extend(self, sequence: Sequence) -> bool:
        """Room for its newest token. False when no block is left."""
        if len(sequence.blocks) * self.block_size >= len(sequence.tokens):
            return True
        if not self.available:
            return False
        self._append(sequence)
        return True

    def commit(self, sequence: Sequence) -> None:
        """Register the blocks that became whole and computed. Call it when `computed` has grown."""
        if not self._prefix_caching or sequence.committed < 0:
            return
        whole = sequence.computed // self.block_size
        if whole <= sequence.committed:
            return
        names, run = self._names(sequence, whole), list[int]()
        for index in range(sequence.committed, whole):
            name = names[index]
            resident = self._registered.get(name[0])
            if resident is None:
                self._register(sequence.blocks[index], name)
                run.append(name[0])
                continue
            self._announce(sequence, index, run)
            if self._name[resident] != name:
                # Other tokens under the same hash: this block and all that follow it stay private to the sequence.
                sequence.committed = -1
                return
            self._replace(sequence, index, resident)
        self._announce(sequence, whole, run)
        sequence.committed = whole

    def release(self, sequence: Sequence) -> None:
        """Take back its row and blocks. What it computed stays cached; its last blocks are evicted first."""
        for block in reversed(sequence.blocks):
            self._dereference(block)
        if sequence.row >= 0:
            self._rows.append(sequence.row)
        sequence.row, sequence.blocks, sequence.committed, sequence.computed = -1, [], 0, 0

    def hold(self, blocks: Collection[int]) -> None:
        """Keep blocks that a sequence has, also when it lets go of them; until `drop`."""
        for block in blocks:
            self._reference(block)

    def drop(self, blocks: Collection[int]) -> None:
        """The end of a `hold`."""
        for block in reversed(tuple(blocks)):
            self._dereference(block)

    def _match(self, sequence: Sequence) -> list[int]:
        """Registered blocks that hold the sequence's beginning, tokens compared."""
        if not self._prefix_caching or sequence.wants_prompt_logprobs:
            return []
        blocks: list[int] = []
        for name in self._names(sequence, (len(sequence.tokens) - 1) // self.block_size):
            block = self._registered.get(name[0])
            if block is None or self._name[block] != name:
                break
            blocks.append(block)
        return blocks

    def _names(self, sequence: Sequence, count: int) -> list[tuple[int, bytes]]:
        """Names of its first `count` blocks: the hash that places, and a digest of all tokens up to the block's end.

        The digest is what compares the tokens: unlike the hash it is cryptographic, so equal digests are equal prefixes
        of the same root.
        """
        chain, size = sequence.chain, self.block_size
        if len(chain) < count:
            lora, cache_salt = sequence.root
            parent, digest = (
                chain[-1] if chain else (root_seed(self._model, lora, cache_salt), repr(sequence.root).encode())
            )
            tokens = np.array(sequence.tokens[len(chain) * size : count * size], dtype=np.uint32)
            data = tokens.tobytes()
            for index, block_hash in enumerate(block_hashes(tokens, size, seed=parent).tolist()):
                digest = blake2b(digest + data[index * size * 4 : (index + 1) * size * 4], digest_size=16).digest()
                chain.append((block_hash, digest))
        return chain[:count]

    def _announce(self, sequence: Sequence, end: int, run: list[int]) -> None:
        """Emit the run of newly registered blocks that ends before block `end` of the sequence."""
        if run:
            first = end - len(run)
            self._ops.append(Stored(sequence.chain[first - 1][0] if first else None, run.copy()))
            run.clear()

    def _register(self, block: int, name: tuple[int, bytes]) -> None:
        self._registered[name[0]] = block
        self._name[block] = name

    def _replace(self, sequence: Sequence, index: int, resident: int) -> None:
        """Let the sequence use the block that already holds the same tokens, and give its own one back."""
        self._reference(resident)
        self._dereference(sequence.blocks[index])
        sequence.blocks[index] = resident
        self.tables[sequence.row, index] = resident

    def _append(self, sequence: Sequence) -> None:
        block = self._free.pop() if self._free else self._evict()
        self._references[block] = 1
        self.tables[sequence.row, len(sequence.blocks)] = block
        sequence.blocks.append(block)

    def _evict(self) -> int:
        """The cached block that was used longest ago, no longer registered."""
        block, _ = self._cached.popitem(last=False)
        name = self._name[block]
        if name is not None:
            del self._registered[name[0]]
            self._name[block] = None
            self._ops.append(Removed([name[0]]))
        return block

    def _reference(self, block: int) -> None:
        if not self._references[block]:
            del self._cached[block]
        self._references[block] += 1

    def _dereference(self, block: int) -> None:
        self._references[block] -= 1
        if self._references[block]:
            return
        if self._name[block] is None:
            self._free.append(block)
        else:
            self._cached[block] = None
