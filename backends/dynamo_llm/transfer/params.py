"""`kv_transfer_params`: what travels from a prefill's answer to the decode request, in vLLM's shape. Pure.

`remote_slot` and `remote_stamp` are ours: where the pin's stamp stands, and what it is while the blocks are held.
"""

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from dynamo_llm.transfer.errors import TransferError

_Count = Annotated[int, Meta(ge=0, lt=1 << 48)]


class PullParams(Struct, frozen=True, kw_only=True):
    """What a decode needs to find its blocks. Keys that are not ours are let through, as vLLM does."""

    do_remote_prefill: bool = True
    do_remote_decode: bool = False
    remote_engine_id: Annotated[str, Meta(min_length=1, max_length=128)]
    """Name of the NIXL agent: `instance-epoch`."""
    remote_block_ids: Annotated[list[_Count], Meta(min_length=1)]
    """All blocks of the prompt, in order."""
    remote_request_id: Annotated[str, Meta(max_length=256)]
    remote_slot: _Count
    remote_stamp: Annotated[str, Meta(pattern="^[0-9a-f]{16}$")]
    """Text, because JSON's numbers do not hold 64 bits everywhere."""
    tp_size: _Count = 1

    @property
    def stamp(self) -> int:
        return int(self.remote_stamp, 16)


def read_params(params: Mapping[str, Any]) -> PullParams:
    """Raises `TransferError`, in one line."""
    try:
        found = msgspec.convert(dict(params), PullParams)
    except msgspec.ValidationError as error:
        raise TransferError("params", f"kv_transfer_params: {error}") from None
    if not found.do_remote_prefill or found.do_remote_decode:
        raise TransferError("params", "kv_transfer_params: do_remote_prefill must be true and do_remote_decode false")
    if not found.stamp:
        raise TransferError("params", "kv_transfer_params: remote_stamp is zero")
    return found


def write_params(params: PullParams) -> dict[str, Any]:
    built: dict[str, Any] = msgspec.to_builtins(params)
    return built
