"""The prefill side: holds blocks for readers until they say that they have them, or their lease is over.

A lease needs no trust in anybody's clock. Each pin has a stamp, a random number in a table that readers can read. It
is zeroed before the blocks are given back; a reader looks at it after it has the blocks, so if it still stands then
the blocks stood as long.
"""

import logging
import secrets
import struct
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dynamo_llm.transfer.agent import NixlAgent
from dynamo_llm.transfer.errors import TransferError
from dynamo_llm.transfer.loop import IDLE_S, Loop
from dynamo_llm.transfer.metrics import TransferMetrics
from dynamo_llm.transfer.params import PullParams, write_params
from dynamo_llm.transfer.pins import Pin, PinTable

logger = logging.getLogger(__name__)

CLAIM, RELEASE = b"c", b"r"
_MESSAGE = struct.Struct("<cQQ")
_POLL_S = 0.001
"""While something is pinned: a reader may be connecting, and over TCP reading takes our help."""


def message(kind: bytes, slot: int, stamp: int) -> bytes:
    """A reader's word on a pin: it has begun (`CLAIM`), or has all that it wants (`RELEASE`)."""
    return _MESSAGE.pack(kind, slot, stamp)


class Exporter:
    """See the module's docstring. `on_free(request_id, blocks)` runs on the thread that ended the pin, mostly the
    loop's; nothing is locked then."""

    def __init__(
        self,
        agent: NixlAgent,
        loop: Loop,
        slots: int,
        on_free: Callable[[str, tuple[int, ...]], None],
        metrics: TransferMetrics,
    ) -> None:
        self.stamps = np.zeros(slots, dtype=np.uint64)
        """The table that readers read."""
        self._agent, self._loop, self._on_free, self._metrics = agent, loop, on_free, metrics
        self._lock = threading.Lock()
        self._pins = PinTable(slots)
        self._closed: TransferError | None = None
        metrics.pinned = lambda: (len(self._pins), self._pins.blocks)
        agent.register(self.stamps.ctypes.data, self.stamps.nbytes, ("DRAM", 0))

    # --- any thread ---------------------------------------------------------------------------------------------------

    def pin(self, request_id: str, blocks: Sequence[int], lease_s: float) -> dict[str, Any]:
        """Hold the blocks; returns the `kv_transfer_params` for whoever is to read them. Raises `TransferError`."""
        if not blocks:
            raise TransferError("params", f"request {request_id!r} has no block to pin")
        stamp = secrets.randbits(64) or 1
        with self._lock:
            if self._closed is not None:
                raise self._closed
            pin = self._pins.add(request_id, blocks, stamp, time.monotonic() + lease_s)
            self.stamps[pin.slot] = stamp
        self._loop.wake()
        return write_params(
            PullParams(
                remote_engine_id=self._agent.name,
                remote_block_ids=list(pin.blocks),
                remote_request_id=request_id,
                remote_slot=pin.slot,
                remote_stamp=f"{stamp:016x}",
            )
        )

    def release(self, request_id: str) -> bool:
        """Give its blocks back before a reader or the lease does. False: they are already."""
        with self._lock:
            pin = self._drop(request_id)
        return self._freed(pin)

    def release_reader(self, agent: str) -> int:
        """A reader is gone: give back what it had begun to read. Returns the number of pins."""
        with self._lock:
            pins = [self._drop(pin.request_id) for pin in self._pins.of_reader(agent)]
        return sum(map(self._freed, pins))

    # --- the loop's thread --------------------------------------------------------------------------------------------

    def poll(self, now_s: float) -> float:
        for reader, words in self._agent.notifications().items():
            for word in words:
                self._hear(reader, word)
        with self._lock:
            expired = [self._drop(pin.request_id) for pin in self._pins.expired(now_s)]
            next_s = self._pins.next_expiry_s()
        for pin in expired:
            self._metrics.expired += self._freed(pin)
        return IDLE_S if next_s is None else max(min(_POLL_S, next_s - now_s), 0.0)

    def end(self, error: TransferError) -> None:
        with self._lock:
            self._closed = error
            pins = [self._drop(pin.request_id) for pin in self._pins.all()]
        for pin in pins:
            self._freed(pin)

    def busy(self) -> bool:
        return False

    def _hear(self, reader: str, word: bytes) -> None:
        """Only who has seen the pin's parameters knows the stamp."""
        if len(word) != _MESSAGE.size:
            logger.debug("%s sent %d bytes that are no word on a pin", reader, len(word))
            return
        kind, slot, stamp = _MESSAGE.unpack(word)
        with self._lock:
            pin = self._pins.find(slot, stamp)
            if pin is None:
                return
            if kind == CLAIM:
                pin.reader = reader
                return
            dropped = self._drop(pin.request_id) if kind == RELEASE else None
        self._freed(dropped)

    def _drop(self, request_id: str) -> Pin | None:
        """Under the lock. From here on no reader takes its blocks for good."""
        pin = self._pins.remove(request_id)
        if pin is not None:
            self.stamps[pin.slot] = 0
        return pin

    def _freed(self, pin: Pin | None) -> bool:
        if pin is not None:
            self._on_free(pin.request_id, pin.blocks)
        return pin is not None
