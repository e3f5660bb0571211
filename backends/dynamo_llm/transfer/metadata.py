"""What an instance publishes of its pool: a blob in the registry, named by `InstanceCard.nixl`. Pure."""

import msgspec
from msgspec import Struct

from dynamo_llm.transfer.errors import TransferError
from dynamo_llm.transfer.layout import Layout

VERSION = 1
MAX_BYTES = 1 << 20


class PeerMetadata(Struct, frozen=True, kw_only=True):
    """How to reach a pool and what it looks like."""

    version: int = VERSION
    agent: str
    """`instance-epoch`: an engine that starts again is another one."""
    layout: Layout
    stamps_address: int
    """Of a table of uint64, one for each pin."""
    stamps: int
    """Entries of the table."""
    nixl: bytes
    """NIXL's own metadata of the agent."""


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(PeerMetadata).decode


def agent_name(instance: str, epoch: int) -> str:
    return f"{instance}-{epoch}"


def encode_metadata(metadata: PeerMetadata) -> bytes:
    return _encode(metadata)


def decode_metadata(name: str, data: bytes) -> PeerMetadata:
    """The metadata of the agent called `name`. Raises `TransferError` for anything else, in one line."""
    if len(data) > MAX_BYTES:
        raise TransferError("params", f"transfer metadata of {name}: {len(data)} bytes are over {MAX_BYTES}")
    try:
        metadata = _decode(data)
    except msgspec.MsgspecError as error:
        raise TransferError("params", f"transfer metadata of {name}: {error}") from None
    if metadata.version != VERSION:
        raise TransferError(
            "params", f"transfer metadata of {name}: version {metadata.version}, this worker knows {VERSION}"
        )
    if metadata.agent != name:
        raise TransferError("params", f"transfer metadata of {name} is that of {metadata.agent!r}")
    if metadata.stamps < 1 or metadata.stamps_address < 1 or metadata.stamps_address + 8 * metadata.stamps > 1 << 63:
        raise TransferError("params", f"transfer metadata of {name}: its stamps are out of range")
    return metadata
