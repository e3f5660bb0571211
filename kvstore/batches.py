"""Event batches as bytes: limits, validation, and the cutting of long ops. Pure; `events` and `mirror` use it."""

from collections.abc import Iterable

import msgspec

from kvstore.cards import EventBatch, KvOp, Removed, Stored

MAX_BATCH_HASHES = 8192
"""Most hashes of one entry; longer ops are split over several batches."""
MAX_ENTRY_BYTES = 1 << 20
"""A reader skips entries beyond this; a full batch takes some 75 KB."""
MAX_HASH = (1 << 64) - 1

encode_batch = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(EventBatch).decode


def parse_id(entry_id: bytes | str) -> tuple[int, int]:
    """Milliseconds since 1970 and the count within them."""
    text = entry_id.decode() if isinstance(entry_id, bytes) else entry_id
    time_ms, _, count = text.partition("-")
    return int(time_ms), int(count or 0)


def decode_batch(data: bytes) -> EventBatch:
    """One validated batch. Raises `ValueError`."""
    if len(data) > MAX_ENTRY_BYTES:
        raise ValueError(f"{len(data)} bytes are more than {MAX_ENTRY_BYTES}")
    batch = _decode(data)
    if batch.seq < 0 or batch.epoch < 0:
        raise ValueError("seq or epoch below 0")
    if not batch.ops and batch.digest is None:
        raise ValueError("neither ops nor a digest")
    for op in batch.ops:
        if isinstance(op, (Stored, Removed)) and op.hashes and not _are_hashes(op.hashes):
            raise ValueError("a hash is no uint64")
    return batch


def _are_hashes(values: list[int]) -> bool:
    return min(values) >= 0 and max(values) <= MAX_HASH


def split(ops: Iterable[KvOp], most: int = MAX_BATCH_HASHES) -> Iterable[list[KvOp]]:
    """Cut ops into batches of at most `most` hashes, in order."""
    batch: list[KvOp] = []
    room = most
    for op in ops:
        for piece in _pieces(op, most):
            size = len(piece.hashes) if isinstance(piece, (Stored, Removed)) else 1
            if size > room:
                yield batch
                batch, room = [], most
            batch.append(piece)
            room -= size
    if batch:
        yield batch


def _pieces(op: KvOp, most: int) -> Iterable[KvOp]:
    if not isinstance(op, (Stored, Removed)) or len(op.hashes) <= most:
        yield op
        return
    for begin in range(0, len(op.hashes), most):
        hashes = op.hashes[begin : begin + most]
        if isinstance(op, Removed):
            yield Removed(hashes, op.tier)
        else:
            yield Stored(op.hashes[begin - 1] if begin else op.parent, hashes, op.tier)
