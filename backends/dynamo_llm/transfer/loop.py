"""The thread that owns the NIXL agent: it runs commands and lets its parts poll, no more often than they ask.

On plain memory NIXL copies within the call that posts a READ, with Python's lock released: engine threads go on, and
only this one waits.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from dynamo_llm.transfer.errors import TransferError

logger = logging.getLogger(__name__)

IDLE_S = 0.02
"""Between two polls when nothing is pinned and nothing under way: how long a first word of a peer may wait."""
_CLOSE_S = 5.0


class Part(Protocol):
    """What the loop drives. All of it is called on its thread."""

    def poll(self, now_s: float) -> float:
        """Do what is to do; returns the seconds until the next call."""

    def end(self, error: TransferError) -> None:
        """Nothing more will be polled after one last time: end all that is open."""

    def busy(self) -> bool:
        """Something is still under way that must be waited for."""


class Loop:
    """See the module's docstring."""

    def __init__(self, name: str) -> None:
        self._parts: list[Part] = []
        self._wake = threading.Condition()
        self._commands: deque[Callable[[], None]] = deque()
        self._woken = self._closing = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self, *parts: Part) -> None:
        self._parts = list(parts)
        self._thread.start()

    def call(self, command: Callable[[], None]) -> bool:
        """Run it on the loop's thread, soon. False: the loop has ended. Any thread."""
        with self._wake:
            if self._closing:
                return False
            self._commands.append(command)
            self._wake.notify()
        return True

    def wake(self) -> None:
        """Poll now. Any thread."""
        with self._wake:
            self._woken = True
            self._wake.notify()

    def close(self) -> None:
        """End all parts and the thread. May be called twice, not by the loop itself."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        reason = TransferError("closed", "the transfer of KV blocks has been closed")
        try:
            while not self._closing:
                self._turn()
        except Exception as error:
            # The thread's boundary: nobody above would hear of it, and every pull must still get its answer.
            logger.exception("the transfer of KV blocks has failed")
            reason = TransferError("nixl", f"the transfer thread failed: {type(error).__name__}: {error}")
        self._finish(reason)

    def _turn(self) -> None:
        while self._commands:
            self._commands.popleft()()
        delay_s = min(part.poll(time.monotonic()) for part in self._parts)
        with self._wake:
            if delay_s > 0 and not (self._woken or self._commands or self._closing):
                self._wake.wait(delay_s)
            self._woken = False

    def _finish(self, reason: TransferError) -> None:
        with self._wake:
            self._closing = True
        try:
            while self._commands:
                self._commands.popleft()()
            for part in self._parts:
                part.end(reason)
            deadline_s = time.monotonic() + _CLOSE_S
            while any(part.busy() for part in self._parts) and time.monotonic() < deadline_s:
                for part in self._parts:
                    part.poll(time.monotonic())
                time.sleep(0.001)
        except Exception:
            # As above; what is left is given up.
            logger.exception("the transfer of KV blocks could not be ended in order")
