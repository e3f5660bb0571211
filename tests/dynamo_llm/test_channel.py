"""Messages over a socket: whole ones arrive, halves end the stream, garbage is told."""

import socket

import pytest

from dynamo_llm.channel import MAX_BYTES, Channel, ChannelError, Outbox
from dynamo_llm.engines.isolated.messages import Cancel, decode_order, encode


@pytest.fixture
def pair():
    """Two ends."""
    ends = [Channel(end) for end in socket.socketpair()]
    yield ends
    for end in ends:
        end.close()


def test_messages_arrive_in_order(pair):
    """Those of an outbox, whether one at a time or several in one send, after those before it."""
    ours, theirs = pair
    ours.send(encode(Cancel(0)))
    outbox = Outbox(ours, 1 << 20)
    for key in range(1, 200):
        assert outbox.put(encode(Cancel(key)))
    assert [theirs.receive(decode_order) for _ in range(200)] == [Cancel(key) for key in range(200)]
    outbox.close()


@pytest.mark.parametrize("cut", [0, 3, 8, 11])
def test_half_a_message_is_the_end(cut):
    """As from a process that is killed while it writes."""
    ours, theirs = socket.socketpair()
    channel = Channel(theirs)
    sender = Channel(ours)
    sender.send(encode(Cancel(1 << 40)))
    whole = theirs.recv(1 << 16)
    ours.sendall(whole[:cut])
    sender.close()
    assert channel.receive(decode_order) is None
    channel.close()


@pytest.mark.parametrize(
    ("garbage", "message"),
    [
        (b"Traceback (most recent call last)", "what is no message"),
        (b"dyn\x01" + (MAX_BYTES + 1).to_bytes(4, "little"), "over the limit"),
        (b"dyn\x01" + (2).to_bytes(4, "little") + b"\xc1\xc1", "cannot be read"),
    ],
)
def test_garbage_is_told(garbage, message):
    """In one line, and nothing is allocated for a length that is made of garbage."""
    ours, theirs = socket.socketpair()
    channel = Channel(theirs)
    with ours:
        ours.sendall(garbage)
        with pytest.raises(ChannelError, match=message):
            channel.receive(decode_order)
    channel.close()


def test_an_outbox_takes_no_more_than_its_limit():
    """Where the other side does not read, what may be refused is, and what may not is taken."""
    ours, theirs = socket.socketpair()
    channel = Channel(ours)
    outbox = Outbox(channel, 1 << 20)
    document = bytes(1 << 16)
    taken = 0
    while outbox.put(document):
        taken += 1
        assert taken < 1000
    assert outbox.put(document, force=True)
    theirs.close()
    outbox.close()
    channel.close()
