"""The workers that are there: a connection per instance and a prefix index per model, as the registry lists them.

`app.py` opens one pool; `generation.py` places on it (`generation.Fleet`). An instance that leaves the registry takes
no new requests, and its connection is closed when those in flight are through. A lost Redis removes nothing.
"""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType

from kvstore.cards import InstanceCard
from kvstore.errors import StoreError
from kvstore.index.base import Match
from kvstore.mirror import IndexMirror
from kvstore.registry import Registry
from kvstore.tasks import spawn, stop, within
from kvstore.watch import Added, Change, Changed, Removed, SettingChanged
from kvstore.wire import SnapshotReply
from router.config import RouterConfig
from router.indexes import Indexes, Key
from router.metrics import IndexFigures, Metrics
from router.model_loader import ModelLoader
from router.models import LINGER_S, Model, Models
from router.worker_client import WorkerConnection
from router.worker_session import WorkerLost

logger = logging.getLogger(__name__)

_RETRY_S = 2.0
_CLOSE_S = 15.0
"""Longer than a connection takes to end its session in good order, whatever its worker does."""


class _Instance:
    """One registered instance and the task that serves it."""

    def __init__(self, card: InstanceCard) -> None:
        self.card = card
        self.listed = True
        self.unlisted = asyncio.Event()
        self.connection: WorkerConnection | None = None


class Pool:
    """See the module's docstring. Use as an async context manager."""

    def __init__(
        self,
        registry: Registry,
        models: Models,
        metrics: Metrics,
        config: RouterConfig,
        on_setting: Callable[[SettingChanged], None],
    ) -> None:
        """`on_setting` is told of the registry's settings, which the same watch sees."""
        self._registry = registry
        self._on_setting = on_setting
        self._models = models
        self._metrics = metrics
        self._config = config
        self._session = f"router-{os.urandom(6).hex()}"
        self._watch = self._registry.watch(self._on_change)
        self._instances: dict[str, _Instance] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._connections: dict[str, dict[str, WorkerConnection]] = {}
        self._indexes = Indexes(registry, self._fetch_snapshot)
        self._expiries: dict[Key, asyncio.TimerHandle] = {}
        self._loader = ModelLoader(registry, models)
        self._changed = asyncio.Event()

    async def __aenter__(self) -> "Pool":
        await self._watch.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._watch.__aexit__(kind, error, trace)
        for instance in self._instances.values():
            instance.listed = False
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()  # once: each connection then ends its session by a command, which takes seconds at worst
        try:
            if tasks:
                await asyncio.wait(tasks, timeout=_CLOSE_S)
        finally:
            await stop(*tasks)
            for expiry in self._expiries.values():
                expiry.cancel()
            await self._indexes.close_all()

    # --- for generation ---

    def workers(self, model: str) -> Sequence[WorkerConnection]:
        return [c for c in self._connections.get(model, {}).values() if c.card.role != "prefill"]

    def prefill_workers(self, model: str) -> Sequence[WorkerConnection]:
        return [c for c in self._connections.get(model, {}).values() if c.card.role == "prefill"]

    def match(self, model: str, hashes: Sequence[int]) -> Mapping[str, Match]:
        known = self._models.find(model)
        mirror = self.mirror(known) if known is not None else None
        matches = mirror.match(hashes) if mirror is not None else {}
        now_s = time.monotonic()
        for connection in self._connections.get(model, {}).values():
            if connection.predicted is not None and (blocks := connection.predicted.match(hashes, now_s)):
                matches[connection.instance] = Match(blocks, 0, 0, 0)
        return matches

    async def wait_for_change(self, timeout_s: float) -> None:
        with contextlib.suppress(asyncio.TimeoutError):
            await within(timeout_s, self._changed.wait())

    def _pulse(self) -> None:
        """Wake all who wait for a change."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    # --- for health, status and metrics ---

    async def wait_listed(self, timeout_s: float) -> bool:
        """Wait until the registry was read once, so that a known model is not taken for an unknown one."""
        return await self._watch.wait_listed(timeout_s)

    @property
    def redis_connected(self) -> bool:
        """Whether the registry's view is up to date."""
        return self._watch.connected

    def can_serve(self, model: str | None = None) -> bool:
        """Some worker (of this model) takes requests, and the index of its model has been read."""
        models = self._connections if model is None else (model,)
        return any(c.ready and self._indexes.is_synced(_key(c.card)) for name in models for c in self.workers(name))

    def connections(self) -> list[WorkerConnection]:
        """All of them, of every model."""
        return [connection for by_id in self._connections.values() for connection in by_id.values()]

    def index_figures(self) -> dict[str, IndexFigures]:
        """Per model; see `Metrics.index_figures`."""
        figures = {}
        for model in self._models:
            if (mirror := self.mirror(model)) is not None:
                stats = mirror.stats()
                sessions = sum(c.connected for c in self._connections.get(model.name, {}).values())
                figures[model.name] = IndexFigures(stats.blocks, stats.lag_s, stats.gaps, stats.resyncs, sessions)
        return figures

    def mirror(self, model: Model) -> IndexMirror | None:
        """The index of a model, once one of its instances was seen."""
        return self._indexes.find((model.name, model.block_size))

    # --- the registry's changes ---

    def _on_change(self, change: Change) -> None:
        if isinstance(change, Added):
            self._list(change.card)
        elif isinstance(change, Changed):
            if _place_of(change.card) != _place_of(change.before):
                self._unlist(change.before.instance)
            self._list(change.card)
        elif isinstance(change, Removed):
            self._unlist(change.card.instance)
        else:
            self._on_setting(change)

    def _list(self, card: InstanceCard) -> None:
        known = self._instances.get(card.instance)
        if known is not None and _place_of(known.card) == _place_of(card) and self._can_return(known):
            # Its lease came back before its last request had ended, or its card changed: in its role, say.
            known.card, known.listed = card, True
            if known.connection is not None:
                known.connection.card, known.connection.paused = card, False
                self._models.add(card)
                self._pulse()
            return
        instance = self._instances[card.instance] = _Instance(card)
        self._own(spawn(f"instance {card.instance}", self._serve(instance)))

    def _can_return(self, instance: _Instance) -> bool:
        """Whether what was opened for it is still of use: its model may have been replaced by one of other files."""
        model = self._models.find(instance.card.model)
        return instance.connection is None or (model is not None and not model.misfit(instance.card))

    def _own(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _unlist(self, instance: str) -> None:
        known = self._instances.get(instance)
        if known is None:
            return
        logger.info("instance %s has left the registry", instance)
        known.listed = False
        if known.connection is not None:
            known.connection.paused = True
        self._models.remove(known.card.model, instance)
        mirror = self._indexes.find(_key(known.card))
        if mirror is not None:
            mirror.remove(instance)
        self._metrics.model(known.card.model).forget_instance(instance)
        known.unlisted.set()
        self._pulse()

    async def _serve(self, instance: _Instance) -> None:
        """From the listing of an instance until it is gone and its last request has ended."""
        card = instance.card
        try:
            while await self._open_model(instance):
                await self._connect(instance)  # again where it came back while its connection was being closed
        finally:
            if self._instances.get(card.instance) is instance:
                del self._instances[card.instance]
                self._models.remove(card.model, card.instance)
            if all(other.card.model_files != card.model_files for other in self._instances.values()):
                self._loader.forget(card.model_files)
            self._expire_later(_key(card))

    async def _connect(self, instance: _Instance) -> None:
        """A connection to it until it has left the registry and its last request has ended."""
        card = instance.card
        reading = await self._indexes.open(_key(card))
        if reading is not None:
            reading.add_done_callback(lambda _: self._pulse())
        timeouts_s = (self._config.connect_timeout_s, self._config.control_timeout_s)
        ttl_s = self._config.placement.predicted_ttl_s
        async with WorkerConnection(instance.card, self._session, *timeouts_s, self._pulse, ttl_s) as connection:
            instance.connection = connection
            by_id = self._connections.setdefault(card.model, {})
            by_id[card.instance] = connection
            try:
                while instance.listed:
                    instance.unlisted.clear()
                    await instance.unlisted.wait()
                    await connection.wait_idle()
            finally:
                instance.connection = None
                if by_id.get(card.instance) is connection:
                    del by_id[card.instance]

    def _expire_later(self, key: Key) -> None:
        """An instance has gone. Unless another one comes in time, its model and index are given up."""
        if (timer := self._expiries.get(key)) is not None:
            timer.cancel()
        self._expiries[key] = asyncio.get_running_loop().call_later(LINGER_S, self._expire, key)

    def _expire(self, key: Key) -> None:
        del self._expiries[key]
        if any(_key(instance.card) == key for instance in self._instances.values()):
            return
        model = self._models.find(key[0])
        if model is not None and model.block_size == key[1]:
            self._models.forget(model.name)
        self._own(spawn(f"closing the index of {key[0]}", self._indexes.close(key)))

    async def _open_model(self, instance: _Instance) -> bool:
        """Make the model known and add the instance to it. False: the instance left meanwhile."""
        complaint = ""
        while instance.listed:
            instance.unlisted.clear()  # of an earlier time
            card = instance.card
            try:
                model = await self._loader.model_of(card)
            except (StoreError, ValueError) as error:
                problem = f"the files of `{card.model}` cannot be used: {error}"
            else:
                problem = model.misfit(card)
                if not problem and instance.listed:
                    self._models.add(card)
                    self._pulse()
                if not problem:
                    return instance.listed
            if problem != complaint:
                logger.warning("instance %s is left out for now: %s", card.instance, problem)
                complaint = problem
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(instance.unlisted.wait(), _RETRY_S)
        return False

    async def _fetch_snapshot(self, instance: str) -> SnapshotReply | None:
        known = self._instances.get(instance)
        if known is None or known.connection is None:
            return None
        try:
            return await known.connection.snapshot()
        except WorkerLost:
            return None


def _key(card: InstanceCard) -> Key:
    return card.model, card.block_size


def _place_of(card: InstanceCard) -> tuple[str, str, str, int, str]:
    """What a connection was made for."""
    return card.grpc_address, card.triton_model, card.model, card.block_size, card.model_files
