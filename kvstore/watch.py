"""A router's view of the registry: follows instances and settings through restarts of Redis. Made by `Registry.watch`.

A full listing each `poll_s` is the truth; pub/sub messages only make it come sooner. Whatever cuts us off from Redis
removes no instance: the view stays as it is, and after Redis is back, or was found emptied, each instance has one
full lease length to register again.
"""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, Protocol

from msgspec import Struct
from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.exceptions import RedisError

from kvstore.cards import InstanceCard
from kvstore.connect import store_errors
from kvstore.errors import StoreError
from kvstore.keys import Keys
from kvstore.records import LeaseRecord, Listing
from kvstore.tasks import Backoff, spawn, stop

_BURST_S = 0.05
_log = logging.getLogger(__name__)


class Added(Struct, frozen=True):
    card: InstanceCard


class Changed(Struct, frozen=True):
    card: InstanceCard
    before: InstanceCard


class Removed(Struct, frozen=True):
    card: InstanceCard


class SettingChanged(Struct, frozen=True):
    name: str
    value: Any
    """None: deleted."""


Change = Added | Changed | Removed | SettingChanged


class WatchStore(Protocol):
    """What a watch needs of its registry."""

    redis: Redis
    keys: Keys

    async def list(self) -> Listing: ...


class Watch:
    """Calls `on_change` on the event loop for each difference; an async context manager.

    It begins with nothing known: the first listing yields an `Added` for each instance.
    """

    def __init__(self, registry: WatchStore, on_change: Callable[[Change], None], poll_s: float) -> None:
        self.connected = False
        """Whether the view is up to date; for a gauge."""
        self.settings: dict[str, Any] = {}
        """All settings, as last seen."""
        self._registry = registry
        self._on_change = on_change
        self._poll_s = poll_s
        self._leases: dict[str, LeaseRecord] = {}
        self._era = ""
        self._grace_from_s = float("-inf")
        self._left: set[str] = set()
        self._lost_settings: set[str] = set()
        self._reported: dict[str, str] = {}
        self._listed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def instances(self) -> dict[str, InstanceCard]:
        """The view: instance id -> card."""
        return {instance: lease.card for instance, lease in self._leases.items()}

    async def wait_listed(self, timeout_s: float) -> bool:
        """Wait for the first listing. False: Redis did not answer in time."""
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._listed.wait(), timeout_s)
        return self._listed.is_set()

    async def __aenter__(self) -> "Watch":
        self._task = spawn("registry watch", self._run())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await stop(self._task)

    async def _run(self) -> None:
        backoff = Backoff()
        while True:
            try:
                async with self._registry.redis.pubsub() as pubsub:
                    with store_errors(self._registry.redis):
                        await pubsub.subscribe(self._registry.keys.changes())
                    await self._follow(pubsub, backoff)
            except StoreError as error:
                if self.connected or not self._listed.is_set():
                    _log.warning("registry not reachable, the last view stays: %s", error)
                self.connected = False
            except RedisError as error:  # from closing a broken subscription
                _log.debug("closing a subscription: %s", error)
            except Exception:  # noqa: BLE001 - nobody else would go on watching; the next listing is the whole truth
                _log.exception("watching the registry failed, beginning again")
                self.connected = False
            await backoff.pause()

    async def _follow(self, pubsub: PubSub, backoff: Backoff) -> None:
        """Until Redis is lost, which raises `StoreError`."""
        loop = asyncio.get_running_loop()
        while True:
            with store_errors(self._registry.redis):
                message = await pubsub.get_message(timeout=self._poll_s)
                burst_ends_s = loop.time() + _BURST_S
                while message is not None:  # take what has come, so that a burst costs one listing
                    self._note(message)
                    message = await pubsub.get_message(timeout=0.005) if loop.time() < burst_ends_s else None
            self._compare(await self._registry.list(), loop.time())
            backoff.reset()

    def _note(self, message: dict[str, Any]) -> None:
        if message["type"] == "subscribe":
            # Also sent when redis-py reconnects unseen: from here on counts the time to register again.
            self._grace_from_s = asyncio.get_running_loop().time()
        elif message["type"] == "message" and message["data"].startswith(b"-"):
            self._left.add(message["data"][1:].decode(errors="replace"))

    def _compare(self, listing: Listing, now_s: float) -> None:
        """Bring the view up to date and report each difference."""
        flushed = bool(self._era) and listing.era != self._era
        if flushed:
            _log.warning("the registry was emptied: instances have a lease length to register again")
            self._grace_from_s = now_s
        self._era = listing.era
        self._report_broken(listing.broken)
        for instance, lease in listing.leases.items():
            self._left.discard(instance)
            self._update(instance, lease)
        for instance in [known for known in self._leases if known not in listing.leases]:
            lease = self._leases[instance]
            waiting = now_s < self._grace_from_s + lease.ttl_s and instance not in self._left
            if not waiting and instance not in listing.broken:
                del self._leases[instance]
                self._tell(Removed(lease.card))
        self._left.clear()
        self._compare_settings(listing.settings, flushed=flushed)
        self.connected = True
        self._listed.set()

    def _update(self, instance: str, lease: LeaseRecord) -> None:
        before = self._leases.get(instance)
        self._leases[instance] = lease
        if before is None:
            self._tell(Added(lease.card))
        elif before.card != lease.card:
            self._tell(Changed(lease.card, before.card))

    def _compare_settings(self, settings: dict[str, Any], *, flushed: bool) -> None:
        """Settings that went with the data of Redis stay in force here until someone sets them again."""
        if flushed:
            self._lost_settings = self.settings.keys() - settings.keys()
        self._lost_settings -= settings.keys()
        for name, value in settings.items():
            if name not in self.settings or self.settings[name] != value:
                self.settings[name] = value
                self._tell(SettingChanged(name, value))
        for name in self.settings.keys() - settings.keys() - self._lost_settings:
            del self.settings[name]
            self._tell(SettingChanged(name, None))

    def _report_broken(self, broken: dict[str, str]) -> None:
        """One line for each broken thing, not one for each listing."""
        for what, why in broken.items():
            if self._reported.get(what) != why:
                _log.warning("registry: skipped %s: %s", what, why)
        self._reported = broken

    def _tell(self, change: Change) -> None:
        try:
            self._on_change(change)
        except Exception:  # noqa: BLE001 - the callback is not ours: its fault must not end the watch
            _log.exception("a registry callback failed on %s", type(change).__name__)
