"""From an engine's own block hashes to ours. Pure: no clock, no I/O, no lock.

Our hash of a block follows from its tokens and the hash of the block before it (`kvstore.hashing`), so what an engine
stored is known as long as the whole chain was announced. The names of resident blocks are kept, and of no others.
"""

from array import array
from collections.abc import Iterable, Mapping
from typing import Any

from dynamo_llm.engines.kv_events.decode import BlockRemoved, BlocksCleared, BlockStored, Event, Hash
from kvstore.cards import TIERS, Cleared, KvOp, Removed, Stored, Tier
from kvstore.hashing import block_hashes, root_seed

MEDIA: Mapping[str, Tier] = {
    "GPU": "device",
    "CPU": "host",  # vLLM
    "CPU_PINNED": "host",  # SGLang
    "STORAGE": "disk",  # vLLM
    "DISK": "disk",  # SGLang
    "EXTERNAL": "remote",  # SGLang
}
"""An engine's words for where a block lies. One that says nothing means the device."""

_PARTIAL_KINDS = frozenset(
    {
        "sliding_window",
        "sliding_window_mla",
        "mamba",
        "chunked_local_attention",
        "encoder_only_attention",
        "cross_attention",
    }
)
"""vLLM's groups of layers whose blocks do not stand for a whole prefix."""


class _Block:
    """A resident block: our hash, and the tiers that hold it, a bit for each."""

    __slots__ = ("ours", "tiers")

    def __init__(self, ours: int) -> None:
        self.ours = ours
        self.tiers = 0


class Translator:
    """One engine's events. What cannot be named as the router would name it is left out, and counted:

    - `orphans`: blocks after one that is not known, because its event was missed or because it was left out itself
    - `foreign`: blocks of another size, of layers that see only a part of the prefix (sliding windows, state spaces) or
      of a further group of layers, with images or embeddings in them, of a LoRA adapter without a name, in a medium
      that we do not know
    """

    def __init__(self, model: str, block_size: int, *, media: Mapping[str, Tier] = MEDIA) -> None:
        self.orphans = 0
        self.foreign = 0
        self._model = model
        self._block_size = block_size
        self._media = media
        self._group: int | None = None
        """The group of layers that is followed: the first that stores blocks of our size."""
        self._known: dict[Hash, _Block] = {}
        self._copies: dict[Tier, dict[int, int]] = {tier: {} for tier in TIERS}
        """By our hash, how many of the engine's blocks bear it: an engine may tell blocks apart that we do not."""

    @property
    def blocks(self) -> int:
        """Names that are kept: one for each resident block."""
        return len(self._known)

    def translate(self, events: Iterable[Event]) -> list[KvOp]:
        """What changed, in order. Storing twice, and removing what is not there, changes nothing."""
        ops: list[KvOp] = []
        for event in events:
            if isinstance(event, BlockStored):
                self._stored(event, ops)
            elif isinstance(event, BlockRemoved):
                self._removed(event, ops)
            elif isinstance(event, BlocksCleared):
                ops += self.clear()
        return ops

    def clear(self) -> list[KvOp]:
        """Forget everything: the cache was emptied, or events were lost and nothing is known for certain."""
        was_empty = not self._known
        self._known.clear()
        for copies in self._copies.values():
            copies.clear()
        return [] if was_empty else [Cleared()]

    # --- stored -------------------------------------------------------------------------------------------------------

    def _stored(self, event: BlockStored, ops: list[KvOp]) -> None:
        tier = self._tier(event)
        names = event.block_hashes
        if tier is None or event.kv_cache_spec_kind in _PARTIAL_KINDS:
            self.foreign += len(names)
            return
        if not event.token_ids:  # vLLM's offloading may name a block and say nothing else of it
            self._store_known(names, tier, ops)
            return
        tokens = _first_tokens(event.token_ids)
        plain = self._plain(event) if tokens is not None and self._is_ours(event) else 0
        self.foreign += len(names) - plain
        if not plain or tokens is None:
            return
        if event.parent_block_hash is None:
            seed, parent = root_seed(self._model, event.lora_name or "", _salt(event)), None
        elif (before := self._known.get(event.parent_block_hash)) is not None:
            seed = parent = before.ours
        else:
            self.orphans += plain
            return
        ours = block_hashes(tokens.tobytes(), self._block_size, seed=seed).tolist()
        self._store(names[:plain], ours, parent, tier, ops)

    def _store(self, names: list[Hash], ours: list[int], parent: int | None, tier: Tier, ops: list[KvOp]) -> None:
        """Note consecutive blocks, and announce the runs of those that are new in the tier."""
        run: list[int] = []
        for name, value in zip(names, ours, strict=False):
            block = self._known.get(name)
            if block is None:
                block = self._known[name] = _Block(value)
            if self._hold(block, tier):
                if not run:
                    ops.append(Stored(parent, run, tier))
                run.append(block.ours)
            else:
                run = []
            parent = block.ours

    def _store_known(self, names: list[Hash], tier: Tier, ops: list[KvOp]) -> None:
        for name in names:
            block = self._known.get(name)
            if block is None:
                self.orphans += 1
            elif self._hold(block, tier):
                ops.append(Stored(None, [block.ours], tier))

    def _hold(self, block: _Block, tier: Tier) -> bool:
        """Whether our hash is new in the tier."""
        bit = 1 << TIERS.index(tier)
        if block.tiers & bit:
            return False
        block.tiers |= bit
        copies = self._copies[tier]
        copies[block.ours] = copies.get(block.ours, 0) + 1
        return copies[block.ours] == 1

    def _is_ours(self, event: BlockStored) -> bool:
        """Whether the blocks have our size, are complete, and belong to the group of layers that is followed."""
        size = event.block_size
        if size != self._block_size or len(event.token_ids) != size * len(event.block_hashes):
            return False
        if event.lora_name is None and event.lora_id is not None:
            return False
        if self._group is None:
            self._group = event.group_idx
        return event.group_idx == self._group

    @staticmethod
    def _plain(event: BlockStored) -> int:
        """How many of the blocks, from the first, hold nothing but tokens."""
        for index, keys in enumerate(event.extra_keys or ()):
            others = _other_keys(keys, event)
            first = index == 0 and event.parent_block_hash is None
            if not all(isinstance(key, str) for key in others) or len(others) > int(first):
                return min(index, len(event.block_hashes))
        return len(event.block_hashes)

    # --- removed ------------------------------------------------------------------------------------------------------

    def _removed(self, event: BlockRemoved, ops: list[KvOp]) -> None:
        tier = self._tier(event)
        if tier is None or (event.group_idx is not None and event.group_idx != self._group):
            return
        bit = 1 << TIERS.index(tier)
        gone = []
        for name in event.block_hashes:
            block = self._known.get(name)
            if block is None or not block.tiers & bit:
                continue
            block.tiers &= ~bit
            if not block.tiers:
                del self._known[name]
            if self._release(block.ours, tier):
                gone.append(block.ours)
        last = ops[-1] if ops else None
        if isinstance(last, Removed) and last.tier == tier:
            last.hashes.extend(gone)  # vLLM sends an event for each block
        elif gone:
            ops.append(Removed(gone, tier))

    def _release(self, ours: int, tier: Tier) -> bool:
        """Whether that was the last block of this name in the tier."""
        copies = self._copies[tier]
        if copies[ours] > 1:
            copies[ours] -= 1
            return False
        del copies[ours]
        return True

    def _tier(self, event: BlockStored | BlockRemoved) -> Tier | None:
        if event.locality == "REMOTE":
            return "remote"
        return "device" if event.medium is None else self._media.get(event.medium)


def _first_tokens(token_ids: list[int | list[int]]) -> "array[int] | None":
    """Token ids as uint32; of SGLang's pairs the first ones. None for what are no token ids."""
    try:
        return array("I", [token if isinstance(token, int) else token[0] for token in token_ids])
    except (OverflowError, IndexError):
        return None


def _other_keys(keys: list[Any] | None, event: BlockStored) -> list[Any]:
    """What besides its tokens and its LoRA adapter tells a block apart."""
    others = list(keys or ())
    if event.lora_name is not None and others and others[0] == event.lora_name:
        del others[0]
    return others


def _salt(event: BlockStored) -> str:
    """The tenant's salt; vLLM sends it with the first block of a sequence, SGLang with each."""
    if event.cache_salt is not None:
        return event.cache_salt
    others = _other_keys(event.extra_keys[0], event) if event.extra_keys else []
    return str(others[0]) if others else ""
