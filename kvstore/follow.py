"""Following the event batches of many instances into one prefix index. Pure: no clock, no I/O; `mirror` does those.

Each instance stands on its own: epoch, seq and digest tell whether something of it was missed. From then on its
batches are buffered until `install` gets its snapshot. What the index knew of it stays in use until the snapshot has
come, unless its engine restarted; then the index is emptied of it and filled anew in slices, and for that while matches
fall short.
"""

from collections.abc import Generator, Iterator, Sequence

from msgspec import Struct

from kvstore.cards import EventBatch, Removed, Stored
from kvstore.index.base import PrefixIndex
from kvstore.residency import pack_in_slices, unpack
from kvstore.snapshots import SavedInstance
from kvstore.wire import SnapshotReply, TierHashes

_MOST_BUFFERED_HASHES = 1 << 18
_SLICE_HASHES = 1024


class Followed(Struct):
    """Where we stand with one instance."""

    epoch: int
    seq: int = 0
    seen_ms: int = 0
    """Stream time of its last batch."""
    resyncing: bool = False
    buffer: list[EventBatch] = []
    buffered_hashes: int = 0


class Follower:
    """The states of all instances, and the index that they feed."""

    def __init__(self, index: PrefixIndex) -> None:
        self.index = index
        self.instances: dict[str, Followed] = {}
        self.gaps = 0
        """Times that an instance was found to have missed something, or was met in mid-stream."""
        self._newest_ms = 0

    def handle(self, time_ms: int, batch: EventBatch) -> bool:
        """Take the next batch of the stream. True: its instance has to be resynchronised, beginning now."""
        self._newest_ms = time_ms
        state = self.instances.get(batch.instance)
        if state is None or batch.epoch > state.epoch:
            state = self._begin(batch, state)
        elif batch.epoch < state.epoch:
            return False
        state.seen_ms = time_ms
        if state.resyncing:
            _buffer(state, batch)
            return False
        if self._advance(state, batch):
            return False
        self.gaps += 1
        state.resyncing = True
        _buffer(state, batch)
        return True

    def install(self, reply: SnapshotReply) -> Generator[None, None, bool]:
        """Bring in an instance's own snapshot, then what was buffered since. False: that was not enough, ask it again.

        Yields where the caller may let others run, the stream included. Raises `ValueError` for a broken snapshot.
        """
        state = self.instances.get(reply.instance)
        if state is None:  # removed while it was asked
            return True
        if reply.epoch < state.epoch:
            return False
        for _ in self._fill(reply.instance, reply.tiers):
            yield
            if self.instances.get(reply.instance) is not state:  # removed, or its engine restarted, meanwhile
                return reply.instance not in self.instances
        state.epoch, state.seq = reply.epoch, reply.seq
        buffer, state.buffer, state.buffered_hashes = state.buffer, [], 0
        for batch in buffer:
            if batch.epoch == state.epoch and not self._advance(state, batch):
                return False
        state.resyncing = False
        return True

    def restore(self, saved: SavedInstance, time_ms: int) -> Iterator[None]:
        """Begin with an instance as a snapshot of the index has it. Yields and raises as `install` does."""
        yield from self._fill(saved.instance, saved.tiers)
        self.instances[saved.instance] = Followed(saved.epoch, saved.seq, time_ms)

    def save(self, instance: str) -> Generator[None, None, SavedInstance | None]:
        """An instance for a snapshot of the index, as it is now; None if it is unknown or not in step.

        Yields as `install` does.
        """
        state = self.instances.get(instance)
        if state is None or state.resyncing:
            return None
        epoch, seq = state.epoch, state.seq  # with the copy: both change while the slices are packed
        tiers = yield from pack_in_slices(self.index.copy_hashes(instance))
        return SavedInstance(instance, epoch, seq, tiers)

    def forget(self, instance: str) -> None:
        self.instances.pop(instance, None)
        self.index.remove(instance)

    def silent(self, limit_ms: int) -> list[str]:
        """Instances that the newest entry outlived by more than `limit_ms`. While nothing comes, nobody is silent."""
        return [name for name, state in self.instances.items() if self._newest_ms - state.seen_ms > limit_ms]

    def _fill(self, instance: str, tiers: Sequence[TierHashes]) -> Iterator[None]:
        """Load a snapshot in slices of about a millisecond."""
        arrays = unpack(tiers)
        self.index.load(instance, [])
        for tier, hashes in arrays:
            for begin in range(0, len(hashes), _SLICE_HASHES):
                self.index.apply(instance, [Stored(None, hashes[begin : begin + _SLICE_HASHES].tolist(), tier)])
                yield

    def _begin(self, batch: EventBatch, before: Followed | None) -> Followed:
        """A new instance, or one whose engine started again: it holds nothing, before its first batch."""
        self.index.remove(batch.instance)
        state = Followed(batch.epoch, resyncing=before is not None and before.resyncing)
        self.instances[batch.instance] = state
        return state

    def _advance(self, state: Followed, batch: EventBatch) -> bool:
        """Apply a batch that is due, pass over a repeated one. False: something is missing, or the digest differs."""
        if batch.ops and batch.seq == state.seq + 1:
            self.index.apply(batch.instance, batch.ops)
            state.seq = batch.seq
        if batch.seq != state.seq:
            return batch.seq < state.seq
        return batch.digest is None or batch.digest == self.index.digest(batch.instance)


def _buffer(state: Followed, batch: EventBatch) -> None:
    """Keep a batch for later. A buffer that is full is emptied: the gap that this leaves shows at the next batch."""
    size = sum(len(op.hashes) if isinstance(op, (Stored, Removed)) else 1 for op in batch.ops) + 1
    if state.buffered_hashes + size > _MOST_BUFFERED_HASHES:
        state.buffer.clear()
        state.buffered_hashes = 0
    state.buffer.append(batch)
    state.buffered_hashes += size
