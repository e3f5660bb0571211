"""Peers come and go with the registry: their metadata travel as a blob that their card names (`InstanceCard.nixl`)."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from dynamo_llm.transfer.errors import TransferError
from dynamo_llm.transfer.metadata import agent_name
from dynamo_llm.transfer.transfer import KvTransfer
from kvstore.cards import InstanceCard
from kvstore.errors import StoreDataError, StoreError
from kvstore.registry import Registry
from kvstore.watch import Added, Change, Changed, Removed

logger = logging.getLogger(__name__)

_RETRY_S = 1.0
_GRACE_S = 10.0
"""A worker leaves the registry first of all and then ends what it has under way, so it is still to be read, or reads,
for so long. One that has died is noticed by its broken connection."""


async def publish(registry: Registry, transfer: KvTransfer) -> str:
    """Store our own metadata; the name belongs into the card's `nixl`. Raises `StoreError`."""
    return await registry.put_blob(transfer.metadata)


@asynccontextmanager
async def follow_peers(registry: Registry, transfer: KvTransfer) -> AsyncIterator[None]:
    """While it is open, `transfer` knows every instance of the registry whose card names metadata."""
    followed = _Followed(registry, transfer)
    try:
        async with registry.watch(followed.on_change):
            yield
    finally:
        await followed.close()


class _Followed:
    """The tasks that fetch metadata, by agent, and who is about to be forgotten, by instance."""

    def __init__(self, registry: Registry, transfer: KvTransfer) -> None:
        self._registry, self._transfer = registry, transfer
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._leaving: dict[str, tuple[InstanceCard, asyncio.TimerHandle]] = {}

    def on_change(self, change: Change) -> None:
        if isinstance(change, Removed):
            timer = asyncio.get_running_loop().call_later(_GRACE_S, self._remove, change.card)
            self._leaving[change.card.instance] = change.card, timer
        elif isinstance(change, Added):
            self._add(change.card)
        elif isinstance(change, Changed) and _peer(change.before) != _peer(change.card):
            self._remove(change.before)
            self._add(change.card)

    async def close(self) -> None:
        for _, timer in self._leaving.values():
            timer.cancel()
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def _add(self, card: InstanceCard) -> None:
        before, timer = self._leaving.get(card.instance, (card, None))
        if timer is not None and _peer(before) == _peer(card):  # it is back
            timer.cancel()
            del self._leaving[card.instance]
            return
        self._remove(before)
        name, blob = _peer(card)
        if blob and name != self._transfer.name:
            self._tasks[name] = asyncio.create_task(self._fetch(name, blob))

    def _remove(self, card: InstanceCard) -> None:
        if (leaving := self._leaving.pop(card.instance, None)) is not None:
            leaving[1].cancel()
        name, _ = _peer(card)
        if (task := self._tasks.pop(name, None)) is not None:
            task.cancel()
        self._transfer.remove_peer(name)

    async def _fetch(self, name: str, blob: str) -> None:
        """Until it is there: until then, requests that name the peer are refused, and computed here."""
        while True:
            try:
                data = await self._registry.get_blob(blob)
                if data is not None:
                    self._transfer.add_peer(name, data)
                    return
                logger.debug("the transfer metadata of %s are not there yet", name)
            except (StoreDataError, TransferError) as error:
                logger.warning("the blocks of %s cannot be read: %s", name, error)
                return
            except StoreError as error:
                logger.debug("the transfer metadata of %s: %s", name, error)
            await asyncio.sleep(_RETRY_S)


def _peer(card: InstanceCard) -> tuple[str, str | None]:
    return agent_name(card.instance, card.epoch), card.nixl
