"""Snapshots of a prefix index in Redis, so that a router that starts need not ask every worker. `mirror` uses it.

One hash per model and block size: `id`, the stream entry up to which it reaches, and `data`. Several routers keep the
same index; a short-lived key says whose turn it is to write. Hashes are as good as random and do not compress, so
`data` is plain.
"""

import uuid
from typing import Any

import msgspec
from msgspec import Struct
from redis.asyncio import Redis

from kvstore.batches import parse_id
from kvstore.connect import store_errors
from kvstore.errors import StoreDataError
from kvstore.keys import RETENTION_S, Keys
from kvstore.residency import unpack
from kvstore.wire import TierHashes

VERSION = 1
MAX_SNAPSHOT_BYTES = 256 << 20

# KEYS: the snapshot, the stream. ARGV: the stream id that the snapshot reaches to, its data, seconds it is kept.
# Never replaces a newer snapshot. The stream is trimmed behind the snapshot before this one, so that a reader that is
# slower than the writer still has one interval to catch up. Returns 1 if written.
_SAVE = """
local function older(a, b)
  local a_ms, a_n = string.match(a, '^(%d+)-(%d+)$')
  local b_ms, b_n = string.match(b, '^(%d+)-(%d+)$')
  a_ms, a_n, b_ms, b_n = tonumber(a_ms), tonumber(a_n), tonumber(b_ms), tonumber(b_n)
  return a_ms < b_ms or (a_ms == b_ms and a_n < b_n)
end
local before = redis.call('HGET', KEYS[1], 'id')
if before and older(ARGV[1], before) then return 0 end
redis.call('HSET', KEYS[1], 'id', ARGV[1], 'data', ARGV[2])
redis.call('EXPIRE', KEYS[1], ARGV[3])
if before then redis.call('XTRIM', KEYS[2], 'MINID', '~', before) end
return 1
"""

# KEYS: the writer key. ARGV: our name, milliseconds of the turn. Returns 1 if it is our turn.
_CLAIM = """
if redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2]) then return 1 end
return redis.call('GET', KEYS[1]) == ARGV[1] and 1 or 0
"""


class SavedInstance(Struct, frozen=True, array_like=True):
    """One instance's blocks after batch `seq` of `epoch`."""

    instance: str
    epoch: int
    seq: int
    tiers: list[TierHashes]


class IndexSnapshot(Struct, frozen=True, array_like=True):
    """`stream_id` was read last before the snapshot was begun. Later entries may be in it already: their seq tells."""

    version: int
    model: str
    block_size: int
    stream_id: str
    instances: list[SavedInstance]


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(IndexSnapshot).decode


class SnapshotStore:
    """Reads and writes the snapshot of one model and block size. Methods raise `StoreError`."""

    def __init__(self, redis: Redis, keys: Keys, model: str, block_size: int) -> None:
        self._redis = redis
        self._model = model
        self._block_size = block_size
        self._snapshot_key = keys.index(model, block_size)
        self._stream_key = keys.events(model, block_size)
        self._writer_key = keys.index_writer(model, block_size)
        self._name = uuid.uuid4().hex
        self._save = redis.register_script(_SAVE)
        self._claim = redis.register_script(_CLAIM)

    async def claim(self, turn_s: float) -> bool:
        """Whether it is our turn to write; for `turn_s` it is nobody else's then."""
        with store_errors(self._redis):
            return bool(await self._claim(keys=[self._writer_key], args=[self._name, max(1, round(turn_s * 1000))]))

    async def save(self, stream_id: str, instances: list[SavedInstance]) -> bool:
        """Write a snapshot, trim the stream. False: there is a newer one. A too large one raises `StoreDataError`."""
        data = _encode(IndexSnapshot(VERSION, self._model, self._block_size, stream_id, instances))
        if len(data) > MAX_SNAPSHOT_BYTES:
            raise StoreDataError(f"an index snapshot of {len(data)} bytes is over the limit of {MAX_SNAPSHOT_BYTES}")
        with store_errors(self._redis):
            saved = await self._save(keys=[self._snapshot_key, self._stream_key], args=[stream_id, data, RETENTION_S])
        return bool(saved)

    async def load(self) -> IndexSnapshot | None:
        """The newest snapshot, None if there is none. Raises `StoreDataError` for one that cannot be used."""
        with store_errors(self._redis):
            data: Any = await self._redis.hget(self._snapshot_key, "data")
        if data is None:
            return None
        try:
            snapshot = _decode(data)
            parse_id(snapshot.stream_id)
            for saved in snapshot.instances:
                unpack(saved.tiers)
        except ValueError as error:  # msgspec's errors are ValueErrors
            raise StoreDataError(f"the index snapshot in Redis is broken: {error}") from error
        if (snapshot.version, snapshot.model, snapshot.block_size) != (VERSION, self._model, self._block_size):
            raise StoreDataError("the index snapshot in Redis is of another version or model")
        return snapshot
