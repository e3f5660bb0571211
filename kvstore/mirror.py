"""The router's mirror of all workers' KV caches: a prefix index fed by the event stream, and repaired where it is
wrong.

Each instance is followed on its own: epoch, seq and digest tell whether something was missed, and then only that
instance is resynchronised, from its own snapshot, while its batches wait in a buffer. A lost Redis changes nothing in
the index; it is caught up with, or resynchronised, when Redis is back. The router calls `match` for each request, on
the event loop.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator
from types import TracebackType
from typing import Any, TypeVar

from msgspec import Struct
from redis.asyncio import Redis

from kvstore.batches import parse_id
from kvstore.cards import Digest
from kvstore.errors import StoreDataError, StoreError
from kvstore.events import BEGINNING, Entry, EventReader
from kvstore.follow import Follower
from kvstore.index.base import Hashes, Match, PrefixIndex
from kvstore.index.memory import MemoryIndex
from kvstore.keys import Keys
from kvstore.snapshots import SnapshotStore
from kvstore.tasks import Backoff, spawn, stop
from kvstore.wire import SnapshotReply

FetchSnapshot = Callable[[str], Awaitable[SnapshotReply | None]]
"""Asks an instance for its resident blocks. None: it does not answer (now). It should not raise."""

_FETCHES_AT_ONCE = 4
_LONGEST_RETRY_S = 5.0
_SLICE_S = 0.001
_TURN = 0.8
"""Of the interval: the turn to write a snapshot is over just before its holder takes the next one."""
_CLOSE_TIMEOUT_S = 2.0
_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class MirrorStats(Struct, frozen=True):
    """For metrics."""

    connected: bool
    lag_s: float
    lag_entries: int
    blocks: int
    instances: int
    unsynced: int
    """Instances that are being resynchronised."""
    gaps: int
    """Times that something of an instance was missing: batches, or by digest."""
    resyncs: int
    """Snapshots of instances that were brought in."""
    broken_entries: int


class IndexMirror:
    """See the module's docstring. An async context manager: enter it to follow, leave it to write a last snapshot.

    Entering does not wait for Redis; `wait_ready` does.
    """

    def __init__(
        self,
        redis: Redis,
        keys: Keys,
        *,
        model: str,
        block_size: int,
        fetch_snapshot: FetchSnapshot,
        index: PrefixIndex | None = None,
        snapshot_every_s: float = 15.0,
        fetch_timeout_s: float = 10.0,
        fetch_attempts: int = 6,
        retry_s: float = 0.2,
        silent_s: float = 120.0,
    ) -> None:
        """`silent_s`: an instance that others outlive by so much stream time is forgotten, until it speaks again."""
        self.connected = False
        self._follower = Follower(index if index is not None else MemoryIndex())
        self._reader = EventReader(redis, keys.events(model, block_size))
        self._store = SnapshotStore(redis, keys, model, block_size)
        self._fetch_snapshot = fetch_snapshot
        self._snapshot_every_s = snapshot_every_s
        self._fetch_timeout_s = fetch_timeout_s
        self._fetch_attempts = fetch_attempts
        self._retry_s = retry_s
        self._silent_ms = round(silent_s * 1000)
        self._position = BEGINNING
        self._caught_up = asyncio.Event()
        self._fetches = asyncio.Semaphore(_FETCHES_AT_ONCE)
        self._tasks: set[asyncio.Task[None]] = set()
        self._resyncing: dict[str, asyncio.Task[None]] = {}
        self._resyncs = 0

    async def __aenter__(self) -> "IndexMirror":
        self._spawn("index mirror", self._follow())
        self._spawn("index snapshots", self._save_regularly())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await stop(*self._tasks)
        try:
            await asyncio.wait_for(self._save(), _CLOSE_TIMEOUT_S)
        except (StoreError, asyncio.TimeoutError) as problem:
            _log.warning("no last snapshot of the index: %s", problem or "Redis does not answer")

    def match(self, hashes: Hashes) -> dict[str, Match]:
        """Which instances hold a prefix of these blocks, and how much of it. The hot path: no I/O, no waiting."""
        return self._follower.index.match(hashes)

    def remove(self, instance: str) -> None:
        """The registry says that the instance is gone."""
        if (task := self._resyncing.pop(instance, None)) is not None:
            task.cancel()
        self._follower.forget(instance)

    def digest(self, instance: str) -> Digest:
        """Of what the index holds of an instance."""
        return self._follower.index.digest(instance)

    def instances(self) -> list[str]:
        """Those whose blocks the index knows, or is about to know."""
        return list(self._follower.instances)

    def is_synced(self, instance: str) -> bool:
        """Whether the index follows this instance without a known fault."""
        state = self._follower.instances.get(instance)
        return state is not None and not state.resyncing

    def stats(self) -> MirrorStats:
        return MirrorStats(
            connected=self.connected,
            lag_s=self._reader.lag_s,
            lag_entries=self._reader.lag_entries,
            blocks=self._follower.index.blocks(),
            instances=len(self._follower.instances),
            unsynced=sum(state.resyncing for state in self._follower.instances.values()),
            gaps=self._follower.gaps,
            resyncs=self._resyncs,
            broken_entries=self._reader.broken,
        )

    async def wait_ready(self, timeout_s: float) -> bool:
        """Wait until the stream was read to its end and nothing is being resynchronised. False: not in this time."""
        try:
            await asyncio.wait_for(self._until_ready(), timeout_s)
        except asyncio.TimeoutError:
            return False
        return True

    async def _until_ready(self) -> None:
        await self._caught_up.wait()
        while self._resyncing:
            await asyncio.wait(list(self._resyncing.values()))

    async def _follow(self) -> None:
        backoff = Backoff()
        loaded = False
        while True:
            try:
                if not loaded:
                    await self._load()
                    loaded = True
                await self._take(await self._reader.read())
            except StoreError as error:
                if self.connected or not loaded:
                    _log.warning("KV events cannot be read, the index stays as it is: %s", error)
                self.connected = False
                await backoff.pause()
                continue
            except Exception:  # noqa: BLE001 - nobody else goes on with the stream; batches lost here show as gaps
                _log.exception("following KV events failed, going on")
                self.connected = False
                await backoff.pause()
                continue
            self.connected = True
            backoff.reset()
            if self._reader.at_end:
                self._caught_up.set()

    async def _load(self) -> None:
        """Begin with the newest snapshot of the index, if there is a usable one."""
        try:
            snapshot = await self._store.load()
        except StoreDataError as error:
            _log.warning("starting with an empty index: %s", error)
            return
        if snapshot is None:
            return
        for saved in snapshot.instances:
            for _ in self._follower.restore(saved, parse_id(snapshot.stream_id)[0]):
                await asyncio.sleep(0)
        self._reader.last_id = self._position = snapshot.stream_id

    async def _take(self, entries: list[Entry]) -> None:
        """Bring entries in, a millisecond at a time: requests are waiting on the same loop."""
        ends_s = time.perf_counter() + _SLICE_S
        for entry_id, batch in entries:
            if self._follower.handle(parse_id(entry_id)[0], batch):
                self._resyncing[batch.instance] = self._spawn(f"resync {batch.instance}", self._resync(batch.instance))
            self._position = entry_id
            if time.perf_counter() > ends_s:
                await asyncio.sleep(0)
                ends_s = time.perf_counter() + _SLICE_S
        self._position = self._reader.last_id

    async def _resync(self, instance: str) -> None:
        """Until the instance is in step again. One that does not answer is forgotten, until it speaks again."""
        backoff = Backoff(self._retry_s, _LONGEST_RETRY_S)
        for _ in range(self._fetch_attempts):
            reply = await self._fetch(instance)
            if reply is not None and await self._install(reply):
                self._resyncs += 1
                break
            await backoff.pause()
        else:
            _log.warning("instance %s gave no usable snapshot: forgetting its blocks", instance)
            self._follower.forget(instance)
        self._resyncing.pop(instance, None)

    async def _fetch(self, instance: str) -> SnapshotReply | None:
        async with self._fetches:
            try:
                reply = await asyncio.wait_for(self._fetch_snapshot(instance), self._fetch_timeout_s)
            except asyncio.TimeoutError:
                return None
            except Exception as error:  # noqa: BLE001 - the callable is not ours: its fault must not end the mirror
                _log.warning("asking instance %s for its blocks failed: %s", instance, error)
                return None
        return reply if reply is not None and reply.instance == instance else None

    async def _install(self, reply: SnapshotReply) -> bool:
        try:
            return await _in_slices(self._follower.install(reply))
        except ValueError as error:
            _log.warning("instance %s sent a broken snapshot: %s", reply.instance, error)
            return False

    async def _save_regularly(self) -> None:
        while True:
            await asyncio.sleep(self._snapshot_every_s)
            for instance in self._follower.silent(self._silent_ms):
                _log.info("instance %s is silent: forgetting its blocks", instance)
                self.remove(instance)
            try:
                await self._save()
            except StoreError as error:
                _log.log(logging.WARNING if self.connected else logging.DEBUG, "no snapshot of the index: %s", error)

    async def _save(self) -> None:
        """Write a snapshot, if it is our turn and we know better than what is there already."""
        if not self._caught_up.is_set() or not await self._store.claim(_TURN * self._snapshot_every_s):
            return
        position = self._position
        instances = []
        for instance in list(self._follower.instances):
            if (saved := await _in_slices(self._follower.save(instance))) is not None:
                instances.append(saved)
            await asyncio.sleep(0)
        await self._store.save(position, instances)

    def _spawn(self, name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = spawn(name, work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


async def _in_slices(steps: Generator[None, None, _T]) -> _T:
    """Run to the end, with a turn for others on the loop after each step."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: _T = end.value
            return result
        await asyncio.sleep(0)
