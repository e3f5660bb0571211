"""The reader's connections: peers that are loaded into NIXL, words to them, and how they are let go.

Only the loop's thread calls it.
"""

import logging
import time
from collections.abc import Callable
from contextlib import suppress

import numpy as np

from dynamo_llm.transfer.agent import NixlAgent, Reading
from dynamo_llm.transfer.errors import TransferError
from dynamo_llm.transfer.exporter import message
from dynamo_llm.transfer.layout import Descriptors
from dynamo_llm.transfer.params import PullParams
from dynamo_llm.transfer.peers import Peer

logger = logging.getLogger(__name__)

DRAM = ("DRAM", 0)
_LOST_S = 5.0
"""How long a peer that broke off is left alone. If it died, the registry takes it away in the meantime."""


class Links:
    """See the module's docstring. `on_left(peer)` is called when nothing more can be read from a peer."""

    def __init__(self, agent: NixlAgent, on_left: Callable[[Peer], None]) -> None:
        self._agent, self._on_left = agent, on_left
        self._leaving: list[Peer] = []
        """To be taken out of NIXL as soon as nothing is read from them."""
        self._sweeps: list[tuple[Peer, Reading]] = []
        """See `say`."""
        self._scratch = np.zeros(1, dtype=np.uint64)
        agent.register(self._scratch.ctypes.data, self._scratch.nbytes, DRAM)

    def meet(self, peer: Peer) -> None:
        """Load the peer, the first time. Raises `TransferError` where it has left or is left alone."""
        if peer.gone or time.monotonic() < peer.lost_until_s:
            raise TransferError("peer_lost", f"{peer.name} has gone")
        if peer.loaded:
            return
        if any(other.name == peer.name for other in self._leaving):
            raise TransferError("peer_lost", f"{peer.name} has gone, and is not yet forgotten")
        self._agent.add_peer(peer.name, peer.metadata.nixl)
        peer.loaded = True

    def read(
        self, peer: Peer, local: Descriptors, here: tuple[str, int], remote: Descriptors, there: tuple[str, int]
    ) -> Reading | None:
        """Begin a READ; None: it has ended already. Raises `TransferError`."""
        reading = self._agent.prepare(peer.name, local, here, remote, there)
        try:
            ended = self._agent.begin(reading)
        except TransferError:
            self._agent.free(reading)
            raise
        if not ended:
            return reading
        self._agent.free(reading)
        return None

    def say(self, peer: Peer, kind: bytes, params: PullParams) -> None:
        """A word that nothing depends on: without it the lease ends the pin.

        The first read after a word waits until the peer has polled, about a millisecond. A read of a single number
        that nobody waits for takes this upon itself, and spares it the next pull.
        """
        try:
            self.meet(peer)
            self._agent.notify(peer.name, message(kind, params.remote_slot, params.stamp))
            there = word(peer.metadata.stamps_address)
            reading = self.read(peer, word(self._scratch.ctypes.data), DRAM, there, DRAM)
        except TransferError as error:
            logger.debug("%s was not told: %s", peer.name, error)
            if error.reason == "peer_lost":
                self.lose(peer)
        else:
            if reading is not None:
                self._sweeps.append((peer, reading))

    def lose(self, peer: Peer) -> None:
        """It broke off."""
        now_s = time.monotonic()
        if now_s >= peer.lost_until_s:  # else a refusal in the meantime would put the next attempt off for ever
            peer.lost_until_s = now_s + _LOST_S
        self.leave(peer)

    def leave(self, peer: Peer) -> None:
        """Nothing more is read from it."""
        if peer.loaded:
            peer.loaded = False
            self._leaving.append(peer)
        self._on_left(peer)

    def busy(self) -> bool:
        return bool(self._sweeps)

    def poll(self, in_use: set[str]) -> None:
        """Let go what can be let go. `in_use`: peers that are being read from."""
        for sweep in tuple(self._sweeps):
            self._collect(sweep)
        for peer in tuple(self._leaving):
            if peer.name not in in_use and not any(other.name == peer.name for other, _ in self._sweeps):
                self._leaving.remove(peer)
                with suppress(TransferError):
                    self._agent.remove_peer(peer.name)

    def _collect(self, sweep: tuple[Peer, Reading]) -> None:
        peer, reading = sweep
        try:
            if not self._agent.ended(reading):
                return
        except TransferError as error:
            if error.reason == "peer_lost":
                self.lose(peer)
        self._sweeps.remove(sweep)
        self._agent.free(reading)


def word(address: int) -> Descriptors:
    """Eight bytes at an address."""
    return np.array([[address, 8]], dtype=np.uint64)
