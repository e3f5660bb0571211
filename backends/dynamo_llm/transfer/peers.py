"""Whose pools may be read: what the registry said of them. The puller loads a peer into NIXL when it is first read."""

import threading

from dynamo_llm.transfer.errors import TransferError
from dynamo_llm.transfer.layout import Layout, Plan, make_plan
from dynamo_llm.transfer.metadata import PeerMetadata, decode_metadata


class Peer:
    """One epoch of one instance. What follows `plan` belongs to the loop's thread."""

    __slots__ = ("gone", "loaded", "lost_until_s", "metadata", "plan", "refusal")

    def __init__(self, metadata: PeerMetadata, own: Layout) -> None:
        self.metadata = metadata
        self.plan: Plan | None = None
        self.refusal = ""
        """Why its blocks cannot be read, where there is no plan."""
        self.loaded = False
        self.gone = False
        """Its epoch has ended."""
        self.lost_until_s = 0.0
        """It broke off; until then nothing is tried with it."""
        try:
            self.plan = make_plan(own, metadata.layout)
        except TransferError as error:
            self.refusal = str(error)

    @property
    def name(self) -> str:
        return self.metadata.agent


class PeerBook:
    """Peers by name. Any thread."""

    def __init__(self, own: Layout) -> None:
        self._own = own
        self._lock = threading.Lock()
        self._peers: dict[str, Peer] = {}

    def add(self, name: str, blob: bytes) -> None:
        """Raises `TransferError` where the blob is not that agent's metadata. A peer known already stays as it is."""
        with self._lock:
            if name in self._peers:
                return
        peer = Peer(decode_metadata(name, blob), self._own)
        with self._lock:
            self._peers.setdefault(name, peer)

    def remove(self, name: str) -> Peer | None:
        with self._lock:
            return self._peers.pop(name, None)

    def find(self, name: str) -> tuple[Peer, Plan]:
        """Raises `TransferError` for who is unknown, or has blocks that cannot be ours."""
        with self._lock:
            peer = self._peers.get(name)
        if peer is None:
            raise TransferError("unknown_peer", f"engine {name!r} has not told this worker how to reach its blocks")
        if peer.plan is None:
            raise TransferError("layout", f"the blocks of {name}: {peer.refusal}")
        return peer, peer.plan
