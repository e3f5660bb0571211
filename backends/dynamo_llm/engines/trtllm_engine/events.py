"""TensorRT-LLM's KV events, fetched as they come, to what changed in our names. Pure.

Events are numbered. After a gap nothing is known for certain any more: everything is forgotten and announced as
`Cleared`, and blocks are learnt anew as TensorRT-LLM stores them.
"""

import logging
from array import array
from collections.abc import Iterable
from itertools import groupby, takewhile
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from dynamo_llm.engines.kv_events import BlockRemoved, BlockStored, Translator
from dynamo_llm.engines.kv_events.decode import Event
from dynamo_llm.engines.kv_events.sequence import Sequence
from dynamo_llm.engines.trtllm_engine.roots import Roots
from kvstore.cards import KvOp

logger = logging.getLogger(__name__)

_MEDIA = ("GPU", "CPU")
"""By cache level, in the translator's words."""


class _Token(Struct, frozen=True):
    token_id: Annotated[int, Meta(ge=0, lt=1 << 32)]
    token_extra_id: int = 0
    """Not 0: part of a prompt table or a picture."""


class _Block(Struct, frozen=True):
    block_hash: int
    tokens: list[_Token]
    cache_level: int = 0
    mm_keys: list[Any] | None = None


class _Stored(Struct, frozen=True, tag="stored"):
    blocks: list[_Block]
    parent_hash: int | None = None


class _Removed(Struct, frozen=True, tag="removed"):
    block_hashes: list[int]


class _Change(Struct, frozen=True):
    old_value: int
    new_value: int


class _Updated(Struct, frozen=True, tag="updated"):
    block_hash: int
    cache_level: _Change | None = None


class _Created(Struct, frozen=True, tag="created"):
    num_blocks_per_cache_level: list[int]


class _Event(Struct, frozen=True):
    event_id: int
    data: _Stored | _Removed | _Updated | _Created
    window_size: int = 0


class Events:
    """One engine's events. `foreign` counts blocks whose adapter or salt cannot be told; what else is left out the
    translator counts."""

    def __init__(self, model: str, block_size: int, roots: Roots) -> None:
        self.foreign = 0
        self.lost = 0
        """Gaps, and events that could not be read."""
        self._block_size = block_size
        self._roots = roots
        self._translator = Translator(model, block_size)
        self._numbers = Sequence()
        self._window = 0
        """The largest attention window: only its layers' blocks stand for a whole prefix."""

    @property
    def blocks(self) -> int:
        """Resident blocks with a name."""
        return self._translator.blocks

    def take(self, raw: dict[str, Any]) -> list[KvOp]:
        """What changed, in order."""
        try:
            event = msgspec.convert(raw, _Event)
        except msgspec.ValidationError as error:
            return self._lose(f"a KV event cannot be read ({error})")
        ops: list[KvOp] = []
        arrival = self._numbers.arrived(event.event_id)
        if arrival.kind == "gap" or arrival.restarted:
            ops += self._lose(f"KV events before {event.event_id} are lost")
        self._numbers.applied(event.event_id)
        if event.window_size > self._window:
            self._window = event.window_size
            ops += self._translator.clear()
        if event.window_size == self._window:
            ops += self._translator.translate(self._events(event))
        return ops

    def _lose(self, what: str) -> list[KvOp]:
        """Before anything is known there is nothing to lose."""
        ops = self._translator.clear()
        if ops:
            self.lost += 1
            logger.warning("%s: all blocks count as gone until they are stored again", what)
        return ops

    def _events(self, event: _Event) -> Iterable[Event]:
        data = event.data
        if isinstance(data, _Stored):
            yield from self._stored(data)
        elif isinstance(data, _Removed):
            # It does not say from which level: a block is on one.
            yield from (BlockRemoved(list(data.block_hashes), medium=medium) for medium in _MEDIA)
        elif isinstance(data, _Updated) and data.cache_level is not None:
            names: list[int | bytes] = [data.block_hash]
            yield BlockStored(names, None, [], self._block_size, medium=_medium(data.cache_level.new_value))
            yield BlockRemoved(names, medium=_medium(data.cache_level.old_value))

    def _stored(self, data: _Stored) -> Iterable[BlockStored]:
        """The full blocks; a part of one, kept for reuse, is no block to a router, and none comes after it."""
        blocks = list(takewhile(self._is_plain, data.blocks))
        if not blocks:
            return
        lora = salt = None
        if data.parent_hash is None:
            root = self._roots.find(_tokens(blocks[:1]).tobytes())
            if root is None:
                self.foreign += len(blocks)
                return
            lora, salt = root.lora or None, root.cache_salt or None
        parent = data.parent_hash
        for level, run in groupby(blocks, key=lambda block: block.cache_level):
            same = list(run)
            yield BlockStored(
                [block.block_hash for block in same],
                parent,
                list(_tokens(same)),
                self._block_size,
                medium=_medium(level),
                lora_name=lora,
                cache_salt=salt,
            )
            parent = same[-1].block_hash

    def _is_plain(self, block: _Block) -> bool:
        """Whether it is full, and holds nothing but tokens."""
        whole = len(block.tokens) == self._block_size
        return whole and not block.mm_keys and not any(token.token_extra_id for token in block.tokens)


def _medium(level: int) -> str:
    return _MEDIA[level] if 0 <= level < len(_MEDIA) else f"level {level}"


def _tokens(blocks: Iterable[_Block]) -> "array[int]":
    return array("I", [token.token_id for block in blocks for token in block.tokens])
