"""An instance's companions as models of its tritonserver: loaded and unloaded with it. `deployment.py` calls it."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

from dynamo_llm.hosts.tritonserver.repository import Repository, RepositoryError
from kvstore.tasks import Backoff

_PATIENCE_S = 30.0


class CompanionModels:
    """For one event loop. What is asked of Triton blocks a thread, and goes on there when the asker is cancelled."""

    def __init__(
        self,
        repository: Repository,
        needed: Sequence[str],
        others: Sequence[str],
        config: dict[str, Any] | None,
        say: Callable[[str], None],
    ) -> None:
        """Routers need `needed`. `config` is that of each; None where Triton lets nobody load a model."""
        self._repository = repository
        self._needed = needed
        self._all = [*needed, *others]
        self._config = config
        self._say = say
        self._loading: set[asyncio.Task[None]] = set()
        self._complaints: set[str] = set()

    async def ready(self) -> None:
        """Load them; where Triton does not let us, wait for those of the operator that routers need."""
        patience_s, backoff = time.monotonic() + _PATIENCE_S, Backoff(most_s=1.0)
        while True:
            if self._config is not None:
                await asyncio.gather(*(asyncio.shield(self._begin(name)) for name in self._all))
            missing = [name for name in self._needed if not await self._is_ready(name)]
            if not missing:
                return
            if time.monotonic() > patience_s:
                self._complain(f"routers cannot use it before {' and '.join(missing)} are loaded (docs/triton.md)")
            await backoff.pause()

    async def unload(self) -> None:
        """All, also those that are being loaded: without their model they serve nobody."""
        if self._loading:
            await asyncio.wait(self._loading)
        if self._config is not None:
            await asyncio.gather(*(asyncio.to_thread(self._unload, name) for name in self._all))

    def _begin(self, name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(self._load(name))
        self._loading.add(task)
        task.add_done_callback(self._loading.discard)
        return task

    async def _load(self, name: str) -> None:
        if await self._is_ready(name):
            return
        try:
            await asyncio.to_thread(self._repository.load, name, self._config or {})
        except RepositoryError as error:
            self._complain(f"{name} cannot be loaded: {error}")

    def _unload(self, name: str) -> None:
        with contextlib.suppress(RepositoryError):  # it was not loaded, or the server is about to end
            self._repository.unload(name)

    async def _is_ready(self, name: str) -> bool:
        return bool(await asyncio.to_thread(self._repository.is_ready, name))

    def _complain(self, text: str) -> None:
        """Once of each."""
        if text not in self._complaints:
            self._complaints.add(text)
            self._say(text)
