"""A prefill worker's side of the prefill queue: it claims tickets and calls for them (`prefill_tickets.py`)."""

import asyncio
import logging
from collections.abc import Callable
from types import TracebackType
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from kvstore.batches import parse_id
from kvstore.connect import store_errors
from kvstore.errors import StoreError
from kvstore.keys import Keys
from kvstore.prefill_tickets import GROUP, Call, encode, remove, ticket_of
from kvstore.tasks import Backoff, spawn, stop

_log = logging.getLogger(__name__)


class PrefillCaller:
    """One worker's side: calls for a request whenever it has room; an async context manager."""

    def __init__(
        self,
        redis: Redis,
        keys: Keys,
        *,
        model: str,
        block_size: int,
        instance: str,
        has_room: Callable[[], bool],
        settle_s: float = 0.05,
        reclaim_s: float = 1.0,
    ) -> None:
        """After a call nothing else is claimed for `settle_s`, in which the request should come. A ticket that was
        claimed and is still there after `reclaim_s` is claimed again."""
        self._redis = redis
        self._stream = keys.prefill_queue(model, block_size)
        self._channel_of: Callable[[str], str] = lambda router: keys.prefill_calls(model, block_size, router)
        self._instance = instance
        self._has_room = has_room
        self._settle_s = settle_s
        self._reclaim_s = reclaim_s
        self._reclaim_at_s = 0.0
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "PrefillCaller":
        self._task = spawn(f"prefill caller {self._instance}", self._run())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await stop(self._task)

    async def _run(self) -> None:
        backoff, told = Backoff(), False
        while True:
            try:
                with store_errors(self._redis):
                    await self._join()
                    told = False
                    await self._follow(backoff)
            except StoreError as error:  # also when the stream was emptied or has expired, and the group with it
                if not told:
                    _log.info("the prefill queue begins again: %s", error)
                told = True
            await backoff.pause()

    async def _join(self) -> None:
        try:
            await self._redis.xgroup_create(self._stream, GROUP, id="0", mkstream=True)
        except ResponseError as error:
            if "BUSYGROUP" not in str(error):
                raise

    async def _follow(self, backoff: Backoff) -> None:
        while True:
            if not self._has_room():
                await asyncio.sleep(self._settle_s)
                continue
            for entry_id, fields in await self._claim():
                if await self._call(entry_id, fields):
                    await asyncio.sleep(self._settle_s)
            backoff.reset()

    async def _claim(self) -> list[tuple[bytes, dict[bytes, bytes]]]:
        """One ticket at most: an old one first."""
        now_s = asyncio.get_running_loop().time()
        if now_s >= self._reclaim_at_s:
            idle_ms = round(1000 * self._reclaim_s)
            reply: Any = await self._redis.xautoclaim(self._stream, GROUP, self._instance, idle_ms, count=1)
            if entries := [(entry_id, fields) for entry_id, fields in reply[1] if entry_id is not None]:
                return entries
            self._reclaim_at_s = now_s + self._reclaim_s
        block_ms = max(1, round(500 * min(self._reclaim_s, 1.0)))
        reply = await self._redis.xreadgroup(GROUP, self._instance, {self._stream: ">"}, count=1, block=block_ms)
        return list(reply[0][1]) if reply else []

    async def _call(self, entry_id: bytes, fields: dict[bytes, bytes]) -> bool:
        """Whether the router has heard it."""
        ticket = ticket_of(fields)
        seconds, micros = await self._redis.time()
        age_ms = seconds * 1000 + micros // 1000 - parse_id(entry_id)[0]
        if ticket is None or age_ms > ticket.ttl_ms:
            await remove(self._redis, self._stream, [entry_id])
            return False
        call = encode(Call(ticket.number, self._instance, entry_id))
        return bool(await self._redis.publish(self._channel_of(ticket.router), call))
