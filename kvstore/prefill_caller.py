"""A prefill worker's side of the prefill queue: it claims tickets and calls for them (`prefill_tickets.py`)."""

import asyncio
import logging
from collections import deque
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
    """One worker's side: calls for requests while it has room; an async context manager.

    A worker should neither run dry before a request has come nor call for more than it can use: what it has called for
    takes up room until the worker itself can be expected to count it.
    """

    def __init__(
        self,
        redis: Redis,
        keys: Keys,
        *,
        model: str,
        block_size: int,
        instance: str,
        room_tokens: Callable[[], int],
        settle_s: float = 0.05,
        poll_s: float = 0.005,
        reclaim_s: float = 1.0,
    ) -> None:
        """`room_tokens`: prompt tokens that the worker would take on; it is asked again after `poll_s` where that is
        none. A request that was called for has come after `settle_s`. A ticket that was claimed and is still there
        after `reclaim_s` is claimed again."""
        self._redis = redis
        self._stream = keys.prefill_queue(model, block_size)
        self._channel_of: Callable[[str], str] = lambda router: keys.prefill_calls(model, block_size, router)
        self._instance = instance
        self._room_tokens = room_tokens
        self._settle_s, self._poll_s = settle_s, poll_s
        self._called: deque[tuple[float, int]] = deque()
        """Until when a call takes up room, and how many tokens of it."""
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
            if self._room_tokens() <= self._on_their_way():
                await asyncio.sleep(self._poll_s)
                continue
            for entry_id, fields in await self._claim():
                await self._call(entry_id, fields)
            backoff.reset()

    def _on_their_way(self) -> int:
        """Tokens that were called for and may not have come yet."""
        now_s = asyncio.get_running_loop().time()
        while self._called and self._called[0][0] <= now_s:
            self._called.popleft()
        return sum(tokens for _, tokens in self._called)

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

    async def _call(self, entry_id: bytes, fields: dict[bytes, bytes]) -> None:
        """What the router has not heard takes up no room."""
        ticket = ticket_of(fields)
        seconds, micros = await self._redis.time()
        age_ms = seconds * 1000 + micros // 1000 - parse_id(entry_id)[0]
        if ticket is None or age_ms > ticket.ttl_ms:
            await remove(self._redis, self._stream, [entry_id])
            return
        call = encode(Call(ticket.number, self._instance, entry_id))
        if await self._redis.publish(self._channel_of(ticket.router), call):
            self._called.append((asyncio.get_running_loop().time() + self._settle_s, ticket.tokens))
