"""The prefix indexes of a router: one mirror of the workers' caches per model and block size. Made by `pool.Pool`."""

import asyncio
import logging

from kvstore.mirror import FetchSnapshot, IndexMirror
from kvstore.registry import Registry
from kvstore.tasks import spawn, stop

logger = logging.getLogger(__name__)

_SYNC_TIMEOUT_S = 20.0

Key = tuple[str, int]
"""Model and block size."""


class Indexes:
    """Opened and closed one by one; `close_all` ends it."""

    def __init__(self, registry: Registry, fetch_snapshot: FetchSnapshot) -> None:
        self._registry = registry
        self._fetch_snapshot = fetch_snapshot
        self._mirrors: dict[Key, IndexMirror] = {}
        self._syncing: dict[Key, asyncio.Task[None]] = {}

    def find(self, key: Key) -> IndexMirror | None:
        return self._mirrors.get(key)

    def is_synced(self, key: Key) -> bool:
        """Whether it has been read once, as far as it could be."""
        return key in self._syncing and self._syncing[key].done()

    async def open(self, key: Key) -> asyncio.Task[None] | None:
        """Begin to follow, unless it is open: the task of the first reading."""
        if key in self._mirrors:
            return None
        model, block_size = key
        mirror = self._mirrors[key] = IndexMirror(
            self._registry.redis,
            self._registry.keys,
            model=model,
            block_size=block_size,
            fetch_snapshot=self._fetch_snapshot,
        )
        await mirror.__aenter__()
        task = self._syncing[key] = spawn(f"first reading of the index of {model}", _await_sync(model, mirror))
        return task

    async def close(self, key: Key) -> None:
        """Follow no longer: what the index knew is in its last snapshot."""
        mirror, task = self._mirrors.pop(key, None), self._syncing.pop(key, None)
        await stop(task)
        if mirror is not None:
            await mirror.__aexit__(None, None, None)

    async def close_all(self) -> None:
        await asyncio.gather(*(self.close(key) for key in list(self._mirrors)))


async def _await_sync(model: str, mirror: IndexMirror) -> None:
    if not await mirror.wait_ready(_SYNC_TIMEOUT_S):
        logger.warning("the index of `%s` is not complete yet; serving all the same", model)
