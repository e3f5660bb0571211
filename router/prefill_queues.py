"""The prefill queues that a router waits in, one per model and block size. `prefill_stage.py` waits in them."""

from contextlib import AsyncExitStack
from types import TracebackType

from kvstore.connect import Redis
from kvstore.keys import Keys
from kvstore.prefill_queue import PrefillQueue
from router.models import Model


class PrefillQueues:
    """Each is opened when it is first needed, and all are closed at the end; an async context manager."""

    def __init__(self, redis: Redis, keys: Keys, router: str) -> None:
        """`router`: a name that no other process has."""
        self._redis = redis
        self._keys = keys
        self._router = router
        self._queues: dict[tuple[str, int], PrefillQueue] = {}
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> "PrefillQueues":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    def find(self, model: Model) -> PrefillQueue | None:
        """The model's, once one of its requests has waited."""
        return self._queues.get((model.name, model.block_size))

    async def open(self, model: Model) -> PrefillQueue:
        key = (model.name, model.block_size)
        if (found := self._queues.get(key)) is not None:
            return found
        queue = self._queues[key] = PrefillQueue(
            self._redis, self._keys, model=model.name, block_size=model.block_size, router=self._router
        )
        await self._stack.enter_async_context(queue)
        return queue

    def depths(self) -> dict[str, int]:
        """Requests of all routers that wait, by model."""
        return {model: queue.depth for (model, _), queue in self._queues.items()}
