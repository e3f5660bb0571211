"""What a worker has to do, as this router knows it: the worker's last report and what was sent there since.

A report comes with every frame. A request is counted here from its placement until a report can contain it (one that
arrived after the worker accepted the request), so nothing is counted twice and bursts between two reports are seen.
"""

from collections.abc import Sequence

from msgspec import Struct

from kvstore.wire import Load


class _Tracked(Struct):
    hashes: Sequence[int]
    prefill_blocks: int
    """To be computed; 0 after the first token."""
    new_blocks: int
    """Blocks that no other sequence of this router held there when it was placed: those of its prompt, and the one that
    it has for itself, begun by the rest of the prompt or by its answer. Without that, short prompts would weigh nothing
    and all go to one worker until its next report."""
    accepted: bool = False
    reported: bool = False


class WorkerLoad:
    """Load of one worker. Blocks are of the model's block size."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._requests: dict[int, _Tracked] = {}
        self._references: dict[int, int] = {}
        """How many requests of this router reference a block there, by hash."""
        self._own_prefill = 0
        self._unreported_prefill = 0
        self._unreported_new = 0
        self._unreported = 0
        self._awaiting_report: list[int] = []
        self.report: Load | None = None
        """The worker's last."""
        self.reported_at_s = 0.0
        """Monotonic."""

    def add(self, rid: int, hashes: Sequence[int], reused_blocks: int) -> None:
        """A request was placed. `hashes`: its prompt's whole blocks."""
        shared = self.shared_blocks(hashes)
        tracked = _Tracked(hashes, max(len(hashes) - reused_blocks, 0), len(hashes) - shared + 1)
        self._requests[rid] = tracked
        references = self._references
        for block in hashes:
            references[block] = references.get(block, 0) + 1
        self._own_prefill += tracked.prefill_blocks
        self._unreported_prefill += tracked.prefill_blocks
        self._unreported_new += tracked.new_blocks
        self._unreported += 1

    def accepted(self, rid: int) -> None:
        """The worker has taken the request: the next report contains it."""
        tracked = self._requests.get(rid)
        if tracked is not None and not tracked.accepted:
            tracked.accepted = True
            self._awaiting_report.append(rid)

    def on_report(self, report: Load, now_s: float) -> None:
        """A frame or a reply brought the worker's own figures; one that a newer one has overtaken tells nothing."""
        if self.report is not None and report.steps < self.report.steps:
            return
        self.report = report
        self.reported_at_s = now_s
        if self._awaiting_report:
            for rid in self._awaiting_report:
                self._mark_reported(rid)
            self._awaiting_report.clear()

    def first_token(self, rid: int) -> Sequence[int]:
        """The request's prefill is done: the hashes of its prompt's blocks; none for an unknown request."""
        self._mark_reported(rid)
        tracked = self._requests.get(rid)
        if tracked is None:
            return ()
        self._own_prefill -= tracked.prefill_blocks
        tracked.prefill_blocks = 0
        return tracked.hashes

    def remove(self, rid: int) -> None:
        """The request has left the worker. Unknown ones are ignored."""
        self._mark_reported(rid)
        tracked = self._requests.pop(rid, None)
        if tracked is None:
            return
        self._own_prefill -= tracked.prefill_blocks
        references = self._references
        for block in tracked.hashes:
            if references[block] == 1:
                del references[block]
            else:
                references[block] -= 1

    def clear(self) -> None:
        """The worker was lost, and with it all that ran there."""
        for rid in list(self._requests):
            self.remove(rid)
        self._awaiting_report.clear()
        self.report = None

    def _mark_reported(self, rid: int) -> None:
        tracked = self._requests.get(rid)
        if tracked is not None and not tracked.reported:
            tracked.reported = True
            self._unreported_prefill -= tracked.prefill_blocks
            self._unreported_new -= tracked.new_blocks
            self._unreported -= 1

    def shared_blocks(self, hashes: Sequence[int]) -> int:
        """How many leading blocks of a prompt are referenced there by this router's requests.

        Who references a block references all before it, so a bisection finds the end.
        """
        references, low, high = self._references, 0, len(hashes)
        while low < high:
            middle = (low + high) // 2
            if hashes[middle] in references:
                low = middle + 1
            else:
                high = middle
        return low

    @property
    def requests(self) -> int:
        """Sequences waiting or running there, or on their way."""
        own = len(self._requests)
        if self.report is None:
            return own
        return max(own, self.report.running + self.report.waiting + self._unreported)

    @property
    def prefill_blocks(self) -> float:
        """Prompt blocks still to be computed there."""
        if self.report is None:
            return self._own_prefill
        reported = self.report.waiting_prefill_tokens / self._block_size
        return max(float(self._own_prefill), reported + self._unreported_prefill)

    @property
    def active_blocks(self) -> float:
        """Blocks that sequences there reference."""
        own = len(self._references) + len(self._requests)
        return own if self.report is None else max(own, self.report.kv_blocks_used + self._unreported_new)
