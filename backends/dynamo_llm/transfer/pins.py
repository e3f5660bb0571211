"""Which blocks are held for readers, until when. Pure: no clock, no I/O; the exporter calls it under its lock."""

import heapq
from collections.abc import Sequence

from dynamo_llm.transfer.errors import TransferError


class Pin:
    """Blocks of one request that some reader is to fetch."""

    __slots__ = ("blocks", "expires_s", "reader", "request_id", "slot", "stamp")

    def __init__(self, request_id: str, blocks: Sequence[int], slot: int, stamp: int, expires_s: float) -> None:
        self.request_id = request_id
        self.blocks = tuple(blocks)
        self.slot = slot
        """Where its stamp stands."""
        self.stamp = stamp
        self.expires_s = expires_s
        self.reader: str | None = None
        """The agent that has begun to fetch."""


class PinTable:
    """All pins of a pool. No operation costs more for pins that are gone."""

    def __init__(self, slots: int) -> None:
        self.blocks = 0
        """Pinned, a block of two pins counted twice."""
        self._pins: dict[str, Pin] = {}
        self._by_slot: dict[int, Pin] = {}
        self._free = list(range(slots))[::-1]
        self._expiries: list[tuple[float, int, Pin]] = []
        self._count = 0

    def __len__(self) -> int:
        return len(self._pins)

    def add(self, request_id: str, blocks: Sequence[int], stamp: int, expires_s: float) -> Pin:
        """Raises `TransferError` when the request has a pin or no slot is left."""
        if request_id in self._pins:
            raise TransferError("params", f"request {request_id!r} has pinned its blocks already")
        if not self._free:
            raise TransferError("full", f"{len(self._pins)} requests have pinned blocks; more stamps are not there")
        pin = Pin(request_id, blocks, self._free.pop(), stamp, expires_s)
        self._pins[request_id] = self._by_slot[pin.slot] = pin
        self.blocks += len(pin.blocks)
        self._count += 1  # so that no two entries compare by their pins
        heapq.heappush(self._expiries, (expires_s, self._count, pin))
        return pin

    def remove(self, request_id: str) -> Pin | None:
        """Its slot may be given to another at once: zero the stamp before you call anything else here."""
        pin = self._pins.pop(request_id, None)
        if pin is None:
            return None
        del self._by_slot[pin.slot]
        self._free.append(pin.slot)
        self.blocks -= len(pin.blocks)
        if len(self._expiries) > 2 * len(self._pins) + 64:
            self._expiries = [entry for entry in self._expiries if self._pins.get(entry[2].request_id) is entry[2]]
            heapq.heapify(self._expiries)
        return pin

    def find(self, slot: int, stamp: int) -> Pin | None:
        """The pin that a reader means: it knows where the stamp stands and what it is."""
        pin = self._by_slot.get(slot)
        return pin if pin is not None and pin.stamp == stamp else None

    def of_reader(self, reader: str) -> list[Pin]:
        return [pin for pin in self._pins.values() if pin.reader == reader]

    def all(self) -> list[Pin]:
        return list(self._pins.values())

    def next_expiry_s(self) -> float | None:
        """When the next lease ends."""
        self._drop_gone()
        return self._expiries[0][0] if self._expiries else None

    def expired(self, now_s: float) -> list[Pin]:
        """Pins whose lease is over; they are still in the table."""
        pins: list[Pin] = []
        while (expiry_s := self.next_expiry_s()) is not None and expiry_s <= now_s:
            pins.append(heapq.heappop(self._expiries)[2])
        return pins

    def _drop_gone(self) -> None:
        while self._expiries and self._pins.get(self._expiries[0][2].request_id) is not self._expiries[0][2]:
            heapq.heappop(self._expiries)
