"""Which KV blocks one instance holds, per tier. Pure: no clock, no I/O, no lock.

The publisher on the worker keeps one for its own instance (digests and snapshots come from it), the index in the
router one for each instance (to compare digests, and to forget an instance without a walk over the whole index).
"""

import struct
from collections.abc import Generator, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from kvstore.cards import TIERS, Digest, KvOp, Removed, Stored, Tier
from kvstore.wire import TierHashes

_SLICE_HASHES = 4096


class Residency:
    """Resident block hashes of one instance after batch `seq` of `epoch`."""

    def __init__(self, epoch: int = 0, seq: int = 0) -> None:
        self.epoch = epoch
        self.seq = seq
        self.tiers: dict[Tier, set[int]] = {tier: set() for tier in TIERS}
        self._xor = 0

    def apply(self, ops: Iterable[KvOp]) -> None:
        """Bring in the ops of one batch. Storing twice or removing what is not there changes nothing."""
        for op in ops:
            if isinstance(op, Stored):
                self.store(op.hashes, op.tier)
            elif isinstance(op, Removed):
                self.discard(op.hashes, op.tier)
            else:
                self.clear()

    def store(self, hashes: Iterable[int], tier: Tier) -> list[int]:
        """Returns those that the tier did not hold before."""
        held = self.tiers[tier]
        new = []
        for value in hashes:
            if value not in held:
                held.add(value)
                self._xor ^= value
                new.append(value)
        return new

    def discard(self, hashes: Iterable[int], tier: Tier) -> list[int]:
        """Returns those that the tier did hold."""
        held = self.tiers[tier]
        gone = []
        for value in hashes:
            if value in held:
                held.remove(value)
                self._xor ^= value
                gone.append(value)
        return gone

    def clear(self) -> None:
        for held in self.tiers.values():
            held.clear()
        self._xor = 0

    def digest(self) -> Digest:
        return Digest(sum(map(len, self.tiers.values())), self._xor)

    def copy_hashes(self) -> dict[Tier, list[int]]:
        """The hashes of each tier that holds any: cheap enough to be taken under a lock, `pack` is not."""
        return {tier: list(held) for tier, held in self.tiers.items() if held}

    def snapshot(self) -> list[TierHashes]:
        """All resident hashes, in no particular order within a tier."""
        return pack(self.copy_hashes())


def pack(hashes: dict[Tier, list[int]]) -> list[TierHashes]:
    """As it travels. (`struct` is three times as fast here as numpy.)"""
    return [TierHashes(tier, struct.pack(f"<{len(held)}Q", *held)) for tier, held in hashes.items()]


def pack_in_slices(hashes: dict[Tier, list[int]]) -> Generator[None, None, list[TierHashes]]:
    """As `pack`; yields about each millisecond, where an event loop's other work may go on."""
    tiers = []
    for tier, held in hashes.items():
        packed = bytearray()
        for begin in range(0, len(held), _SLICE_HASHES):
            part = held[begin : begin + _SLICE_HASHES]
            packed += struct.pack(f"<{len(part)}Q", *part)
            yield
        tiers.append(TierHashes(tier, bytes(packed)))
    return tiers


def unpack(tiers: Sequence[TierHashes]) -> list[tuple[Tier, npt.NDArray[np.uint64]]]:
    """The arrays behind what another process packed. Raises `ValueError` for an unknown tier or broken bytes."""
    known = {str(tier): tier for tier in TIERS}
    arrays = []
    for packed in tiers:
        if packed.tier not in known:
            raise ValueError(f"unknown tier {packed.tier!r}")
        if len(packed.hashes) % 8:
            raise ValueError(f"{len(packed.hashes)} bytes are no whole number of uint64 hashes")
        arrays.append((known[packed.tier], np.frombuffer(packed.hashes, dtype="<u8")))
    return arrays
