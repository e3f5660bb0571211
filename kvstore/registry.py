"""The registry: who serves what (design contract 2). The control plane; what etcd is to Dynamo.

A worker keeps its card here under a lease (`register`), a router follows all cards and settings (`watch`). Files that
cards refer to, such as tokenizers, travel as blobs named by their SHA-256. Keys: see `keys`.
"""

import asyncio
import hashlib
import logging
import uuid
from collections.abc import Callable
from typing import Any

import msgspec
from redis.asyncio import Redis

from kvstore.cards import InstanceCard
from kvstore.connect import store_errors
from kvstore.errors import StoreDataError
from kvstore.keys import RETENTION_S, Keys
from kvstore.lease import Lease
from kvstore.records import (
    MAX_BLOB_BYTES,
    MAX_SETTINGS,
    LeaseRecord,
    Listing,
    decode_lease,
    decode_settings,
    encode_setting,
    is_sha256,
)
from kvstore.watch import Change, Watch

DEFAULT_TTL_S = 10.0
_log = logging.getLogger(__name__)

# KEYS: the set of instances, then an instance's key for each id. ARGV: the ids, in the same order.
# A reader saw these ids without a card. Drop those that still have none: one may have come back in between.
_PRUNE = """
local gone = 0
for i, id in ipairs(ARGV) do
  if redis.call('EXISTS', KEYS[i + 1]) == 0 then
    gone = gone + redis.call('SREM', KEYS[1], id)
  end
end
return gone
"""


class Registry:
    """One namespace's registry. Holds no connection and no task of its own: leases and watches do.

    All methods raise `StoreError`.
    """

    def __init__(self, redis: Redis, keys: Keys | None = None) -> None:
        self.redis = redis
        self.keys = keys or Keys()
        self._blobs: dict[str, bytes] = {}
        self._prune = redis.register_script(_PRUNE)

    async def register(self, card: InstanceCard, *, ttl_s: float = DEFAULT_TTL_S) -> Lease:
        """Announce an instance. The lease refreshes itself until it is closed; use it as a context manager or close it.

        `ttl_s` is how long the instance stays listed after its process died without a word.
        """
        lease = Lease(self, card, ttl_s)
        await lease.open()
        return lease

    def watch(self, on_change: Callable[[Change], None], *, poll_s: float = 2.0) -> Watch:
        """Follow instances and settings; an async context manager. See `Watch`."""
        return Watch(self, on_change, poll_s)

    async def instances(self) -> list[InstanceCard]:
        """All instances with a lease, in the order of their ids. Broken cards are left out, with a line in the log."""
        listing = await self.list()
        for what, why in listing.broken.items():
            _log.warning("registry: skipped %s: %s", what, why)
        return [listing.leases[instance].card for instance in sorted(listing.leases)]

    async def list(self) -> Listing:
        """Everything of the namespace, in two round trips."""
        with store_errors(self.redis):
            async with self.redis.pipeline(transaction=False) as pipe:
                pipe.smembers(self.keys.instances())
                pipe.hgetall(self.keys.settings())
                members, stored = await pipe.execute()
            ids = sorted(member.decode(errors="replace") for member in members)
            async with self.redis.pipeline(transaction=True) as pipe:
                for instance in ids:
                    pipe.get(self.keys.instance(instance))
                pipe.get(self.keys.era())  # read last: whatever was lost before this shows in it
                *cards, era = await pipe.execute()
            leases, broken, gone = _decode_cards(dict(zip(ids, cards, strict=True)))
            if gone:
                await self._prune(keys=[self.keys.instances(), *map(self.keys.instance, gone)], args=gone)
        settings, broken_settings = decode_settings(stored)
        return Listing((era or b"").decode(errors="replace"), leases, broken | broken_settings, settings)

    async def put_blob(self, data: bytes) -> str:
        """Store a file and return its name, the SHA-256 in hex. It stays an hour longer than this registry's leases.

        The bytes are kept in memory as well, so that an emptied Redis gets them back.
        """
        if len(data) > MAX_BLOB_BYTES:
            raise StoreDataError(f"a blob of {len(data)} bytes is over the limit of {MAX_BLOB_BYTES}")
        name = await asyncio.to_thread(_sha256, data)
        self._blobs[name] = data
        await self._keep_blob(name)
        return name

    async def get_blob(self, name: str) -> bytes | None:
        """A stored file, None if it is not there. A damaged one raises `StoreDataError`."""
        if not is_sha256(name):
            raise StoreDataError(f"{name!r} is no SHA-256 in hex")
        with store_errors(self.redis):
            data: Any = await self.redis.get(self.keys.blob(name))
        if data is None:
            return None
        if await asyncio.to_thread(_sha256, data) != name:
            raise StoreDataError(f"blob {name} is damaged: its content has another hash")
        return bytes(data)

    async def keep_blobs(self) -> None:
        """Called at each refresh of a lease: prolong our blobs, and bring back lost ones."""
        for name in self._blobs:
            await self._keep_blob(name)

    async def set_setting(self, name: str, value: Any) -> None:
        """Set a dynamic setting to a JSON value of at most 4 KiB; None deletes it. Watchers learn of it at once."""
        key = self.keys.settings()
        with store_errors(self.redis):
            if value is None:
                await self.redis.hdel(key, name)
            else:
                data = encode_setting(name, value)
                if not await self.redis.hexists(key, name) and await self.redis.hlen(key) >= MAX_SETTINGS:
                    raise StoreDataError(f"there are {MAX_SETTINGS} settings already: delete some")
                await self.redis.hset(key, name, data)
            await self.redis.publish(self.keys.changes(), f"={name}")

    async def get_setting(self, name: str, default: Any = None) -> Any:
        """The value as JSON knows it (dict, list, str, int, float, bool)."""
        with store_errors(self.redis):
            data = await self.redis.hget(self.keys.settings(), name)
        if data is None:
            return default
        try:
            return msgspec.json.decode(data)
        except msgspec.MsgspecError as error:
            raise StoreDataError(f"setting {name} is no JSON: {error}") from error

    async def write_lease(self, instance: str, record: bytes, ttl_s: float, *, announce: bool) -> None:
        """For `Lease`: put the card in place for another `ttl_s`; tell watchers if `announce` or if it was gone."""
        with store_errors(self.redis):
            async with self.redis.pipeline(transaction=True) as pipe:
                pipe.set(self.keys.instance(instance), record, px=round(ttl_s * 1000), get=True)
                pipe.sadd(self.keys.instances(), instance)
                pipe.expire(self.keys.instances(), RETENTION_S)
                pipe.set(self.keys.era(), uuid.uuid4().hex, nx=True)
                pipe.expire(self.keys.era(), RETENTION_S)
                before, *_ = await pipe.execute()
            if announce or before is None:
                await self.redis.publish(self.keys.changes(), f"+{instance}")

    async def drop_lease(self, instance: str) -> None:
        """For `Lease`: leave, and say so."""
        with store_errors(self.redis):
            async with self.redis.pipeline(transaction=True) as pipe:
                pipe.delete(self.keys.instance(instance))
                pipe.srem(self.keys.instances(), instance)
                pipe.publish(self.keys.changes(), f"-{instance}")
                await pipe.execute()

    async def _keep_blob(self, name: str) -> None:
        with store_errors(self.redis):
            if not await self.redis.expire(self.keys.blob(name), RETENTION_S):
                await self.redis.set(self.keys.blob(name), self._blobs[name], ex=RETENTION_S)


def _decode_cards(stored: dict[str, bytes | None]) -> tuple[dict[str, LeaseRecord], dict[str, str], list[str]]:
    """Usable leases, reasons why others are not, and ids without a card."""
    leases: dict[str, LeaseRecord] = {}
    broken: dict[str, str] = {}
    gone: list[str] = []
    for instance, data in stored.items():
        if data is None:
            gone.append(instance)
            continue
        try:
            leases[instance] = decode_lease(instance, data)
        except StoreDataError as error:
            broken[instance] = str(error)
    return leases, broken, gone


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
