"""The lease of one instance: a task that keeps its card in Redis, whatever happens. Made by `Registry.register`."""

import asyncio
import logging
from types import TracebackType
from typing import Protocol

from kvstore.cards import InstanceCard
from kvstore.errors import StoreError
from kvstore.keys import Keys
from kvstore.records import encode_lease
from kvstore.tasks import spawn, stop

_CLOSE_TIMEOUT_S = 2.0
_log = logging.getLogger(__name__)


class LeaseStore(Protocol):
    """What a lease needs of its registry."""

    keys: Keys

    async def write_lease(self, instance: str, record: bytes, ttl_s: float, *, announce: bool) -> None: ...

    async def drop_lease(self, instance: str) -> None: ...

    async def keep_blobs(self) -> None: ...


class Lease:
    """Keeps a card registered until it is closed. An async context manager."""

    def __init__(self, registry: LeaseStore, card: InstanceCard, ttl_s: float) -> None:
        self.card = card
        self.ttl_s = ttl_s
        self.connected = True
        """Whether the last refresh got through; for a gauge."""
        self._registry = registry
        self._record = encode_lease(card, ttl_s, registry.keys.namespace)
        self._write_lock = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """First registration. Raises `StoreError`; afterwards a lost Redis is only logged and tried again."""
        await self._registry.keep_blobs()
        await self._registry.write_lease(self.card.instance, self._record, self.ttl_s, announce=True)
        self._task = spawn(f"lease {self.card.instance}", self._refresh())

    async def update(self, card: InstanceCard) -> None:
        """Replace the card. Raises `StoreError`; with Redis away, a later refresh brings the new card all the same."""
        if card.instance != self.card.instance:
            raise ValueError(f"a lease of {self.card.instance} cannot take the card of {card.instance}")
        record = encode_lease(card, self.ttl_s, self._registry.keys.namespace)
        async with self._write_lock:
            self.card, self._record = card, record
            await self._registry.write_lease(card.instance, record, self.ttl_s, announce=True)

    async def close(self) -> None:
        """Leave at once. With Redis away the lease lapses by itself. May be called twice."""
        task, self._task = self._task, None
        if task is None:
            return
        await stop(task)
        try:
            await asyncio.wait_for(self._registry.drop_lease(self.card.instance), _CLOSE_TIMEOUT_S)
        except (StoreError, asyncio.TimeoutError) as error:
            _log.warning("could not leave the registry, the lease will lapse: %s", error or "no answer")

    async def __aenter__(self) -> "Lease":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _refresh(self) -> None:
        while True:
            # Faster while Redis is away: after its return watchers wait one lease length for us, no longer.
            await asyncio.sleep(self.ttl_s / 3 if self.connected else min(self.ttl_s / 6, 1.0))
            try:
                # The blobs first: who sees the card must find what it refers to.
                await self._registry.keep_blobs()
                async with self._write_lock:
                    await self._registry.write_lease(
                        self.card.instance, self._record, self.ttl_s, announce=not self.connected
                    )
            except StoreError as error:
                if self.connected:
                    _log.warning("lease of %s not refreshed: %s", self.card.instance, error)
                self.connected = False
            else:
                if not self.connected:
                    _log.info("lease of %s refreshed again", self.card.instance)
                self.connected = True
