"""What a worker does for its role besides serving: its KV blocks are read by others, it reads theirs, and as a prefill
worker it calls for requests that wait in the queue. `instance.py` makes one `Duties` for each life of an engine.
"""

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack

import msgspec

from dynamo_llm.engines.base import Engine, EngineError, MovesBlocks
from dynamo_llm.transfer import KvTransfer
from dynamo_llm.transfer.follow import follow_peers, publish
from dynamo_llm.transfer.metadata import agent_name
from dynamo_llm.transfer.metrics import TransferMetrics
from kvstore.cards import InstanceCard, Role
from kvstore.prefill_caller import PrefillCaller
from kvstore.registry import Registry

ROOM_TOKENS = 8192
"""A prefill worker that has fewer prompt tokens to compute calls for another request. One large step's worth: with less
it would compute short prompts one by one, and run dry between two of them (benchmarks/disagg.py)."""


class Duties:
    """See the module's docstring. `take` comes first, then `enter` and `begin` once the card is registered; all three
    again for another role."""

    def __init__(
        self,
        registry: Registry,
        engine: Engine,
        metrics: TransferMetrics,
        *,
        instance: str,
        epoch: int,
        waiting_tokens: Callable[[], int | None],
    ) -> None:
        """`waiting_tokens()`: prompt tokens it has to compute; None where no router could send it another request."""
        self.role: Role = "agg"
        self._registry, self._engine, self._metrics = registry, engine, metrics
        self._instance, self._epoch = instance, epoch
        self._waiting_tokens = waiting_tokens
        self._transfer: KvTransfer | None = None
        self._following = AsyncExitStack()
        self._calling = AsyncExitStack()

    async def take(self, role: Role) -> None:
        """Be able to do what the role asks for. Raises `EngineError`, and nothing has changed then.

        Once opened a transfer stays, whatever the next role: others may have blocks to fetch.
        """
        engine = self._engine
        if role not in engine.info.roles:
            can = " and ".join(engine.info.roles)
            raise EngineError(f"the {engine.info.name} engine, as it was started, has the role {can}, not {role}")
        if role != "agg" and self._transfer is None and isinstance(engine, MovesBlocks):
            name = agent_name(self._instance, self._epoch)
            self._transfer = await asyncio.to_thread(engine.open_transfer, name, self._metrics)
            await self._following.enter_async_context(follow_peers(self._registry, self._transfer))
        self.role = role

    async def enter(self, card: InstanceCard) -> InstanceCard:
        """The card with what the role adds to it. Raises `StoreError`."""
        nixl = await publish(self._registry, self._transfer) if self._transfer is not None else None
        return msgspec.structs.replace(card, role=self.role, nixl=nixl, prefill_queue=self.role == "prefill")

    async def begin(self) -> None:
        """The card is registered: call for requests, or stop to."""
        await self._calling.aclose()
        if self.role != "prefill":
            return
        caller = PrefillCaller(
            self._registry.redis,
            self._registry.keys,
            model=self._engine.info.model,
            block_size=self._engine.info.block_size,
            instance=self._instance,
            room_tokens=self._room_tokens,
        )
        await self._calling.enter_async_context(caller)

    def _room_tokens(self) -> int:
        waiting = self._waiting_tokens()
        return 0 if waiting is None else ROOM_TOKENS - waiting

    async def close(self) -> None:
        await self._calling.aclose()
        await self._following.aclose()
