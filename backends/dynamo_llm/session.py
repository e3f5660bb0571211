"""The way of outputs from the engine's thread to one reader on an event loop: `Session`, the far end of a router.

`service.Service` makes and feeds sessions; a host (or the public model) reads one on the loop that it was made on.

A reader that is slower than the engine gets fuller frames: what it has not taken yet is merged, so that a session holds
at most one output per request in flight. Its reader is woken at most once per engine step.

Triton's queues between us and the router have no bound, and PyTriton tells nobody that a client went away. So a
router says itself that it lives and how far it has read: every control batch of the session (an empty one, each
second, where there is nothing to say) counts as a sign of life, and `ControlBatch.frames_read` moves the window on. A
session without a sign of life for `timeout_s` expires: its requests are cancelled and its generator ends, which frees
Triton's stream.
"""

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Callable, Iterable

from kvstore import wire
from kvstore.wire import SESSION_WINDOW, Frame, Load, Output


class Session:
    """Outputs on their way to one reader. `put`, `ack`, `nudge` and `end` may be called from any thread."""

    def __init__(self, name: str, *, clock: Callable[[], float], timeout_s: float | None) -> None:
        """To be made on the reader's loop. `timeout_s` None: the reader lives in this process and never expires."""
        self.name = name
        self.keys: dict[int, int] = {}
        """rid -> the service's key, of requests in flight. Guarded by the service's lock."""
        self.handed_over: dict[int, int] = {}
        """The same, of requests that ended with KV blocks for a reader, oldest first. Guarded likewise."""
        self._loop = asyncio.get_running_loop()
        self._clock = clock
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._pending: dict[int, Output] = {}
        self._reason: str | None = None
        self._asleep = False
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._nudged = False
        self._seen_s = clock()
        self._sent = 0
        self._read: int | None = None

    @property
    def ended(self) -> bool:
        """Whether it takes nothing more; the reader may still have the last frame to fetch."""
        return self._reason is not None

    def put(self, outputs: Iterable[Output]) -> None:
        """Hand over what one step produced, the `rid`s already the router's. The outputs are its own from now on."""
        with self._lock:
            if self._reason is not None:
                return
            for output in outputs:
                earlier = self._pending.get(output.rid)
                if earlier is None:
                    self._pending[output.rid] = output
                else:
                    merge(earlier, output)
            wake = self._take_wake()
        self._wake_if(wake)

    def ack(self, frames_read: int | None) -> None:
        """A sign of life, and how far the router has read."""
        with self._lock:
            self._seen_s = self._clock()
            if frames_read is None:
                return
            self._read = max(self._read or 0, min(frames_read, self._sent))
            wake = self._take_wake()
        self._wake_if(wake)

    def end(self, reason: str) -> None:
        """Take nothing more; what is pending still goes out, with the reason. The first reason stays."""
        with self._lock:
            if self._reason is None:
                self._reason = reason
            wake = self._take_wake()
        self._wake_if(wake)

    async def take(self) -> tuple[list[Output], str | None]:
        """All that is pending, as soon as there is something or `nudge` was called, and the reason once it has
        ended."""
        while True:
            waiter = self._waiter = self._loop.create_future()
            with self._lock:
                if self._ready():
                    pending, self._pending = self._pending, {}
                    self._nudged = False
                    return list(pending.values()), self._reason
                self._asleep = True
            await waiter

    async def frames(self, epoch: int, load: Callable[[], Load], heartbeat_s: float) -> AsyncGenerator[bytes, None]:
        """Encoded frames until the session has ended; one without outputs at each heartbeat that brought nothing."""
        self._beat(heartbeat_s, -1)
        try:
            outputs: list[Output] = []
            reason: str | None = None
            while True:
                self._sent += 1
                yield wire.encode(Frame(epoch, outputs, load(), reason))
                if reason is not None:
                    return
                outputs, reason = await self.take()
        finally:
            if self._timer is not None:
                self._timer.cancel()

    def _beat(self, heartbeat_s: float, sent: int) -> None:
        """Nudge a reader that got nothing since the last beat, and end a session whose router is gone."""
        if self._timeout_s is not None and self._clock() - self._seen_s > self._timeout_s:
            self.end("expired")
        if sent == self._sent:
            self.nudge()
        self._timer = self._loop.call_later(heartbeat_s, self._beat, heartbeat_s, self._sent)

    def nudge(self) -> None:
        """Let `take` return although nothing may be pending."""
        with self._lock:
            self._nudged = True
            wake = self._take_wake()
        self._wake_if(wake)

    def _ready(self) -> bool:
        if self._reason is not None:
            return True
        window_open = self._read is None or self._sent - self._read < SESSION_WINDOW
        return window_open and (self._nudged or bool(self._pending))

    def _take_wake(self) -> bool:
        wake = self._asleep and self._ready()
        if wake:
            self._asleep = False
        return wake

    def _wake_if(self, wake: bool) -> None:
        if wake:
            with contextlib.suppress(RuntimeError):  # the loop is closed, so its reader is gone
                self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def merge(earlier: Output, later: Output) -> None:
    """Bring a request's later output into its earlier one."""
    earlier.token_ids.extend(later.token_ids)
    if earlier.logprobs is None:
        earlier.logprobs = later.logprobs
    elif later.logprobs is not None:
        earlier.logprobs.extend(later.logprobs)
    earlier.finish_reason = later.finish_reason
    earlier.started = earlier.started or later.started
    earlier.kv_transfer_params = later.kv_transfer_params or earlier.kv_transfer_params
    earlier.error = later.error
