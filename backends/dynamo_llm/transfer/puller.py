"""The decode side: reads blocks of a peer's pool into blocks of ours, beside everything else that goes on.

Two words end a pull. *Done*: the blocks are all there, or it has failed and somebody may compute them. *Settled*: NIXL
writes to the blocks no more, so they may be handed out again. After a success both come together. A READ that is
under way cannot be taken back, so after a deadline the second may come much later.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from dynamo_llm.transfer.agent import NixlAgent
from dynamo_llm.transfer.errors import TransferError
from dynamo_llm.transfer.exporter import CLAIM, RELEASE, message
from dynamo_llm.transfer.layout import Layout, select
from dynamo_llm.transfer.links import DRAM, Links, word
from dynamo_llm.transfer.loop import IDLE_S, Loop
from dynamo_llm.transfer.metrics import TransferMetrics
from dynamo_llm.transfer.params import PullParams, read_params
from dynamo_llm.transfer.peers import Peer, PeerBook
from dynamo_llm.transfer.pull import Pull

_POLL_S = 0.0005
_SPIN_S = 0.0003
"""How long to poll without a pause after anything has happened: many a read ends within it."""
_MOST_ACTIVE = 64
"""Pulls under way at a time; more wait in a queue."""
_WINDOW = 4
"""Portions of one pull under way at a time, on memory where that takes time."""


class Puller:
    """See the module's docstring. The callbacks of a pull run on the loop's thread and must not block."""

    def __init__(self, agent: NixlAgent, loop: Loop, own: Layout, metrics: TransferMetrics) -> None:
        self._agent, self._loop, self._own, self._metrics = agent, loop, own, metrics
        self.peers = PeerBook(own)
        self._waiting: deque[Pull] = deque()
        self._active: list[Pull] = []
        self._rows = list(range(_MOST_ACTIVE))[::-1]
        self._stamps = np.zeros(_MOST_ACTIVE, dtype=np.uint64)
        self._links = Links(agent, self._left)
        self._spin_until_s = 0.0
        metrics.pulls = lambda: (
            len(self._waiting) + len(self._active),
            sum(pull.error is not None for pull in tuple(self._active)),
        )
        agent.register(self._stamps.ctypes.data, self._stamps.nbytes, DRAM)

    # --- any thread ---------------------------------------------------------------------------------------------------

    def start(
        self,
        params: Mapping[str, Any],
        local_blocks: Sequence[int],
        *,
        skip: int = 0,
        timeout_s: float,
        on_done: Callable[[TransferError | None], None],
        on_settled: Callable[[], None] = lambda: None,
    ) -> Pull:
        """Read what follows the sequence's first `skip` blocks into `local_blocks`, all in our block size.

        Raises `TransferError` at once for what can never work, before NIXL hears of it; nothing is called back then.
        """
        try:
            read = read_params(params)
            peer, plan = self.peers.find(read.remote_engine_id)
            _check_slot(read, peer)
            selection = select(plan, list(local_blocks), read.remote_block_ids, skip=skip)
            now_s = time.monotonic()
            pull = Pull(
                peer,
                read,
                selection,
                started_s=now_s,
                deadline_s=now_s + timeout_s,
                on_done=on_done,
                on_settled=on_settled,
            )
            if not self._loop.call(lambda: self._waiting.append(pull)):
                raise TransferError("closed", "the transfer of KV blocks has been closed")
        except TransferError as error:
            self._metrics.failures[error.reason] += 1
            raise
        return pull

    def cancel(self, pull: Pull) -> None:
        """Done with reason `cancelled`, unless it is done already; settled as soon as NIXL is."""
        self._loop.call(lambda: self._fail(pull, TransferError("cancelled", "the pull was cancelled")))

    def release(self, params: Mapping[str, Any]) -> None:
        """Tell the writer that nobody will read the blocks. Raises `TransferError` as `start` does."""
        read = read_params(params)
        peer, _ = self.peers.find(read.remote_engine_id)
        _check_slot(read, peer)
        self._loop.call(lambda: self._links.say(peer, RELEASE, read))

    def forget(self, name: str) -> None:
        """That epoch has ended: its pulls fail at once, and NIXL forgets it."""
        peer = self.peers.remove(name)
        if peer is not None:
            self._loop.call(lambda: self._forget(peer))

    # --- the loop's thread --------------------------------------------------------------------------------------------

    def poll(self, now_s: float) -> float:
        while self._waiting and self._rows:
            pull = self._waiting.popleft()
            pull.row = self._rows.pop()
            self._active.append(pull)
        for pull in [pull for pull in self._waiting if pull.deadline_s <= now_s]:
            self._fail_late(pull)
        progress = False
        for pull in tuple(self._active):
            progress |= self._advance(pull, now_s)
        self._links.poll({pull.peer.name for pull in self._active if pull.readings})
        if not (self._active or self._waiting or self._links.busy()):
            return IDLE_S
        if progress:
            self._spin_until_s = time.monotonic() + _SPIN_S
        return 0.0 if now_s < self._spin_until_s else _POLL_S

    def end(self, error: TransferError) -> None:
        for pull in (*self._waiting, *self._active):
            self._fail(pull, error)

    def busy(self) -> bool:
        return bool(self._active) or self._links.busy()

    def _advance(self, pull: Pull, now_s: float) -> bool:
        """True when anything has happened."""
        if not pull.done and pull.deadline_s <= now_s:
            self._fail_late(pull)
        progress = self._collect(pull)
        if not pull.done:
            try:
                progress |= self._continue(pull)
            except TransferError as error:
                self._break(pull, error)
        if pull.done and not pull.readings:
            self._active.remove(pull)
            self._rows.append(pull.row)
            pull.on_settled()
            return True
        return progress

    def _collect(self, pull: Pull) -> bool:
        """Take note of reads that have ended."""
        before = len(pull.readings)
        for reading in tuple(pull.readings):
            try:
                ended = self._agent.ended(reading)
            except TransferError as error:
                ended = True
                self._break(pull, error)
            if ended:
                pull.readings.remove(reading)
                self._agent.free(reading)
        return len(pull.readings) < before

    def _continue(self, pull: Pull) -> bool:
        """The next portion, then the stamp, then the end. Raises `TransferError`."""
        if pull.readings and not pull.claimed and time.monotonic() > self._spin_until_s:
            self._claim(pull)
        if pull.portions is not None:
            if len(pull.readings) >= _WINDOW:
                return False
            self._links.meet(pull.peer)
            portion = next(pull.portions, None)
            if portion is not None:
                self._post(pull, portion[0], self._own.memory, portion[1], pull.peer.metadata.layout.memory)
                return True
            if pull.readings:
                pull.portions = iter(())
                return False
            pull.portions = None  # every byte of the blocks is here: only now the stamp tells of all of them
            self._stamps[pull.row] = 0
            here = self._stamps.ctypes.data + 8 * pull.row
            there = pull.peer.metadata.stamps_address + 8 * pull.params.remote_slot
            self._post(pull, word(here), DRAM, word(there), DRAM)
        if pull.readings:
            return False
        if int(self._stamps[pull.row]) != pull.params.stamp:
            raise TransferError("expired", "the blocks were given up by their owner before they had all been read")
        self._succeed(pull)
        return True

    def _post(self, pull: Pull, local: Any, here: tuple[str, int], remote: Any, there: tuple[str, int]) -> None:
        reading = self._links.read(pull.peer, local, here, remote, there)
        if reading is not None:
            pull.readings.append(reading)

    def _claim(self, pull: Pull) -> None:
        """Tell the writer who reads. Only where that takes a while: see `Links.say`."""
        pull.claimed = True
        self._agent.notify(pull.peer.name, message(CLAIM, pull.params.remote_slot, pull.params.stamp))

    # --- ends ---------------------------------------------------------------------------------------------------------

    def _succeed(self, pull: Pull) -> None:
        pull.done = True
        self._metrics.bytes += pull.bytes
        self._metrics.seconds.observe(time.monotonic() - pull.started_s)
        pull.on_done(None)
        self._links.say(pull.peer, RELEASE, pull.params)

    def _fail(self, pull: Pull, error: TransferError) -> None:
        """Done, and settled as soon as nothing is under way: `_advance` sees to that. Does nothing twice."""
        if pull.done:
            return
        pull.done, pull.error = True, error
        self._metrics.failures[error.reason] += 1
        if error.reason not in ("peer_lost", "expired"):
            self._links.say(pull.peer, RELEASE, pull.params)
        pull.on_done(error)
        if pull.row < 0:
            with suppress(ValueError):  # not in the queue: its start and this came with the same batch of commands
                self._waiting.remove(pull)
            pull.on_settled()

    def _break(self, pull: Pull, error: TransferError) -> None:
        """NIXL has failed it."""
        self._fail(pull, error)
        if error.reason == "peer_lost":
            self._links.lose(pull.peer)

    def _fail_late(self, pull: Pull) -> None:
        waited_s = pull.deadline_s - pull.started_s
        self._fail(pull, TransferError("deadline", f"the blocks did not come from {pull.peer.name} in {waited_s:g} s"))

    def _forget(self, peer: Peer) -> None:
        peer.gone = True
        self._links.leave(peer)

    def _left(self, peer: Peer) -> None:
        """All that is read from it has failed."""
        for pull in (*self._waiting, *self._active):
            if pull.peer is peer:
                self._fail(pull, TransferError("peer_lost", f"{peer.name} has gone"))


def _check_slot(params: PullParams, peer: Peer) -> None:
    if params.remote_slot >= peer.metadata.stamps:
        raise TransferError("params", f"remote_slot {params.remote_slot} is beyond the {peer.metadata.stamps} there")
