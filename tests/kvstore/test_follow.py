"""Following without I/O: whatever a stream loses or repeats, the index ends up exact or asks for a snapshot."""

from collections.abc import Generator
from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.cards import Cleared, Digest, EventBatch, KvOp, Removed, Stored
from kvstore.follow import Follower
from kvstore.index.memory import MemoryIndex
from kvstore.residency import Residency, unpack
from kvstore.wire import SnapshotReply, TierHashes

T = TypeVar("T")


class Worker:
    """An instance as the stream shows it: numbered batches, heartbeats, restarts, and its own truth."""

    def __init__(self, name: str = "a") -> None:
        self.name = name
        self.residency = Residency(epoch=1)

    def batch(self, *ops: KvOp) -> EventBatch:
        self.residency.apply(ops)
        self.residency.seq += 1
        return EventBatch(self.name, self.residency.epoch, self.residency.seq, list(ops))

    def heartbeat(self) -> EventBatch:
        return EventBatch(self.name, self.residency.epoch, self.residency.seq, [], self.residency.digest())

    def restart(self) -> None:
        self.residency = Residency(epoch=self.residency.epoch + 1)

    def reply(self) -> SnapshotReply:
        residency = self.residency
        return SnapshotReply(self.name, residency.epoch, residency.seq, residency.snapshot())


def follower() -> Follower:
    return Follower(MemoryIndex())


def install(known: Follower, reply: SnapshotReply) -> bool:
    """All steps at once."""
    return finish(known.install(reply))


def finish(steps: Generator[None, None, T]) -> T:
    """The remaining steps."""
    try:
        while True:
            next(steps)
    except StopIteration as end:
        result: T = end.value
        return result


def test_saved_in_slices() -> None:
    """A large instance is saved as it was at the first step, whatever comes between that and the last."""
    worker, known = Worker(), follower()
    assert not known.handle(0, worker.batch(Stored(None, list(range(1, 10_000))), Stored(None, [5], "host")))
    steps = known.save("a")
    next(steps)
    assert not known.handle(0, worker.batch(Removed([9999]), Stored(None, [20_000])))
    next(steps)
    saved = finish(steps)
    assert saved is not None
    assert (saved.epoch, saved.seq) == (1, 1)
    held = {tier: sorted(hashes.tolist()) for tier, hashes in unpack(saved.tiers)}
    assert held == {"device": [*range(1, 10_000)], "host": [5]}


def test_changes_while_a_snapshot_is_brought_in() -> None:
    """Batches, a restart or a removal between the steps of a large snapshot end in the truth all the same."""
    for change in ("batch", "restart", "remove"):
        worker, known = Worker(), follower()
        worker.batch(Stored(None, list(range(1, 5000))))
        assert known.handle(0, worker.heartbeat())
        steps = known.install(worker.reply())
        next(steps)
        if change == "batch":
            assert not known.handle(0, worker.batch(Removed([1]), Stored(None, [6000])))
        elif change == "restart":
            worker.restart()
            assert not known.handle(0, worker.batch(Stored(None, [7000])))
        else:
            known.forget("a")
        assert finish(steps) is (change != "restart")
        if change == "remove":
            assert known.index.instances() == []
        else:
            assert change == "batch" or install(known, worker.reply())
            assert known.index.digest("a") == worker.residency.digest()


hashes = st.lists(st.integers(1, 12), min_size=1, max_size=6)
ops = st.one_of(st.builds(Stored, st.none(), hashes), st.builds(Removed, hashes), st.builds(Cleared))
event = st.one_of(
    st.tuples(st.sampled_from(["send", "lose", "repeat"]), ops),
    st.tuples(st.sampled_from(["heartbeat", "restart", "answer", "late answer"]), st.none()),
)


@given(st.lists(event, max_size=40))
def test_always_repaired(events: list[tuple[str, KvOp]]) -> None:
    """After losses, repeats, restarts, early and late snapshots, one heartbeat and one answer make it exact."""
    worker, known = Worker(), follower()
    asked = False
    late = worker.reply()

    def deliver(batch: EventBatch) -> None:
        nonlocal asked
        asked = known.handle(0, batch) or asked

    for kind, op in events:
        if kind == "heartbeat":
            deliver(worker.heartbeat())
        elif kind == "restart":
            worker.restart()
        elif kind in ("answer", "late answer"):
            if asked:
                asked = not install(known, worker.reply() if kind == "answer" else late)
            late = worker.reply()
        else:
            batch = worker.batch(op)
            for _ in range({"send": 1, "lose": 0, "repeat": 2}[kind]):
                deliver(batch)
    deliver(worker.heartbeat())
    if asked:
        assert install(known, worker.reply())
    assert known.index.digest("a") == worker.residency.digest()
    assert not known.handle(0, worker.heartbeat())


def test_from_the_first_batch() -> None:
    """An instance that is followed from its beginning needs no snapshot."""
    worker, known = Worker(), follower()
    assert not known.handle(0, worker.heartbeat())
    assert not known.handle(0, worker.batch(Stored(None, [1, 2])))
    assert not known.handle(0, worker.heartbeat())
    assert known.gaps == 0
    assert known.index.match([1, 2])["a"].blocks == 2


def test_met_in_mid_stream() -> None:
    """An instance whose beginning is gone is asked for a snapshot once; what was known before stays usable."""
    worker, known = Worker(), follower()
    worker.batch(Stored(None, [1]))
    assert known.handle(0, worker.batch(Stored(1, [2])))
    assert not known.handle(0, worker.batch(Stored(2, [3])))
    assert finish(known.save("a")) is None
    assert install(known, worker.reply())
    assert known.index.match([1, 2, 3])["a"].blocks == 3
    known.handle(0, worker.batch(Removed([3])))
    worker.batch(Cleared())
    assert known.handle(0, worker.batch(Stored(None, [9])))
    assert known.index.match([1, 2, 3])["a"].blocks == 2


def test_wrong_digest() -> None:
    """A digest that differs leads to a resynchronisation even without a gap."""
    worker, known = Worker(), follower()
    known.handle(0, worker.batch(Stored(None, [1, 2])))
    known.index.apply("a", [Removed([2])])
    assert known.handle(0, worker.heartbeat())
    assert install(known, worker.reply())
    assert known.index.digest("a") == Digest(2, 3)


def test_restarted_engine() -> None:
    """A new epoch empties the instance at once: its old blocks would draw requests to a cold cache."""
    worker, known = Worker(), follower()
    known.handle(0, worker.batch(Stored(None, [1])))
    old = worker.batch(Stored(1, [2]))
    worker.restart()
    assert not known.handle(0, worker.heartbeat())
    assert known.index.match([1]) == {}
    assert not known.handle(0, old)
    assert known.index.match([1]) == {}


def test_answer_from_before_a_restart() -> None:
    """A snapshot of an earlier epoch is refused, one of a later epoch than the stream's is taken."""
    worker, known = Worker(), follower()
    worker.batch(Stored(None, [1]))
    stale = worker.reply()
    worker.restart()
    worker.batch(Stored(None, [2]))
    assert known.handle(0, worker.heartbeat())
    assert not install(known, stale)
    worker.restart()
    worker.batch(Stored(None, [3]))
    assert install(known, worker.reply())
    assert known.index.match([3])["a"].blocks == 1
    assert not known.handle(0, worker.heartbeat())


def test_full_buffer() -> None:
    """A buffer that overflows while a snapshot is under way is thrown away, and the answer is found too old."""
    worker, known = Worker(), follower()
    worker.batch(Stored(None, [1]))
    early = worker.reply()
    worker.batch(Cleared())
    assert known.handle(0, worker.batch(Stored(None, [2])))
    for number in range(40):
        known.handle(0, worker.batch(Stored(None, list(range(number, number + 8000)))))
    state = known.instances["a"]
    assert sum(len(op.hashes) for batch in state.buffer for op in batch.ops if isinstance(op, Stored)) <= 1 << 18
    assert not install(known, early)
    assert install(known, worker.reply())
    assert known.index.digest("a") == worker.residency.digest()


def test_broken_answer() -> None:
    """A snapshot that cannot be read is refused, and a good one is still taken afterwards."""
    worker, known = Worker(), follower()
    worker.batch(Stored(None, [1]))
    assert known.handle(0, worker.heartbeat())
    with pytest.raises(ValueError, match="uint64"):
        install(known, SnapshotReply("a", 1, 1, [TierHashes("device", b"123")]))
    assert install(known, worker.reply())


def test_removed_while_asked() -> None:
    """The answer of an instance that was removed meanwhile brings nothing back."""
    worker, known = Worker(), follower()
    worker.batch(Stored(None, [1]))
    assert known.handle(0, worker.heartbeat())
    known.forget("a")
    assert install(known, worker.reply())
    assert known.index.instances() == []


def test_silent() -> None:
    """Silence is measured by what others say: while nobody speaks, nobody is forgotten."""
    one, two, known = Worker("a"), Worker("b"), follower()
    known.handle(1000, one.heartbeat())
    known.handle(2000, two.heartbeat())
    assert known.silent(1000) == []
    known.handle(2001, two.heartbeat())
    assert known.silent(1000) == ["a"]
