"""The router's own prefix index: one dict from block hash to an integer that says who holds the block, and where.

The integer has four bits for each instance, one for each tier, best tier lowest: bit `4 * slot + tier`. Neighbouring
blocks of a prompt mostly have equal integers, so a match is one lookup and one comparison a block, and looks at single
instances only where the integer changes. Slots of removed instances are used again, so the integers stay short.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from kvstore.cards import TIERS, Digest, KvOp, Removed, Stored, Tier
from kvstore.index.base import Hashes, Match
from kvstore.residency import Residency, unpack
from kvstore.wire import TierHashes

_WIDTH = len(TIERS)
_ALL_TIERS = (1 << _WIDTH) - 1
_TIER_BIT: dict[Tier, int] = {tier: bit for bit, tier in enumerate(TIERS)}


class _Instance:
    """What the index keeps of one instance: its place in the integers, and its blocks."""

    __slots__ = ("residency", "shift")

    def __init__(self, slot: int) -> None:
        self.shift = _WIDTH * slot
        self.residency = Residency()


class MemoryIndex:
    """A `PrefixIndex` in this process's memory: some 250 bytes a block."""

    def __init__(self) -> None:
        self._held: dict[int, int] = {}
        self._instances: dict[str, _Instance] = {}
        self._names: list[str | None] = []  # by slot; None: free

    def apply(self, instance: str, ops: Iterable[KvOp]) -> None:
        known = self._intern(instance)
        for op in ops:
            if isinstance(op, Stored):
                self._store(known, op.hashes, op.tier)
            elif isinstance(op, Removed):
                self._drop(known.residency.discard(op.hashes, op.tier), known.shift + _TIER_BIT[op.tier])
            else:
                self._clear(known)

    def match(self, hashes: Hashes) -> dict[str, Match]:
        """See `PrefixIndex`. Cost: one dict lookup a block up to the end of the longest match."""
        values = hashes.tolist() if isinstance(hashes, np.ndarray) else hashes
        get = self._held.get
        counts: dict[int, list[int]] = {}
        alive = -1  # all four bits of each instance that holds every block so far; -1 before the first block
        run = seen = -1  # the integer of the current run of equal blocks: of the alive instances, and of all
        start = position = 0
        for position, value in enumerate(values):
            held = get(value, 0)
            if held == seen:
                continue
            seen = held
            held &= alive
            if held == run:
                continue
            self._credit(counts, run, position - start)
            run, start = held, position
            alive = _spread(held)
            if not alive:
                break
        else:
            self._credit(counts, run, len(values) - start)
        return {self._name(slot): Match(*tiers) for slot, tiers in counts.items()}

    def remove(self, instance: str) -> None:
        known = self._instances.pop(instance, None)
        if known is not None:
            self._clear(known)
            self._names[known.shift // _WIDTH] = None

    def load(self, instance: str, tiers: Sequence[TierHashes]) -> None:
        arrays = unpack(tiers)
        known = self._intern(instance)
        self._clear(known)
        for tier, hashes in arrays:
            self._store(known, hashes.tolist(), tier)

    def copy_hashes(self, instance: str) -> dict[Tier, list[int]]:
        known = self._instances.get(instance)
        return known.residency.copy_hashes() if known else {}

    def digest(self, instance: str) -> Digest:
        known = self._instances.get(instance)
        return known.residency.digest() if known else Digest()

    def instances(self) -> list[str]:
        return list(self._instances)

    def blocks(self) -> int:
        return len(self._held)

    def _intern(self, instance: str) -> _Instance:
        known = self._instances.get(instance)
        if known is None:
            if None not in self._names:
                self._names.append(None)
            slot = self._names.index(None)
            self._names[slot] = instance
            known = self._instances[instance] = _Instance(slot)
        return known

    def _store(self, known: _Instance, hashes: Iterable[int], tier: Tier) -> None:
        held = self._held
        mask = 1 << (known.shift + _TIER_BIT[tier])
        for value in known.residency.store(hashes, tier):
            held[value] = held.get(value, 0) | mask

    def _clear(self, known: _Instance) -> None:
        for tier, hashes in known.residency.tiers.items():
            self._drop(hashes, known.shift + _TIER_BIT[tier])
        known.residency.clear()

    def _drop(self, hashes: Iterable[int], bit: int) -> None:
        held = self._held
        mask = 1 << bit
        for value in hashes:
            rest = held[value] ^ mask
            if rest:
                held[value] = rest
            else:
                del held[value]

    def _credit(self, counts: dict[int, list[int]], run: int, blocks: int) -> None:
        """Count a run of blocks for each instance in the integer, for the lowest tier bit that it has there."""
        if not blocks:
            return
        while run:
            lowest = (run & -run).bit_length() - 1
            slot, tier = divmod(lowest, _WIDTH)
            tiers = counts.get(slot)
            if tiers is None:
                tiers = counts[slot] = [0] * _WIDTH
            tiers[tier] += blocks
            run &= ~(_ALL_TIERS << (_WIDTH * slot))

    def _name(self, slot: int) -> str:
        name = self._names[slot]
        if name is None:  # a bit without an owner: `remove` clears them all before it frees a slot
            raise RuntimeError(f"index slot {slot} is in use and has no instance")
        return name


def _spread(run: int) -> int:
    """All four bits of each instance that has any of them set."""
    alive = 0
    while run:
        slot = ((run & -run).bit_length() - 1) // _WIDTH
        mask = _ALL_TIERS << (_WIDTH * slot)
        alive |= mask
        run &= ~mask
    return alive
