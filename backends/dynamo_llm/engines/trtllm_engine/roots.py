"""Which LoRA adapter and which salt a sequence of blocks belongs to. Pure.

TensorRT-LLM keeps blocks of different adapters and salts apart, and its events do not say whose a block is. But every
request came through us: the first block of its prompt tells, as long as it was sent with one adapter and one salt.
"""

from collections import OrderedDict
from typing import NamedTuple


class Root(NamedTuple):
    lora: str
    cache_salt: str


PLAIN = Root("", "")
_MOST = 1 << 16


class Roots:
    """First blocks of prompts, the latest ones, each with the root under which it was sent."""

    def __init__(self, block_size: int, *, most: int = _MOST) -> None:
        self._bytes = 4 * block_size
        self._most = most
        self._roots: OrderedDict[bytes, Root | None] = OrderedDict()
        """None: more than one."""
        self._only_plain = True

    def note(self, token_ids: bytes, root: Root) -> None:
        """A prompt is sent: little-endian uint32. One shorter than a block is completed by its answer, unknown here."""
        self._only_plain = self._only_plain and root == PLAIN
        first = token_ids[: self._bytes]
        if len(first) < self._bytes:
            return
        known = self._roots.pop(first, root)
        self._roots[first] = root if known == root else None
        if len(self._roots) > self._most:
            self._roots.popitem(last=False)

    def find(self, first_block: bytes) -> Root | None:
        """None where it cannot be told."""
        return PLAIN if self._only_plain else self._roots.get(first_block)
