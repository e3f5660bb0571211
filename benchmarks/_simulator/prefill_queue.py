"""The prefill queue in simulated time: who waits, and how the workers call, with the delays of the real one.

It follows `kvstore/prefill_queue.py` (the router's side) and `kvstore/prefill_caller.py` (a worker's side).
"""

from collections import deque
from collections.abc import Callable, Sequence

from msgspec import Struct

from _simulator.cluster import Cluster, Worker


class QueueTiming(Struct, frozen=True, kw_only=True):
    """Delays of the real queue, and the room that a worker wants to have."""

    room_tokens: int = 8192
    """A worker claims tickets while it has fewer prompt tokens to compute, with those that are on their way to it."""
    call_ms: float = 2.0
    """From a claim until the request is at the worker."""
    claim_ms: float = 1.0
    """Claims of one worker follow each other after this."""
    settle_ms: float = 50.0
    """For so long what a worker has called for counts as on its way."""
    poll_ms: float = 5.0
    """Where it has no room it looks again after this."""
    block_ms: float = 500.0
    """A worker that waits for a ticket asks itself whether it still has room after this."""
    look_ms: float = 500.0
    """How often a router looks how much waits. In between it counts only what it adds."""


class Ticket:
    """Waits for a worker."""

    def __init__(self, tokens: int, called: Callable[[Worker], None]) -> None:
        self.tokens = tokens
        self.called = called


class _Caller:
    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.on_their_way = 0
        """Tokens that it has called for, for a while."""
        self.waits = 0
        """Counts its waits for a ticket; odd during one."""


class SimulatedPrefillQueue:
    """See the module's docstring."""

    def __init__(
        self, cluster: Cluster, workers: Sequence[Worker], timing: QueueTiming, is_over: Callable[[], bool]
    ) -> None:
        """`is_over`: nothing will come any more, so that nobody need look."""
        self.depth = 0
        self.tokens = 0
        """Tickets and their tokens, as the router saw them last."""
        self._cluster, self._timing, self._is_over = cluster, timing, is_over
        self._tickets: deque[Ticket] = deque()
        self._blocked: list[_Caller] = []
        """Callers that wait for a ticket; who waits longest gets the next one."""
        for worker in workers:
            self._poll(_Caller(worker))
        self._look()

    def draw(self, ticket: Ticket) -> None:
        """Wait from now on."""
        self.depth += 1
        self.tokens += ticket.tokens
        self._tickets.append(ticket)
        if self._blocked:
            caller = self._blocked.pop(0)
            caller.waits += 1
            self._claim(caller)

    def leave(self, ticket: Ticket) -> bool:
        """False: it has been called."""
        if ticket not in self._tickets:
            return False
        self._tickets.remove(ticket)
        return True

    def _look(self) -> None:
        self.depth, self.tokens = len(self._tickets), sum(ticket.tokens for ticket in self._tickets)
        self._later(self._timing.look_ms, self._look)

    def _poll(self, caller: _Caller) -> None:
        if caller.worker.queued_tokens + caller.on_their_way >= self._timing.room_tokens:
            self._later(self._timing.poll_ms, lambda: self._poll(caller))
        elif self._tickets:
            self._claim(caller)
        else:
            caller.waits += 1
            self._blocked.append(caller)
            waits = caller.waits
            self._later(self._timing.block_ms, lambda: self._unblock(caller, waits))

    def _unblock(self, caller: _Caller, waits: int) -> None:
        if caller.waits == waits:
            caller.waits += 1
            self._blocked.remove(caller)
            self._poll(caller)

    def _claim(self, caller: _Caller) -> None:
        ticket, timing, now_ms = self._tickets.popleft(), self._timing, self._cluster.now_ms
        caller.on_their_way += ticket.tokens

        def settle() -> None:
            caller.on_their_way -= ticket.tokens

        self._cluster.at(now_ms + timing.call_ms, lambda: ticket.called(caller.worker))
        self._cluster.at(now_ms + timing.settle_ms, settle)
        self._later(timing.claim_ms, lambda: self._poll(caller))

    def _later(self, delay_ms: float, action: Callable[[], None]) -> None:
        if not self._is_over():
            self._cluster.at(self._cluster.now_ms + delay_ms, action)
