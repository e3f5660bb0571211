"""How a pool of KV blocks lies in memory, and which bytes of one pool make a block of another. Pure.

A pool is one region. A block is `[layers, 2 (key, value), kv_heads, block_size, head_dim]` in one piece, block after
block. Pools that differ in nothing but the tokens of a block can still be read from one another where one block size
divides the other: then the unit is the smaller block, and its tokens of each layer, key or value, and head are a piece
of their own.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from dynamo_llm.transfer.errors import TransferError

VERSION = 1
KIND = "block-layer-kv-head-token-dim"
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_ADDRESS_END = 1 << 63
_MAX_PIECES = 1 << 20

_Numbers = npt.NDArray[np.uint64]
Descriptors = npt.NDArray[np.uint64]
"""Shape [n, 2]: address and length in bytes."""


class Layout(Struct, frozen=True, kw_only=True):
    """A registered block pool, as its owner describes it to others."""

    version: int = VERSION
    model: str
    """Blocks of another model would fit and mean nothing."""
    kind: str = KIND
    """The order of a block's dimensions."""
    dtype: str
    layers: int
    kv_heads: int
    """Of this rank."""
    head_dim: int
    block_size: int
    """Tokens."""
    block_bytes: int
    blocks: int
    address: int
    """Of block 0, in the owner's address space."""
    device: str = "cpu"
    """`cpu`, `cuda` or `cuda:N`."""
    tp_rank: int = 0
    tp_size: int = 1

    @property
    def pool_bytes(self) -> int:
        return self.blocks * self.block_bytes

    @property
    def memory(self) -> tuple[str, int]:
        """NIXL's name of the memory and the number of the device."""
        if self.device == "cpu":
            return "DRAM", 0
        return "VRAM", int(self.device.partition(":")[2] or 0)

    def check(self) -> None:
        """Raises `TransferError` for a description that cannot be true. It may come from another process."""
        if self.version != VERSION:
            raise TransferError("layout", f"layout version {self.version}, this worker knows version {VERSION}")
        if self.kind != KIND:
            raise TransferError("layout", f"blocks lie as {self.kind!r}, this worker knows {KIND!r}")
        item = DTYPE_BYTES.get(self.dtype)
        if item is None:
            raise TransferError("layout", f"dtype {self.dtype!r} is none of {', '.join(DTYPE_BYTES)}")
        numbers = (self.layers, self.kv_heads, self.head_dim, self.block_size, self.blocks, self.address)
        if min(numbers) < 1 or not 0 <= self.tp_rank < self.tp_size:
            raise TransferError("layout", "a size, the address or the tensor-parallel rank is out of range")
        if self.block_bytes != self.layers * 2 * self.kv_heads * self.block_size * self.head_dim * item:
            raise TransferError("layout", f"{self.block_bytes} bytes a block do not follow from its dimensions")
        if self.address + self.pool_bytes > _ADDRESS_END:
            raise TransferError("layout", "the pool reaches beyond the address space")
        kind, _, index = self.device.partition(":")
        if self.device != "cpu" and not (kind == "cuda" and (not index or index.isdecimal())):
            raise TransferError("layout", f"device {self.device!r} is neither cpu nor cuda:N")


class Plan(Struct, frozen=True, kw_only=True):
    """How a reader's blocks are made of a writer's. A unit is what both sides have whole: the smaller block."""

    reader: Layout
    writer: Layout
    pieces: int
    """In a unit, each in one place on both sides."""
    piece_bytes: int
    reader_units: int
    """In a block."""
    writer_units: int


def make_plan(reader: Layout, writer: Layout) -> Plan:
    """Raises `TransferError` where the blocks differ in more than a size that can be converted."""
    writer.check()
    for name, text in (
        ("model", "models"),
        ("dtype", "dtypes"),
        ("layers", "numbers of layers"),
        ("kv_heads", "numbers of KV heads"),
        ("head_dim", "head dimensions"),
        ("tp_size", "tensor-parallel sizes"),
        ("tp_rank", "tensor-parallel ranks"),
    ):
        ours, theirs = getattr(reader, name), getattr(writer, name)
        if ours != theirs:
            raise TransferError("layout", f"the {text} differ: {theirs!r} there, {ours!r} here; they are not converted")
    if reader.block_size == writer.block_size:
        pieces = 1
    elif reader.block_size % writer.block_size and writer.block_size % reader.block_size:
        sizes = f"{writer.block_size} tokens there, {reader.block_size} here"
        raise TransferError("layout", f"the block sizes differ and neither divides the other: {sizes}")
    else:
        pieces = reader.layers * 2 * reader.kv_heads
    unit = min(reader.block_size, writer.block_size)
    return Plan(
        reader=reader,
        writer=writer,
        pieces=pieces,
        piece_bytes=min(reader.block_bytes, writer.block_bytes) // pieces,
        reader_units=reader.block_size // unit,
        writer_units=writer.block_size // unit,
    )


class Selection(Struct, frozen=True, kw_only=True):
    """The units of one pull, reader and writer side by side."""

    plan: Plan
    local: _Numbers
    """Units of the reader's pool: unit u lies in block u // reader_units."""
    remote: _Numbers

    @property
    def bytes(self) -> int:
        return len(self.local) * self.plan.pieces * self.plan.piece_bytes


def select(plan: Plan, local_blocks: list[int], remote_blocks: list[int], *, skip: int = 0) -> Selection:
    """Which units to read so that `local_blocks` hold what follows the sequence's first `skip` blocks (of the reader).

    `remote_blocks` are those of the whole sequence. What lies behind `local_blocks` is left out; the last local block
    may stay without its end where the writer's blocks are smaller. Raises `TransferError` for blocks that do not exist
    or do not suffice.
    """
    local = _units(local_blocks, plan.reader_units, plan.reader.blocks, "local")
    remote = _units(remote_blocks, plan.writer_units, plan.writer.blocks, "remote")
    if skip < 0:
        raise TransferError("params", "the number of blocks to skip is negative")
    remote = remote[skip * plan.reader_units :][: len(local)]
    if not len(local) or len(local) - len(remote) >= plan.reader_units:
        raise TransferError(
            "params",
            f"{len(remote_blocks)} remote blocks of {plan.writer.block_size} tokens do not fill "
            f"{len(local_blocks)} blocks of {plan.reader.block_size} after the first {skip}",
        )
    local = local[: len(remote)]
    if len(local) * plan.pieces > _MAX_PIECES:
        raise TransferError("params", f"{len(local)} blocks fall into over {_MAX_PIECES} pieces; use equal block sizes")
    order = np.argsort(remote, kind="stable")
    return Selection(plan=plan, local=local[order], remote=remote[order])


def descriptors(selection: Selection, most_bytes: int) -> Iterator[tuple[Descriptors, Descriptors]]:
    """(local, remote), in portions of about `most_bytes`; what is in one run on both sides is one descriptor."""
    plan = selection.plan
    step = max(most_bytes // (plan.pieces * plan.piece_bytes), 1)
    for first in range(0, len(selection.local), step):
        local = _addresses(plan, plan.reader, plan.reader_units, selection.local[first : first + step])
        remote = _addresses(plan, plan.writer, plan.writer_units, selection.remote[first : first + step])
        yield _merge(local, remote, plan.piece_bytes)


def _units(blocks: list[int], units: int, pool_blocks: int, side: str) -> _Numbers:
    """The units of the blocks, in their order. Nothing here trusts `blocks`."""
    if len(blocks) > pool_blocks:
        raise TransferError("params", f"{len(blocks)} {side} blocks are named, the pool has {pool_blocks}")
    if blocks and not 0 <= min(blocks) <= max(blocks) < pool_blocks:
        raise TransferError("params", f"a {side} block is not within the pool of {pool_blocks}")
    if len(set(blocks)) < len(blocks):
        raise TransferError("params", f"a {side} block is named twice")
    numbers = np.array(blocks, dtype=np.uint64)
    if units == 1:
        return numbers
    within = np.arange(units, dtype=np.uint64)
    return (numbers[:, None] * np.uint64(units) + within).reshape(-1)


def _addresses(plan: Plan, pool: Layout, units: int, chosen: _Numbers) -> _Numbers:
    """Addresses of all pieces of the chosen units."""
    if plan.pieces == 1:
        return np.uint64(pool.address) + chosen * np.uint64(pool.block_bytes)
    block, within = chosen // np.uint64(units), chosen % np.uint64(units)
    start = np.uint64(pool.address) + block * np.uint64(pool.block_bytes) + within * np.uint64(plan.piece_bytes)
    stride = np.uint64(plan.piece_bytes * units)
    pieces = np.arange(plan.pieces, dtype=np.uint64) * stride
    addresses: _Numbers = (start[:, None] + pieces).reshape(-1)
    return addresses


def _merge(local: _Numbers, remote: _Numbers, piece_bytes: int) -> tuple[Descriptors, Descriptors]:
    step = np.uint64(piece_bytes)
    breaks = (local[1:] != local[:-1] + step) | (remote[1:] != remote[:-1] + step)
    first = np.concatenate(([0], np.flatnonzero(breaks) + 1))
    lengths = np.diff(np.concatenate((first, [len(local)]))).astype(np.uint64) * step
    return np.stack((local[first], lengths), axis=1), np.stack((remote[first], lengths), axis=1)
