"""The payload of vLLM's and SGLang's KV events: msgpack `[timestamp, events, data parallel rank]`. Pure.

Events are maps (`{"type": "BlockStored", ...}`: vLLM since 0.24, SGLang since it follows) or, from older engines,
arrays of the same fields in order. Fields and kinds of events that are not known here are left out.
"""

from typing import Any

import msgspec
from msgspec import Struct

Hash = int | bytes
"""A block's name as its engine chose it: a signed or unsigned 64-bit integer, or the bytes of a digest."""

_MAX_BYTES = 64 << 20
_ARRAYS = frozenset(range(0x90, 0xA0)) | {0xDC, 0xDD}
"""First bytes of msgpack arrays."""


class KvEventError(ValueError):
    """A payload that is no batch of KV events."""


class BlockStored(Struct, frozen=True, tag="BlockStored"):
    """Blocks became resident. The fields stand in the order of vLLM's arrays; an engine may leave out the last ones."""

    block_hashes: list[Hash]
    parent_block_hash: Hash | None
    token_ids: list[int | list[int]]
    """Of all the blocks; SGLang sends pairs of a token and its successor under speculative decoding."""
    block_size: int
    lora_id: int | str | None = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[list[Any] | None] | None = None
    """vLLM, for each block: LoRA name, (multimodal input, offset) pairs, cache salt (text, first block), and digests of
    embeddings (bytes)."""
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None
    locality: str | None = None
    cache_salt: str | None = None
    """SGLang."""


class BlockRemoved(Struct, frozen=True, tag="BlockRemoved"):
    """Blocks left a medium."""

    block_hashes: list[Hash]
    medium: str | None = None
    group_idx: int | None = None
    locality: str | None = None


class BlocksCleared(Struct, frozen=True, tag="AllBlocksCleared"):
    """The cache is empty."""


Event = BlockStored | BlockRemoved | BlocksCleared


class _Kind(Struct):
    type: str


class _Batch(Struct, array_like=True):
    timestamp_s: float
    events: list[msgspec.Raw]


_decode_batch = msgspec.msgpack.Decoder(_Batch).decode
_decode_kind = msgspec.msgpack.Decoder(_Kind).decode
_decode_array_kind = msgspec.msgpack.Decoder(list[msgspec.Raw]).decode
_decode_str = msgspec.msgpack.Decoder(str).decode
_KINDS: dict[str, type[Event]] = {
    "BlockStored": BlockStored,
    "BlockRemoved": BlockRemoved,
    "AllBlocksCleared": BlocksCleared,
}
_MAPS = {name: msgspec.msgpack.Decoder(kind).decode for name, kind in _KINDS.items()}


def decode_events(payload: bytes) -> list[Event]:
    """The events of one batch, in order, without those of unknown kinds. Raises `KvEventError`."""
    if len(payload) > _MAX_BYTES:
        raise KvEventError(f"a batch of {len(payload)} bytes; at most {_MAX_BYTES} are read")
    try:
        events = [_decode_event(raw) for raw in _decode_batch(payload).events]
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise KvEventError(f"no batch of KV events: {error}") from None
    return [event for event in events if event is not None]


def _decode_event(raw: msgspec.Raw) -> Event | None:
    data = bytes(raw)
    if data[0] in _ARRAYS:
        return _from_array(data)
    decode = _MAPS.get(_decode_kind(data).type)
    return None if decode is None else decode(data)


def _from_array(data: bytes) -> Event | None:
    """Positional fields; more of them than are known are left out."""
    fields = _decode_array_kind(data)
    if not fields:
        raise KvEventError("an event without a kind")
    kind = _KINDS.get(_decode_str(fields[0]))
    if kind is None:
        return None
    names = kind.__struct_fields__
    values = {name: msgspec.msgpack.decode(value) for name, value in zip(names, fields[1:], strict=False)}
    return msgspec.convert(values, kind)
