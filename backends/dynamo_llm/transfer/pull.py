"""One pull: which bytes are still to come, and who is to hear of its end. Only the puller's thread changes it."""

from collections.abc import Callable, Iterator

from dynamo_llm.transfer.agent import Reading
from dynamo_llm.transfer.errors import TransferError
from dynamo_llm.transfer.layout import Descriptors, Selection, descriptors
from dynamo_llm.transfer.params import PullParams
from dynamo_llm.transfer.peers import Peer

PORTION_BYTES = 32 << 20
"""Read at a time: on plain memory NIXL copies it in one go, so this bounds how long others wait and a cancel takes."""


class Pull:
    """Returned by `Puller.start`, to cancel by."""

    __slots__ = (
        "bytes",
        "claimed",
        "deadline_s",
        "done",
        "error",
        "on_done",
        "on_settled",
        "params",
        "peer",
        "portions",
        "readings",
        "row",
        "started_s",
    )

    def __init__(
        self,
        peer: Peer,
        params: PullParams,
        selection: Selection,
        *,
        started_s: float,
        deadline_s: float,
        on_done: Callable[[TransferError | None], None],
        on_settled: Callable[[], None],
    ) -> None:
        self.peer, self.params = peer, params
        self.bytes = selection.bytes
        self.portions: Iterator[tuple[Descriptors, Descriptors]] | None = descriptors(selection, PORTION_BYTES)
        """None: all have been read, and the stamp is what is left."""
        self.started_s, self.deadline_s = started_s, deadline_s
        self.on_done, self.on_settled = on_done, on_settled
        self.readings: list[Reading] = []
        """Under way."""
        self.row = -1
        """Where its copy of the stamp will stand; -1: it waits for one, and for its turn."""
        self.claimed = False
        """The writer knows who reads."""
        self.done = False
        """`on_done` has been called."""
        self.error: TransferError | None = None
