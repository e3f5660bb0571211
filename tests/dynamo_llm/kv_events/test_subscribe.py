"""The subscriber over real ZMQ sockets: order, losses with and without replay, restarts, and its end."""

import queue
import threading
from collections.abc import Iterator, Sequence

import pytest
from event_publisher import CLEARED, Publisher, batch, removed, stored

from dynamo_llm.engines.base import EngineError
from dynamo_llm.engines.kv_events import KvEventSubscriber, Translator, reachable
from kvstore.cards import Cleared, KvOp, Stored

WAIT_S = 20.0


class Follower:
    """A subscriber and what it said, op by op."""

    def __init__(self, publisher: Publisher, *, topic: str = "", replay_timeout_s: float = 10.0) -> None:
        self.ops: queue.Queue[KvOp] = queue.Queue()
        self.lost = threading.Semaphore(0)
        self.subscriber = KvEventSubscriber(
            publisher.endpoint,
            Translator("demo", 2),
            self._take,
            replay_endpoint=publisher.replay_endpoint,
            topic=topic,
            replay_timeout_s=replay_timeout_s,
            on_lost=self.lost.release,
        )
        self.subscriber.start()
        publisher.wait_for_subscriber()

    def kinds(self, count: int) -> list[str]:
        return [type(self.ops.get(timeout=WAIT_S)).__name__ for _ in range(count)]

    def _take(self, ops: Sequence[KvOp]) -> None:
        for op in ops:
            self.ops.put(op)


@pytest.fixture
def publisher() -> Iterator[Publisher]:
    publisher = Publisher()
    yield publisher
    publisher.close()


@pytest.fixture
def follower(publisher: Publisher) -> Iterator[Follower]:
    follower = Follower(publisher)
    yield follower
    follower.subscriber.close()


@pytest.fixture
def without_replay() -> Iterator[tuple[Publisher, Follower]]:
    publisher = Publisher(replay=False)
    follower = Follower(publisher)
    yield publisher, follower
    follower.subscriber.close()
    publisher.close()


def _chain(begin: int, count: int = 1) -> list[dict[str, object]]:
    """Events that store blocks `begin`, `begin + 1`, ..., each after the one before."""
    return [stored([n], [n, n], parent=n - 1 if n > 1 else None) for n in range(begin, begin + count)]


def test_events_come_in_order(publisher: Publisher, follower: Follower) -> None:
    """What is stored and removed arrives as it happened, without a replay."""
    publisher.send(*_chain(1))
    publisher.send(*_chain(2), removed([2]))
    publisher.send(CLEARED)
    assert follower.kinds(4) == ["Stored", "Stored", "Removed", "Cleared"]
    assert publisher.asked == []


@pytest.mark.parametrize("with_topic", [True, False])
def test_lost_batches_are_replayed(with_topic: bool) -> None:
    """A gap is filled from the replay socket before the batch after it counts, in old and new answers."""
    publisher = Publisher(topic="kv", with_topic=with_topic)
    follower = Follower(publisher, topic="kv")
    publisher.send(*_chain(1))
    publisher.send(*_chain(2), lose=True)
    publisher.send(*_chain(3), lose=True)
    publisher.send(*_chain(4))
    publisher.send(removed([4]))
    assert follower.kinds(5) == ["Stored"] * 4 + ["Removed"]
    assert publisher.asked == [1]
    assert (follower.subscriber.lost, follower.subscriber.broken) == (0, 0)
    follower.subscriber.close()
    publisher.close()


def test_what_was_sent_before_the_subscriber_came_is_replayed(publisher: Publisher) -> None:
    """A subscriber that joins late learns what the engine stored while nobody listened."""
    publisher.send(*_chain(1), lose=True)
    publisher.send(*_chain(2), lose=True)
    follower = Follower(publisher)
    publisher.send(*_chain(3))
    assert follower.kinds(3) == ["Stored"] * 3
    follower.subscriber.close()


def test_a_replay_with_holes_is_asked_for_again(publisher: Publisher, follower: Follower) -> None:
    """A replay socket drops what its queue does not hold; the rest is asked for from there."""
    publisher.send(*_chain(1))
    for number in range(2, 6):
        publisher.send(*_chain(number), lose=True)
    publisher.skip = {2, 4}
    publisher.send(*_chain(6))
    assert follower.kinds(6) == ["Stored"] * 6
    assert publisher.asked == [1, 2]
    assert follower.subscriber.lost == 0


def test_late_copies_of_replayed_batches_are_dropped(publisher: Publisher, follower: Follower) -> None:
    """Batches that a replay already brought, and that then arrive on the stream, count once."""
    publisher.send(*_chain(1), lose=True)
    hold = [batch(*_chain(2)), batch(removed([2]))]
    for payload in hold:
        publisher.send_bytes(payload, lose=True)
    publisher.send_frames(b"", (1).to_bytes(8, "big"), hold[0])  # a gap: the replay brings 0, 1 and 2
    publisher.send_frames(b"", (2).to_bytes(8, "big"), hold[1])
    publisher.send(*_chain(2))
    assert follower.kinds(4) == ["Stored", "Stored", "Removed", "Stored"]


def test_a_gap_without_a_replay_forgets_everything(without_replay: tuple[Publisher, Follower]) -> None:
    """Nothing is known for certain any more: cleared, the engine's adapter is told, and learning starts anew."""
    publisher, follower = without_replay
    publisher.send(*_chain(1, 2))
    publisher.send(removed([1]), lose=True)
    publisher.send(*_chain(3))  # after a block that is not known any more
    publisher.send(*_chain(1))
    assert follower.kinds(4) == ["Stored", "Stored", "Cleared", "Stored"]
    assert follower.lost.acquire(timeout=WAIT_S)
    assert follower.subscriber.lost == 1


def test_a_buffer_that_has_gone_on_is_used_as_far_as_it_reaches() -> None:
    """Where the replay begins too late, what was known is withdrawn and the rest is learnt from it."""
    publisher = Publisher(buffer=3)
    follower = Follower(publisher)
    publisher.send(*_chain(1))
    publisher.send(removed([1]), lose=True)
    publisher.send(*_chain(1), lose=True)
    publisher.send(*_chain(2), lose=True)
    publisher.send(*_chain(3))
    assert follower.kinds(5) == ["Stored", "Cleared", "Stored", "Stored", "Stored"]
    assert follower.lost.acquire(timeout=WAIT_S)
    follower.subscriber.close()
    publisher.close()


def test_a_silent_replay_socket_is_given_up(publisher: Publisher) -> None:
    """An engine that does not answer costs what was known, not the stream."""
    follower = Follower(publisher, replay_timeout_s=0.1)
    publisher.send(*_chain(1))
    publisher.mute = True
    publisher.send(removed([1]), lose=True)
    publisher.send(*_chain(1))
    assert follower.kinds(3) == ["Stored", "Cleared", "Stored"]
    follower.subscriber.close()


@pytest.mark.parametrize("seen_first", [0, 2])
def test_a_new_engine_begins_anew(publisher: Publisher, follower: Follower, seen_first: int) -> None:
    """Numbers that go back mean another engine: what the one before held is gone, whichever batch is seen first."""
    for number in range(1, 5):
        publisher.send(*_chain(number))
    publisher.restart()
    for index in range(3):
        publisher.send(*_chain(index + 1), lose=index < seen_first)
    assert follower.kinds(8) == ["Stored"] * 4 + ["Cleared"] + ["Stored"] * 3
    assert follower.subscriber.lost == 0


def test_broken_messages_do_not_stop_the_stream(publisher: Publisher, follower: Follower) -> None:
    """A payload that cannot be read may have said anything, so what was known is withdrawn; odd frames are ignored."""
    publisher.send(*_chain(1))
    publisher.send_frames(b"", b"123", b"")
    publisher.send_frames(b"")
    publisher.send_bytes(b"\xc1")
    publisher.send(*_chain(1))
    ops = [follower.ops.get(timeout=WAIT_S) for _ in range(3)]
    assert [type(op) for op in ops] == [Stored, Cleared, Stored]
    assert (follower.subscriber.broken, follower.subscriber.lost) == (3, 1)


def test_close_breaks_off_a_replay(publisher: Publisher) -> None:
    """Closing does not wait for an answer that never comes, and nothing is reported afterwards."""
    follower = Follower(publisher, replay_timeout_s=600)
    publisher.send(*_chain(1))
    assert follower.kinds(1) == ["Stored"]
    publisher.mute = True
    publisher.send(removed([1]), lose=True)
    publisher.send(removed([1]))
    thread = follower.subscriber._thread
    follower.subscriber.close()
    follower.subscriber.close()
    assert not thread.is_alive()
    assert follower.ops.empty()


def test_close_without_start(publisher: Publisher) -> None:
    """A subscriber that was never started closes too, and an address that is none is one clear error."""
    KvEventSubscriber(publisher.endpoint, Translator("demo", 2), print).close()
    subscriber = KvEventSubscriber("nowhere", Translator("demo", 2), print)
    with pytest.raises(EngineError, match="cannot follow KV events at 'nowhere'"):
        subscriber.start()
    subscriber.close()


@pytest.mark.parametrize(
    ("bound", "connected"),
    [
        ("tcp://*:5557", "tcp://127.0.0.1:5557"),
        ("tcp://0.0.0.0:1", "tcp://127.0.0.1:1"),
        ("tcp://[::]:1", "tcp://127.0.0.1:1"),
        ("tcp://10.0.0.1:5", "tcp://10.0.0.1:5"),
        ("ipc:///tmp/x", "ipc:///tmp/x"),
    ],
)
def test_where_a_publisher_is_reached(bound: str, connected: str) -> None:
    """Wildcards are for binding; one connects to this machine."""
    assert reachable(bound) == connected
