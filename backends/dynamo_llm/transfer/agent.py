"""The one file that imports NIXL. Its errors become `TransferError` here, and nowhere else.

Nothing in here is safe to call from two threads at once: `loop.Loop` owns the agent.
"""

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from dynamo_llm.transfer.errors import Reason, TransferError
from dynamo_llm.transfer.layout import Descriptors

_FAREWELL_POLLS = 8


class Reading:
    """A READ, begun or not."""

    __slots__ = ("handle",)

    def __init__(self, handle: Any) -> None:
        self.handle = handle


class NixlAgent:
    """One name in the NIXL world, with the memory that it registered."""

    def __init__(self, name: str) -> None:
        """Raises `TransferError`, with reason `missing` where the package is not installed."""
        self.name = name
        nixl = _import_nixl()
        with _errors("making the agent"):
            # Its progress thread spins and takes half a core when nothing moves; the loop polls instead.
            self._agent: Any = nixl.nixl_agent(name, nixl.nixl_agent_config(enable_prog_thread=False))
            if "UCX" not in self._agent.backends:
                raise TransferError("nixl", "NIXL has no UCX plugin")
        self._registered: list[Any] = []

    def register(self, address: int, length: int, memory: tuple[str, int]) -> None:
        """Let peers read it, and let reads land in it. `memory`: see `Layout.memory`."""
        kind, device = memory
        with _errors(f"registering {length} bytes of {kind}"):
            self._registered.append(self._agent.register_memory([(address, length, device, "")], kind))

    def metadata(self) -> bytes:
        """Of all that is registered."""
        with _errors("reading the metadata"):
            return bytes(self._agent.get_agent_metadata())

    def add_peer(self, name: str, metadata: bytes) -> None:
        """Never for a name that is there already: bad metadata would take the good ones away."""
        with _errors(f"loading the metadata of {name}"):
            found = self._agent.add_remote_agent(metadata)
        found = found.decode(errors="replace") if isinstance(found, bytes) else str(found)
        if found != name:
            with contextlib.suppress(TransferError):
                self.remove_peer(found)
            raise TransferError("params", f"the NIXL metadata of {name} are those of {found!r}")

    def remove_peer(self, name: str) -> None:
        """Not while a READ from it is under way."""
        with _errors(f"forgetting {name}"):
            self._agent.remove_remote_agent(name)

    def prepare(
        self, peer: str, local: Descriptors, here: tuple[str, int], remote: Descriptors, there: tuple[str, int]
    ) -> Reading:
        """A READ of `remote` into `local`, not yet begun."""
        with _errors(f"preparing a read from {peer}"):
            target = self._agent.get_xfer_descs(_with_device(local, here[1]), here[0])
            source = self._agent.get_xfer_descs(_with_device(remote, there[1]), there[0])
            return Reading(self._agent.initialize_xfer("READ", target, source, peer))

    def begin(self, reading: Reading) -> bool:
        """Post it; true when it has ended with this call."""
        with _errors("reading"):
            return self._ended(self._agent.transfer(reading.handle))

    def ended(self, reading: Reading) -> bool:
        """Whether all its bytes are there. Raises `TransferError` once it has failed. Both mean: no byte follows."""
        with _errors("reading"):
            return self._ended(self._agent.check_xfer_state(reading.handle))

    def free(self, reading: Reading) -> None:
        """Only what has ended: giving up a READ that is under way returns at once, and its bytes may come all the
        same."""
        with contextlib.suppress(TransferError), _errors("releasing a read"):
            self._agent.release_xfer_handle(reading.handle)

    def notify(self, peer: str, message: bytes) -> None:
        with _errors(f"notifying {peer}"):
            self._agent.send_notif(peer, message)

    def notifications(self) -> dict[str, list[bytes]]:
        """Messages by sender, since the last call. Lets NIXL go on with everything else as well."""
        with _errors("reading notifications"):
            found: dict[str, list[bytes]] = self._agent.get_new_notifs()
        return found

    def close(self) -> None:
        """Give everything back. No READ may be under way."""
        with contextlib.suppress(TransferError):
            for _ in range(_FAREWELL_POLLS):  # connections to peers that died are taken down by polling, see the docs
                self.notifications()
            for region in self._registered:
                with _errors("deregistering"):
                    self._agent.deregister_memory(region)
        self._registered.clear()
        self._agent = None

    @staticmethod
    def _ended(state: str) -> bool:
        if state == "ERR":
            raise TransferError("nixl", "NIXL reports that a read has failed")
        return state == "DONE"


def _import_nixl() -> Any:
    os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")
    os.environ.setdefault("UCX_LOG_LEVEL", "error")  # its warnings go to stdout
    before = logging.raiseExceptions
    try:
        import nixl
    except ImportError:
        raise TransferError(
            "missing", "moving KV blocks between workers needs nixl: pip install 'dynamo-llm[nixl]'"
        ) from None
    finally:
        logging.raiseExceptions = before  # NIXL switches it off for the whole process
    return nixl


def _with_device(descriptors: Descriptors, device: int) -> Descriptors:
    column = np.full((len(descriptors), 1), device, dtype=np.uint64)
    return np.ascontiguousarray(np.concatenate((descriptors, column), axis=1))


@contextlib.contextmanager
def _errors(doing: str) -> Iterator[None]:
    """NIXL's exceptions have no common base but `Exception`; this is the boundary where they are translated."""
    try:
        yield
    except TransferError:
        raise
    except Exception as error:
        name = type(error).__name__
        reason: Reason = "peer_lost" if name == "nixlRemoteDisconnectError" else "nixl"
        raise TransferError(reason, f"{doing}: {name}: {error}") from error
