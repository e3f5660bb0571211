"""The way in: one pool with its agent, its thread, and both sides of a transfer.

An engine makes one for each of its lives, for a pool that it has allocated, and closes it before the pool goes.
"""

from collections.abc import Callable

from dynamo_llm.transfer.agent import NixlAgent
from dynamo_llm.transfer.exporter import Exporter
from dynamo_llm.transfer.layout import Layout
from dynamo_llm.transfer.loop import Loop
from dynamo_llm.transfer.metadata import PeerMetadata, encode_metadata
from dynamo_llm.transfer.metrics import TransferMetrics
from dynamo_llm.transfer.puller import Puller

_MOST_SLOTS = 1 << 14


class KvTransfer:
    """`exporter` holds blocks for others, `puller` reads theirs; one instance may do both."""

    def __init__(
        self,
        name: str,
        layout: Layout,
        on_free: Callable[[str, tuple[int, ...]], None],
        metrics: TransferMetrics | None = None,
        *,
        slots: int | None = None,
    ) -> None:
        """`name`: see `metadata.agent_name`. `on_free`: see `Exporter`. `slots`: most pins at a time.

        Raises `TransferError`: NIXL is missing, or does not take the memory.
        """
        layout.check()
        self.name, self.layout = name, layout
        self.metrics = metrics or TransferMetrics(layout.model)
        self._agent = NixlAgent(name)
        self._loop = Loop("kv-transfer")
        self._agent.register(layout.address, layout.pool_bytes, layout.memory)
        slots = min(layout.blocks, _MOST_SLOTS) if slots is None else slots
        self.exporter = Exporter(self._agent, self._loop, slots, on_free, self.metrics)
        self.puller = Puller(self._agent, self._loop, layout, self.metrics)
        self.metadata = encode_metadata(
            PeerMetadata(
                agent=name,
                layout=layout,
                stamps_address=self.exporter.stamps.ctypes.data,
                stamps=slots,
                nixl=self._agent.metadata(),
            )
        )
        """What others need; `follow.publish` puts it where they find it."""
        self._loop.start(self.puller, self.exporter)

    def add_peer(self, name: str, metadata: bytes) -> None:
        """Whose blocks may be read from now on. Raises `TransferError` for what are no metadata of that agent."""
        self.puller.peers.add(name, metadata)

    def remove_peer(self, name: str) -> None:
        """Its epoch has ended: what is read from it fails, what it reads is given back."""
        self.puller.forget(name)
        self.exporter.release_reader(name)

    def close(self) -> None:
        """End every pull and pin, then the agent. The pool must still be there."""
        self._loop.close()
        self._agent.close()
