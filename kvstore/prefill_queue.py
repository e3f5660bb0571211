"""A router's side of the prefill queue: it draws tickets and hears who has room (`prefill_tickets.py`)."""

import asyncio
import logging
from contextlib import suppress
from types import TracebackType
from typing import Any

import msgspec
from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.exceptions import RedisError

from kvstore.connect import store_errors
from kvstore.errors import StoreError, StoreUnavailable
from kvstore.keys import RETENTION_S, Keys
from kvstore.prefill_tickets import FIELD, MOST_TICKETS, Ticket, decode_call, encode, remove, ticket_of
from kvstore.tasks import Backoff, spawn, stop, within

_SUBSCRIBE_S = 1.0
_LOOKED_AT = 1000
"""Tickets whose prompts are added up; more are estimated by these."""
_log = logging.getLogger(__name__)


class Waiting:
    """A ticket that was drawn. `leave` it in any case, also after the call."""

    def __init__(self, queue: "PrefillQueue", number: int) -> None:
        self.called: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """The instance that has room for it."""
        self.number = number
        self.entry = b""
        self._queue = queue

    def leave(self) -> None:
        self._queue.forget(self)


class PrefillQueue:
    """One router's side of one model's queue; an async context manager."""

    def __init__(
        self, redis: Redis, keys: Keys, *, model: str, block_size: int, router: str, poll_s: float = 0.5
    ) -> None:
        """`router`: a name that no other process has."""
        self.depth = 0
        """Tickets of all routers that wait, as last seen."""
        self.tokens = 0
        """Of their prompts."""
        self._redis = redis
        self._stream = keys.prefill_queue(model, block_size)
        self._channel = keys.prefill_calls(model, block_size, router)
        self._router = router
        self._poll_s = poll_s
        self._waiting: dict[int, Waiting] = {}
        self._last_number = 0
        self._gone: asyncio.Queue[bytes] = asyncio.Queue()
        """Entries to delete."""
        self._subscribed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> "PrefillQueue":
        self._tasks = [spawn("prefill calls", self._listen()), spawn("prefill tickets", self._delete())]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await stop(*self._tasks)
        for waiting in list(self._waiting.values()):
            waiting.leave()
        left = [self._gone.get_nowait() for _ in range(self._gone.qsize())]
        with suppress(StoreError):  # they run out
            await self._drop(left)

    async def draw(self, tokens: int, ttl_s: float) -> Waiting:
        """Wait from now on. Raises `StoreError`; then nothing waits."""
        self._last_number += 1
        waiting = Waiting(self, self._last_number)
        ticket = Ticket(self._router, waiting.number, tokens, round(1000 * ttl_s))
        self._waiting[waiting.number] = waiting
        try:
            await self._be_heard()
            with store_errors(self._redis):
                async with self._redis.pipeline(transaction=False) as pipe:
                    pipe.xadd(self._stream, {FIELD: encode(ticket)}, maxlen=MOST_TICKETS, approximate=True)
                    pipe.expire(self._stream, RETENTION_S)
                    waiting.entry = (await pipe.execute())[0]
        except BaseException:
            self._waiting.pop(waiting.number, None)
            raise
        self.depth += 1
        self.tokens += tokens
        return waiting

    async def _be_heard(self) -> None:
        try:
            await within(_SUBSCRIBE_S, self._subscribed.wait())
        except asyncio.TimeoutError:
            raise StoreUnavailable("the prefill queue is out of reach") from None

    def forget(self, waiting: Waiting) -> None:
        """For `Waiting.leave`."""
        if self._waiting.pop(waiting.number, None) is not None and waiting.entry:
            self._gone.put_nowait(waiting.entry)

    async def _listen(self) -> None:
        backoff, told = Backoff(), False
        while True:
            try:
                async with self._redis.pubsub() as pubsub:
                    with store_errors(self._redis):
                        await pubsub.subscribe(self._channel)
                        self._subscribed.set()
                        told = False
                        await self._follow(pubsub, backoff)
            except (StoreError, RedisError) as error:
                if not told:
                    _log.warning("the prefill queue is out of reach: %s", error)
                told = True
            self._subscribed.clear()
            await backoff.pause()

    async def _follow(self, pubsub: PubSub, backoff: Backoff) -> None:
        """Until Redis is lost."""
        loop = asyncio.get_running_loop()
        look_at_s = 0.0
        while True:
            message = await pubsub.get_message(ignore_subscribe_messages=True, timeout=self._poll_s)
            if message is not None:
                self._on_call(message["data"])
            if loop.time() >= look_at_s:
                await self._look()
                look_at_s = loop.time() + self._poll_s
            backoff.reset()

    def _on_call(self, data: bytes) -> None:
        try:
            call = decode_call(data)
        except msgspec.MsgspecError as error:
            _log.warning("a prefill call cannot be read: %s", error)
            return
        self._gone.put_nowait(call.entry)
        waiting = self._waiting.pop(call.number, None)
        if waiting is not None and not waiting.called.done():  # else it has left, or was called before
            waiting.called.set_result(call.instance)

    async def _look(self) -> None:
        """How much waits."""
        entries: Any = await self._redis.xrange(self._stream, count=_LOOKED_AT)
        tickets = [ticket for _, fields in entries if (ticket := ticket_of(fields)) is not None]
        length = await self._redis.xlen(self._stream) if len(entries) == _LOOKED_AT else len(tickets)
        self.depth = length
        self.tokens = sum(ticket.tokens for ticket in tickets) * length // max(len(tickets), 1)

    async def _delete(self) -> None:
        while True:
            entries = [await self._gone.get()]
            while not self._gone.empty():
                entries.append(self._gone.get_nowait())
            try:
                await self._drop(entries)
            except StoreError as error:
                _log.debug("prefill tickets stay until they run out: %s", error)

    async def _drop(self, entries: list[bytes]) -> None:
        if entries:
            await remove(self._redis, self._stream, entries)
