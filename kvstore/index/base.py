"""The protocol of every prefix index. `mirror.IndexMirror` feeds it and asks it; placement sees only the matches.

An index knows, for each block hash, which instances hold the block and in which tiers.
`tests/kvstore/test_index_contract.py` runs over all implementations.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from kvstore.cards import Digest, KvOp, Tier
from kvstore.wire import TierHashes

Hashes = Sequence[int] | npt.NDArray[np.uint64]
"""Block hashes in the order of the sequence, shape [blocks]."""


class Match(NamedTuple):
    """Blocks of the longest prefix that one instance holds without a hole, each counted for its best tier there."""

    device: int
    host: int
    disk: int
    remote: int

    @property
    def blocks(self) -> int:
        """Length of the prefix."""
        return sum(self)


class PrefixIndex(Protocol):
    """See the module's docstring. Not thread-safe: one event loop owns it. No method does I/O or waits."""

    def apply(self, instance: str, ops: Iterable[KvOp]) -> None:
        """Bring in one batch. An unknown instance begins empty; storing twice or removing nothing is harmless."""

    def match(self, hashes: Hashes) -> dict[str, Match]:
        """The instances that hold at least the first block."""

    def remove(self, instance: str) -> None:
        """Forget an instance and all its blocks, some 0.6 us for each. Unknown ones are ignored."""

    def load(self, instance: str, tiers: Sequence[TierHashes]) -> None:
        """Replace what is known of an instance by a snapshot. A broken one raises `ValueError` and changes nothing."""

    def copy_hashes(self, instance: str) -> dict[Tier, list[int]]:
        """Resident hashes of one instance by tier, in no particular order; empty for an unknown one."""

    def digest(self, instance: str) -> Digest:
        """Count and xor of the resident hashes; zeros for an unknown instance."""

    def instances(self) -> list[str]:
        """The instances that the index knows, also those without a block."""

    def blocks(self) -> int:
        """Distinct block hashes in the index."""
