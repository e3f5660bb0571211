"""KV events over one Redis Stream per model and block size (design contract 3): the worker's publisher, the router's
reader.

An entry has one field, `b`: a msgpack `EventBatch`. Ops batches count `seq` up by one from 1 in each epoch; a
heartbeat has no ops, repeats the last seq, and carries the digest of what is resident after it. A consumer needs
nothing more to notice that it lost something, and `mirror.IndexMirror` then asks the instance itself for a snapshot.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, NamedTuple

from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError

from kvstore.batches import decode_batch, encode_batch, parse_id, split
from kvstore.cards import Digest, EventBatch, KvOp
from kvstore.connect import store_errors, translate
from kvstore.keys import RETENTION_S, Keys
from kvstore.residency import Residency, pack
from kvstore.tasks import Backoff, spawn, stop
from kvstore.wire import SnapshotReply

FIELD = b"b"
BEGINNING = "0-0"

_CLOSE_TIMEOUT_S = 2.0
_MOST_PENDING_OPS = 4096
_SEND_AT_ONCE = 64
_log = logging.getLogger(__name__)


class EventPublisher:
    """Publishes one instance's KV events; an async context manager on the loop that does the sending.

    `publish` and `snapshot` may be called from any thread and never wait for Redis. What is published within
    `linger_s` leaves as one batch. While Redis is away, batches wait in a backlog; when that is full it is dropped
    and the sequence goes on, so that consumers see a gap and resynchronise.

    `drop` is for tests: it is asked for each batch, and a true answer loses the batch on purpose.
    """

    def __init__(
        self,
        redis: Redis,
        keys: Keys,
        *,
        instance: str,
        epoch: int,
        model: str,
        block_size: int,
        heartbeat_s: float = 1.0,
        linger_s: float = 0.002,
        backlog_bytes: int = 8 << 20,
        stream_entries: int = 100_000,
        drop: Callable[[], bool] | None = None,
    ) -> None:
        self.connected = True
        """Whether the last attempt to send got through; for a gauge."""
        self.dropped_batches = 0
        """Batches that were never sent, because the backlog was full or the test hook said so."""
        self._redis = redis
        self._stream = keys.events(model, block_size)
        self._instance = instance
        self._heartbeat_s = heartbeat_s
        self._linger_s = linger_s
        self._most_backlog_bytes = backlog_bytes
        self._stream_entries = stream_entries
        self._drop = drop
        # Under the lock: engine threads add to `_pending`, whoever seals moves it into `_outbox`.
        self._lock = threading.Lock()
        self._residency = Residency(epoch)
        self._pending: list[KvOp] = []
        self._outbox: deque[bytes] = deque()
        self._outbox_bytes = 0
        self._woken = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake = asyncio.Event()
        self._closing = False
        self._heartbeat_due = True
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._backoff = Backoff()

    @property
    def seq(self) -> int:
        """Of the last batch, sent or not."""
        return self._residency.seq

    @property
    def backlog_bytes(self) -> int:
        """Waiting to be sent."""
        return self._outbox_bytes

    def digest(self) -> Digest:
        """Of all that was published so far. Any thread."""
        with self._lock:
            self._seal()
            return self._residency.digest()

    async def __aenter__(self) -> "EventPublisher":
        self._loop = asyncio.get_running_loop()
        self._tick()
        self._task = spawn(f"kv-events {self._instance}", self._run())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Send what is still there, within two seconds."""
        with self._lock:
            self._loop = None
        if self._timer is not None:
            self._timer.cancel()
        self._closing = True
        self._wake.set()
        if self._task is not None:
            await asyncio.wait([self._task], timeout=_CLOSE_TIMEOUT_S)
            await stop(self._task)
        if self._outbox:
            _log.warning("closing with %d KV event batches unsent", len(self._outbox))

    def publish(self, ops: Sequence[KvOp]) -> None:
        """Queue what one engine step stored and removed, in order. Any thread; never blocks on I/O."""
        if not ops:
            return
        with self._lock:
            self._pending.extend(ops)
            if len(self._pending) > _MOST_PENDING_OPS:  # the loop is stuck on a silent Redis
                self._seal()
            if self._woken or self._loop is None:
                return
            self._woken = True
            self._loop.call_soon_threadsafe(self._wake.set)

    def snapshot(self) -> SnapshotReply:
        """All that was published so far, with the seq that it amounts to. Any thread."""
        with self._lock:
            self._seal()
            epoch, seq = self._residency.epoch, self._residency.seq
            hashes = self._residency.copy_hashes()
        return SnapshotReply(self._instance, epoch, seq, pack(hashes))

    async def _run(self) -> None:
        closing = False
        while not closing:
            await self._wake.wait()
            await asyncio.sleep(self._linger_s)
            self._wake.clear()
            closing = self._closing  # now, so that a last round follows in which all that was published is sealed
            with self._lock:
                self._woken = False
                self._seal()
                if self._heartbeat_due and (self.connected or not self._outbox):
                    self._heartbeat_due = False
                    self._queue(self._batch([], heartbeat=True))
            await self._send()

    def _tick(self) -> None:
        """On the loop, each `heartbeat_s`."""
        self._heartbeat_due = True
        self._wake.set()
        self._timer = asyncio.get_running_loop().call_later(self._heartbeat_s, self._tick)

    def _seal(self) -> None:
        """Turn what is pending into numbered batches. Under the lock."""
        for ops in split(self._pending):
            self._residency.apply(ops)
            self._residency.seq += 1
            if self._drop is not None and self._drop():
                self.dropped_batches += 1
            else:
                self._queue(self._batch(ops, heartbeat=False))
        self._pending = []

    def _batch(self, ops: list[KvOp], *, heartbeat: bool) -> bytes:
        digest = self._residency.digest() if heartbeat else None
        return encode_batch(EventBatch(self._instance, self._residency.epoch, self._residency.seq, ops, digest))

    def _queue(self, batch: bytes) -> None:
        """Under the lock. A full backlog goes as a whole: a thousand lost batches cost one resynchronisation too."""
        if self._outbox_bytes + len(batch) > self._most_backlog_bytes:
            self.dropped_batches += len(self._outbox)
            self._outbox.clear()
            self._outbox_bytes = 0
        self._outbox.append(batch)
        self._outbox_bytes += len(batch)

    async def _send(self) -> None:
        """Send the outbox in order, until it is empty or Redis fails."""
        while chunk := self._take():
            if not await self._send_chunk(chunk):
                self._wake.set()  # seal what comes meanwhile, then try again
                await self._backoff.pause()
                return

    async def _send_chunk(self, chunk: list[bytes]) -> bool:
        """What fails stays first in the outbox, to be sent again: consumers ignore a repeated seq."""
        sent = False
        try:
            async with self._redis.pipeline(transaction=False) as pipe:
                for batch in chunk:
                    pipe.xadd(self._stream, {FIELD: batch}, maxlen=self._stream_entries, approximate=True)
                pipe.expire(self._stream, RETENTION_S)
                await pipe.execute()
            sent = True
            self._backoff.reset()
        except RedisError as error:
            if self.connected:
                _log.warning("KV events wait: %s", translate(error, self._redis))
        finally:
            if not sent:
                self._give_back(chunk)
        if sent and not self.connected:
            _log.info("KV events flow again")
        self.connected = sent
        return sent

    def _take(self) -> list[bytes]:
        with self._lock:
            chunk = [self._outbox.popleft() for _ in range(min(len(self._outbox), _SEND_AT_ONCE))]
            self._outbox_bytes -= sum(map(len, chunk))
        return chunk

    def _give_back(self, chunk: list[bytes]) -> None:
        with self._lock:
            self._outbox.extendleft(reversed(chunk))
            self._outbox_bytes += sum(map(len, chunk))


class Entry(NamedTuple):
    """A batch, and where it stands in the stream."""

    entry_id: str
    batch: EventBatch


class EventReader:
    """Follows one stream from an entry on; `read` in a loop. One reader per stream and process."""

    def __init__(self, redis: Redis, stream: str, *, last_id: str = BEGINNING, count: int = 256, block_ms: int = 500):
        self.last_id = last_id
        """Of the last entry that was read."""
        self.at_end = False
        """Whether the last read reached the end of the stream."""
        self.broken = 0
        """Entries that did not decode, since the start."""
        self.lag_s = 0.0
        """How far the last read entry is behind the newest one, by the clock of Redis."""
        self.lag_entries = 0
        """Estimate of the entries not read yet."""
        self._redis = redis
        self._stream = stream
        self._count = count
        self._block_ms = block_ms
        self._measure_at_s = 0.0

    async def read(self) -> list[Entry]:
        """The next entries, at most `count`; none when nothing comes within `block_ms`. Raises `StoreError`."""
        with store_errors(self._redis):
            now_s = asyncio.get_running_loop().time()
            if now_s >= self._measure_at_s:
                await self._measure()
                self._measure_at_s = now_s + 1.0
            replies: Any = await self._redis.xread(
                {self._stream: self.last_id}, count=self._count, block=self._block_ms
            )
        raw = replies[0][1] if replies else []
        self.at_end = len(raw) < self._count
        if self.at_end:
            self.lag_s, self.lag_entries = 0.0, 0
        entries = []
        for entry_id, fields in raw:
            if (entry := self._decode(entry_id, fields)) is not None:
                entries.append(entry)
        if raw:
            self.last_id = raw[-1][0].decode()
        return entries

    async def _measure(self) -> None:
        """Lag, and whether the stream is still ours: in an emptied Redis, ids may begin below our last one."""
        try:
            info = await self._redis.xinfo_stream(self._stream)
        except ResponseError:  # no such key
            self.last_id = BEGINNING
            return
        newest, last = parse_id(info["last-generated-id"]), parse_id(self.last_id)
        if newest < last:
            _log.warning("stream %s was replaced: reading it from its beginning", self._stream)
            self.last_id = BEGINNING
            return
        oldest = parse_id(info["first-entry"][0]) if info["first-entry"] else newest
        last = max(last, oldest)
        self.lag_s = (newest[0] - last[0]) / 1000
        share = (newest[0] - last[0]) / max(newest[0] - oldest[0], 1)
        self.lag_entries = round(share * info["length"])

    def _decode(self, entry_id: bytes, fields: dict[bytes, bytes] | None) -> Entry | None:
        try:
            return Entry(entry_id.decode(), decode_batch((fields or {}).get(FIELD, b"")))
        except ValueError as error:  # msgspec's errors are ValueErrors
            self.broken += 1
            if self.broken & (self.broken - 1) == 0:  # the 1st, 2nd, 4th, 8th …: a flood must not fill the log
                _log.warning(
                    "skipped broken entry %s of %s (%d so far): %s", entry_id, self._stream, self.broken, error
                )
            return None
