"""What the registry stores, as bytes: limits and validation of all that other processes wrote. Pure."""

import re
from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import Struct

from kvstore.cards import InstanceCard
from kvstore.errors import StoreDataError
from kvstore.keys import is_word

MAX_CARD_BYTES = 64 << 10
MAX_BLOB_BYTES = 128 << 20
MAX_SETTING_BYTES = 4 << 10
MAX_SETTINGS = 256

_encode = msgspec.msgpack.Encoder().encode


class LeaseRecord(Struct, frozen=True):
    """What stands under an instance's key."""

    card: InstanceCard
    ttl_s: float
    """Length of the lease, so that watchers know how long a re-registration may take."""


_decode = msgspec.msgpack.Decoder(LeaseRecord).decode


class Listing(Struct, frozen=True):
    """All of a namespace, read at one moment."""

    era: str
    """Changes when Redis lost its data."""
    leases: dict[str, LeaseRecord]
    broken: dict[str, str]
    """Instance or setting -> why what is stored for it is unusable."""
    settings: dict[str, Any]


def encode_lease(card: InstanceCard, ttl_s: float, namespace: str) -> bytes:
    """Raises `StoreDataError` for a card that no reader would take."""
    if not is_word(card.instance):
        raise StoreDataError(f"instance id {card.instance!r} may hold letters, digits, '.', '_' and '-' only")
    if card.namespace != namespace:
        raise StoreDataError(f"card of namespace {card.namespace!r} in a registry of namespace {namespace!r}")
    data = _encode(LeaseRecord(card, ttl_s))
    if len(data) > MAX_CARD_BYTES:
        raise StoreDataError(f"a card of {len(data)} bytes is over the limit of {MAX_CARD_BYTES}")
    return data


def decode_lease(instance: str, data: bytes) -> LeaseRecord:
    """Raises `StoreDataError`."""
    if len(data) > MAX_CARD_BYTES:
        raise StoreDataError(f"{len(data)} bytes are over the limit of {MAX_CARD_BYTES}")
    try:
        record = _decode(data)
    except msgspec.MsgspecError as error:
        raise StoreDataError(str(error)) from error
    card = record.card
    if card.instance != instance:
        raise StoreDataError(f"the card is that of instance {card.instance!r}")
    if card.block_size < 1 or card.kv_blocks < 0 or card.max_context < 1 or not 0 < record.ttl_s < 1e6:
        raise StoreDataError("block_size, kv_blocks, max_context or ttl_s is out of range")
    return record


def encode_setting(name: str, value: Any) -> bytes:
    """Raises `StoreDataError`."""
    if not is_word(name):
        raise StoreDataError(f"setting name {name!r} may hold letters, digits, '.', '_' and '-' only, 64 at most")
    try:
        data = msgspec.json.encode(value)
    except TypeError as error:
        raise StoreDataError(f"setting {name} is no JSON value: {error}") from error
    if len(data) > MAX_SETTING_BYTES:
        raise StoreDataError(f"setting {name} takes {len(data)} bytes, the limit is {MAX_SETTING_BYTES}")
    return data


def decode_settings(stored: Mapping[bytes, bytes]) -> tuple[dict[str, Any], dict[str, str]]:
    """The usable settings, and for each of the others the reason why not."""
    settings: dict[str, Any] = {}
    broken: dict[str, str] = {}
    for raw_name in sorted(stored)[:MAX_SETTINGS]:
        name, data = raw_name.decode(errors="replace"), stored[raw_name]
        try:
            if not is_word(name) or len(data) > MAX_SETTING_BYTES:
                raise StoreDataError("name or value is over its limit")
            settings[name] = msgspec.json.decode(data)
        except (msgspec.MsgspecError, StoreDataError) as error:
            broken[f"setting {name}"] = str(error)
    return settings, broken


def is_sha256(text: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{64}", text) is not None
