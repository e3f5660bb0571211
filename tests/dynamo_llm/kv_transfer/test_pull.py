"""Blocks between two processes over real NIXL, and everything that may come between."""

import base64
import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from peer_process import Peer
from pools import Pool, pattern

from dynamo_llm.transfer import TransferError

MakePool = Callable[..., Pool]
MakePeer = Callable[..., Peer]
TCP = {"UCX_TLS": "tcp"}
"""Reads that do not end with the call that posts them."""


@pytest.fixture
def pair(make_pool: MakePool, make_peer: MakePeer) -> tuple[Pool, Peer]:
    """A reader here and a filled writer elsewhere, that know each other."""
    pool, peer = make_pool(), make_peer()
    pool.transfer.add_peer(peer.name, peer.metadata)
    peer.ask("fill", 1)
    return pool, peer


def written(pool: Pool, seed: int = 1) -> np.ndarray:
    return pattern(pool.data.shape, seed)


@pytest.mark.parametrize("count", [1, 2, 16, 64])
@pytest.mark.parametrize("scattered", [False, True])
def test_the_bytes_arrive(pair: tuple[Pool, Peer], count: int, scattered: bool) -> None:
    """Blocks in a row or anywhere: each local block holds its remote one, and no other block is touched."""
    pool, peer = pair
    rng = random.Random(count)
    remote, local = (rng.sample(range(64), count) if scattered else list(range(64))[-count:] for _ in range(2))
    _, heard = pool.pull(peer.ask("pin", "a", remote), local)
    assert heard.reason() is None
    assert np.array_equal(pool.data[local], written(pool)[remote])
    assert not pool.data[[b for b in range(64) if b not in local]].any()
    heard.wait_settled()
    assert heard.words == ["done", "settled"]


def test_the_readers_word_releases(pair: tuple[Pool, Peer]) -> None:
    """After the pull the writer has its blocks back, long before the lease; bytes and seconds are counted."""
    pool, peer = pair
    _, heard = pool.pull(peer.ask("pin", "a", [3, 4], lease_s=600), [0, 1])
    assert heard.reason() is None
    assert peer.ask("wait_freed", "a")
    assert peer.ask("pinned") == [0, 0]
    assert pool.transfer.metrics.bytes == 2 * pool.transfer.layout.block_bytes


def test_what_the_reader_has_is_skipped(pair: tuple[Pool, Peer]) -> None:
    """With the first blocks cached, only what follows them is read."""
    pool, peer = pair
    _, heard = pool.pull(peer.ask("pin", "a", [9, 8, 7, 6]), [20, 21], skip=2)
    assert heard.reason() is None
    assert np.array_equal(pool.data[[20, 21]], written(pool)[[7, 6]])
    assert pool.transfer.metrics.bytes == 2 * pool.transfer.layout.block_bytes


def test_nothing_to_read_is_released_too(pair: tuple[Pool, Peer]) -> None:
    """A reader that has the whole prompt itself says so at once."""
    pool, peer = pair
    pool.transfer.puller.release(peer.ask("pin", "a", [1], lease_s=600))
    assert peer.ask("wait_freed", "a")


@pytest.mark.parametrize(("here", "there"), [(32, 16), (16, 32)])
def test_other_block_sizes_are_converted(make_pool: MakePool, make_peer: MakePeer, here: int, there: int) -> None:
    """A block of 32 tokens from two of 16 and the other way, token by token the same."""
    pool, peer = make_pool(block_size=here), make_peer(block_size=there)
    pool.transfer.add_peer(peer.name, peer.metadata)
    peer.ask("fill", 1)
    remote, local = ([5, 9, 2, 30], [7, 3]) if here > there else ([5, 9], [7, 3, 11, 0])
    _, heard = pool.pull(peer.ask("pin", "a", remote), local)
    assert heard.reason() is None
    floats = pool.data.shape[1] // here * there
    source = pattern((64, floats), 1)[remote].reshape(len(remote), 2, 2, 2, there, 8)
    target = pool.data[local].reshape(len(local), 2, 2, 2, here, 8)
    tokens = [np.concatenate(list(blocks), axis=3) for blocks in (source, target)]
    assert np.array_equal(*tokens)


def test_a_lease_that_is_over_frees_the_blocks(pair: tuple[Pool, Peer]) -> None:
    """Nobody reads: the lease ends the pin, and it is counted."""
    _, peer = pair
    peer.ask("pin", "a", [1, 2], lease_s=0.05)
    assert peer.ask("wait_freed", "a")
    assert (peer.ask("pinned"), peer.ask("expired")) == ([0, 0], 1)


@pytest.mark.parametrize("how", ["lease", "release", "pinned again"])
def test_blocks_that_were_given_up_are_not_taken(pair: tuple[Pool, Peer], how: str) -> None:
    """The reader comes late, and something else is in the blocks: the stamp tells, even if its slot is in use again."""
    pool, peer = pair
    params = peer.ask("pin", "a", [1, 2], lease_s=0.01 if how == "lease" else 600)
    if how != "lease":
        assert peer.ask("release", "a")
    assert peer.ask("wait_freed", "a")
    if how == "pinned again":
        assert peer.ask("pin", "b", [1, 2])["remote_slot"] == params["remote_slot"]
    peer.ask("fill", 2)
    _, heard = pool.pull(params, [0, 1])
    assert heard.reason() == "expired"
    heard.wait_settled()
    assert pool.transfer.metrics.failures == {"expired": 1}
    assert pool.transfer.metrics.bytes == 0


def test_a_reader_that_is_killed_pins_nothing_for_long(make_pool: MakePool, make_peer: MakePeer) -> None:
    """Killed before it could say anything: the lease ends the pin."""
    writer, reader = make_pool(name="writer-1"), make_peer(name="reader-1")
    params = writer.transfer.exporter.pin("a", [1], 0.05)
    reader.ask("pull", "writer-1", base64.b64encode(writer.transfer.metadata).decode(), params, [0])
    reader.kill()
    assert writer.wait_freed("a")


def test_what_a_gone_reader_had_begun_is_given_back(make_pool: MakePool, make_peer: MakePeer) -> None:
    """The registry says that the reader is gone: no lease is waited for, and other readers' pins stay."""
    from dynamo_llm.transfer.exporter import CLAIM, message

    writer, reader = make_pool(name="writer-1"), make_peer(name="reader-1")
    exporter = writer.transfer.exporter
    params = exporter.pin("a", [1, 2], 600)
    exporter.pin("b", [0], 600)
    exporter._hear("reader-1", message(CLAIM, params["remote_slot"], int(params["remote_stamp"], 16)))
    reader.kill()
    writer.transfer.remove_peer("reader-1")
    assert writer.freed == ["a"]
    assert writer.transfer.metrics.pinned() == (1, 1)


BIG = {"layers": 16, "kv_heads": 4, "head_dim": 64}
"""512 KiB a block."""


def wait_until(condition: Callable[[], bool]) -> None:
    """Spin until it holds."""
    import time

    deadline_s = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.0005)


def test_a_writer_that_died_before_fails_at_once(pair: tuple[Pool, Peer]) -> None:
    """Dead before the first word or between two pulls: `peer_lost` without waiting for the deadline, blocks settled."""
    pool, peer = pair
    first, second, third = (peer.ask("pin", name, [1]) for name in "abc")
    assert pool.pull(first, [0])[1].reason() is None
    peer.kill()
    for params in (second, third):
        _, heard = pool.pull(params, [1], timeout_s=600)
        assert heard.reason() == "peer_lost"
        heard.wait_settled()


def test_a_writer_that_died_unseen_fails_too(make_pool: MakePool, make_peer: MakePeer) -> None:
    """The first pull finds nobody there."""
    pool, peer = make_pool(), make_peer()
    pool.transfer.add_peer(peer.name, peer.metadata)
    params = peer.ask("pin", "a", [1])
    peer.kill()
    _, heard = pool.pull(params, [1], timeout_s=600)
    assert heard.reason() in {"peer_lost", "nixl"}
    heard.wait_settled()


@pytest.mark.parametrize(("environment", "blocks"), [({}, 512), (TCP, 128)], ids=["memory", "tcp"])
def test_a_writer_that_dies_during_a_pull(
    make_pool: MakePool,
    make_peer: MakePeer,
    environment: dict[str, str],
    blocks: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed while much is on its way: failed, settled, and other writers are read as before."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    pool = make_pool(blocks=blocks, **BIG)
    peer, other = (make_peer(name=name, blocks=blocks, environment=environment, **BIG) for name in ("w-1", "w-2"))
    for writer in (peer, other):
        pool.transfer.add_peer(writer.name, writer.metadata)
        writer.ask("flood", 3)
    params, others = peer.ask("pin", "a", list(range(blocks))), other.ask("pin", "b", [5])
    _, heard = pool.pull(params, list(range(blocks)), timeout_s=600)
    wait_until(lambda: bool(pool.data[0].any()))
    peer.kill()
    assert heard.reason() in {None, "peer_lost"}  # all may have come before
    heard.wait_settled()
    pool.data[7] = 0
    assert pool.pull(others, [7])[1].reason() is None
    assert (pool.data[7] == 3).all()


def test_a_writer_that_dies_after_a_pull(pair: tuple[Pool, Peer]) -> None:
    """What has arrived stays."""
    pool, peer = pair
    assert pool.pull(peer.ask("pin", "a", [1]), [0])[1].reason() is None
    peer.kill()
    assert np.array_equal(pool.data[0], written(pool)[1])


@pytest.fixture
def slow_pair(
    make_pool: MakePool, make_peer: MakePeer, monkeypatch: pytest.MonkeyPatch
) -> tuple[Pool, Peer, dict[str, Any]]:
    """A writer that has been stopped, over TCP, where reading takes its help; and the parameters of a pin of its."""
    monkeypatch.setenv("UCX_TLS", "tcp")
    pool, peer = make_pool(blocks=64, **BIG), make_peer(blocks=64, environment=TCP, **BIG)
    pool.transfer.add_peer(peer.name, peer.metadata)
    peer.ask("fill", 1)
    assert pool.pull(peer.ask("pin", "a", [1]), [0])[1].reason() is None
    params = peer.ask("pin", "b", list(range(64)))
    peer.stop()
    return pool, peer, params


def test_a_stall_fails_and_settles_later(slow_pair: tuple[Pool, Peer, dict[str, Any]]) -> None:
    """Past the deadline the pull has failed, but its blocks may not be handed out: the bytes do come in the end."""
    pool, peer, params = slow_pair
    _, heard = pool.pull(params, list(range(64)), timeout_s=0.2)
    assert heard.reason() == "deadline"
    assert not heard.settled
    assert pool.transfer.metrics.pulls() == (1, 1)
    peer.resume()
    heard.wait_settled()
    assert pool.data[0].any()
    assert heard.words == ["done", "settled"]
    assert peer.ask("wait_freed", "b")


def test_a_cancel_is_done_at_once_and_settles_later(slow_pair: tuple[Pool, Peer, dict[str, Any]]) -> None:
    """As after a deadline; cancelling again changes nothing."""
    pool, peer, params = slow_pair
    pull, heard = pool.pull(params, list(range(64)))
    pool.transfer.puller.cancel(pull)
    pool.transfer.puller.cancel(pull)
    assert heard.reason() == "cancelled"
    peer.resume()
    heard.wait_settled()
    assert heard.words == ["done", "settled"]
    assert peer.ask("wait_freed", "b")


def test_a_stopped_writer_that_is_killed_settles(slow_pair: tuple[Pool, Peer, dict[str, Any]]) -> None:
    """NIXL says that the transfer has ended when the connection breaks."""
    pool, peer, params = slow_pair
    _, heard = pool.pull(params, list(range(64)), timeout_s=0.05)
    assert heard.reason() == "deadline"
    peer.kill()
    heard.wait_settled()


def test_a_peer_whose_epoch_ends_is_forgotten(slow_pair: tuple[Pool, Peer, dict[str, Any]]) -> None:
    """The registry says that it is gone: its pulls fail without their deadline, and new ones are refused."""
    pool, peer, params = slow_pair
    _, heard = pool.pull(params, list(range(64)), timeout_s=600)
    pool.transfer.remove_peer(peer.name)
    assert heard.reason() == "peer_lost"
    with pytest.raises(TransferError, match="has not told this worker"):
        pool.pull(params, [0])
    peer.kill()
    heard.wait_settled()


def test_many_pulls_at_once(pair: tuple[Pool, Peer]) -> None:
    """More than are under way at a time: all of them end, each with its own blocks."""
    pool, peer = pair
    for turn in range(4):
        pinned = [peer.ask("pin", f"{turn}-{block}", [block]) for block in range(64)]
        heard = [pool.pull(params, [63 - block])[1] for block, params in enumerate(pinned)]
        assert [h.reason() for h in heard] == [None] * 64
        for h in heard:
            h.wait_settled()
    assert np.array_equal(pool.data[::-1], written(pool))
    assert peer.ask("wait_freed", "3-63")
    assert peer.ask("pinned") == [0, 0]


def test_thousands_of_pulls_fail_with_their_peer(slow_pair: tuple[Pool, Peer, dict[str, Any]]) -> None:
    """Under way or waiting for their turn: all of them get their answer when the connection breaks."""
    pool, peer, params = slow_pair
    heard = [pool.pull(params, list(range(64)), timeout_s=600)[1] for _ in range(3000)]
    peer.kill()
    assert {h.reason() for h in heard} == {"peer_lost"}
    for h in heard:
        h.wait_settled()
    assert pool.transfer.metrics.pulls() == (0, 0)


def test_closing_ends_what_is_open(make_pool: MakePool, make_peer: MakePeer) -> None:
    """Pins are given back and nothing new begins; it may be closed twice."""
    pool = make_pool()
    params = pool.transfer.exporter.pin("a", [1], 600)
    pool.close()
    assert pool.freed == ["a"]
    with pytest.raises(TransferError, match="closed"):
        pool.transfer.exporter.pin("b", [1], 1)
    with pytest.raises(TransferError):
        pool.pull(params, [0])
    pool.close()


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"remote_block_ids": "12"}, "Expected `array`"),
    ({"remote_block_ids": [1.5]}, "Expected `int`"),
    ({"remote_block_ids": [True]}, "Expected `int`"),
    ({"remote_block_ids": [-1]}, ">= 0"),
    ({"remote_block_ids": [1 << 80]}, "remote_block_ids"),
    ({"remote_block_ids": []}, "length >= 1"),
    ({"remote_block_ids": [64]}, "not within the pool"),
    ({"remote_block_ids": [1, 1]}, "named twice"),
    ({"remote_block_ids": list(range(5000))}, "5000 remote blocks are named"),
    ({"remote_block_ids": [1]}, "do not fill 2 blocks"),
    ({"remote_engine_id": "elsewhere-1"}, "has not told this worker"),
    ({"remote_engine_id": 5}, "Expected `str`"),
    ({"remote_engine_id": "x" * 500}, "length <= 128"),
    ({"remote_slot": 1 << 40}, "is beyond the"),
    ({"remote_slot": None}, "Expected `int`"),
    ({"remote_stamp": "zz"}, "regex"),
    ({"remote_stamp": "0" * 16}, "is zero"),
    ({"do_remote_prefill": False}, "do_remote_prefill must be true"),
    ({"do_remote_decode": True}, "do_remote_decode false"),
    ({"remote_request_id": ...}, "missing required field"),
]


@pytest.mark.parametrize(("wrong", "text"), WRONG, ids=lambda value: str(value)[:40])
def test_broken_parameters_are_refused_at_once(make_pool: MakePool, wrong: dict[str, Any], text: str) -> None:
    """In one line, before NIXL hears of it: nothing is called back."""
    pool, writer = make_pool(), make_pool(name="writer-1")
    pool.transfer.add_peer("writer-1", writer.transfer.metadata)
    params = {**writer.transfer.exporter.pin("a", [1, 2], 60), **wrong}
    params = {key: value for key, value in params.items() if value is not ...}
    with pytest.raises(TransferError, match=text) as refusal:
        pool.pull(params, [0, 1])
    assert "\n" not in str(refusal.value)
    assert sum(pool.transfer.metrics.failures.values()) == 1


@pytest.mark.parametrize(
    ("local", "text"), [([64], "not within"), ([-1], "not within"), ([2, 2], "twice"), ([], "do not")]
)
def test_wrong_local_blocks_are_refused(make_pool: MakePool, local: list[int], text: str) -> None:
    """A bug of the engine does not become a write to somebody else's memory."""
    pool, writer = make_pool(), make_pool(name="writer-1")
    pool.transfer.add_peer("writer-1", writer.transfer.metadata)
    with pytest.raises(TransferError, match=text):
        pool.pull(writer.transfer.exporter.pin("a", [1, 2], 60), local)


def test_pins_are_refused_in_one_line(make_pool: MakePool) -> None:
    """A second pin of a request, none of blocks, and more than there are stamps."""
    exporter = make_pool(slots=2).transfer.exporter
    exporter.pin("a", [1], 60)
    for request_id, blocks, text in (("a", [2], "has pinned"), ("b", [], "no block")):
        with pytest.raises(TransferError, match=text):
            exporter.pin(request_id, blocks, 60)
    exporter.pin("b", [1], 60)
    with pytest.raises(TransferError, match="more stamps") as refusal:
        exporter.pin("c", [1], 60)
    assert refusal.value.reason == "full"
    assert exporter.release("a")
    assert not exporter.release("a")
    exporter.pin("c", [1], 60)


@pytest.mark.parametrize("data", [b"", b"garbage", b"\x80", None], ids=["empty", "garbage", "no fields", "damaged"])
def test_garbage_metadata_are_refused(make_pool: MakePool, data: bytes | None) -> None:
    """What is no metadata of that agent is refused; NIXL's own part is tried when the peer is first read."""
    pool, writer = make_pool(), make_pool(name="writer-1")
    with pytest.raises(TransferError, match="transfer metadata of writer-1"):
        pool.transfer.add_peer("writer-1", data if data is not None else writer.transfer.metadata[:-40])
    with pytest.raises(TransferError, match="is that of 'writer-1'"):
        pool.transfer.add_peer("writer-2", writer.transfer.metadata)


def test_garbage_of_nixl_fails_the_pull(make_pool: MakePool) -> None:
    """The envelope is fine and its content is not: the pull fails and settles, others go on."""
    import msgspec

    from dynamo_llm.transfer.metadata import decode_metadata, encode_metadata

    pool, writer, other = make_pool(), make_pool(name="writer-1"), make_pool(name="other-1")
    good = decode_metadata("writer-1", writer.transfer.metadata)
    foreign = decode_metadata("other-1", other.transfer.metadata).nixl
    for number, nixl in itertools.zip_longest((1, 2), (b"garbage", foreign)):
        name = f"bad-{number}"
        pool.transfer.add_peer(name, encode_metadata(msgspec.structs.replace(good, agent=name, nixl=nixl)))
        params = {**writer.transfer.exporter.pin(name, [1], 60), "remote_engine_id": name}
        _, heard = pool.pull(params, [0])
        assert heard.reason() in {"nixl", "params"}
        heard.wait_settled()
    writer.fill(1)
    pool.transfer.add_peer("writer-1", writer.transfer.metadata)
    assert pool.pull(writer.transfer.exporter.pin("a", [1], 60), [0])[1].reason() is None


def test_another_layout_is_refused_with_its_reason(make_pool: MakePool) -> None:
    """At the pull, in one line; the metadata themselves are no error."""
    pool, writer = make_pool(), make_pool(name="writer-1", dtype="float16", block_bytes=make_half())
    pool.transfer.add_peer("writer-1", writer.transfer.metadata)
    with pytest.raises(TransferError, match="the dtypes differ: 'float16' there, 'float32' here") as refusal:
        pool.pull(writer.transfer.exporter.pin("a", [1], 60), [0])
    assert refusal.value.reason == "layout"


def make_half() -> int:
    """Bytes of a small model's block in float16."""
    return 2 * 2 * 2 * 16 * 8 * 2


def test_words_of_strangers_are_ignored(make_pool: MakePool) -> None:
    """Only who knows the stamp can release a pin."""
    from dynamo_llm.transfer.exporter import RELEASE, message

    writer = make_pool(name="writer-1")
    exporter = writer.transfer.exporter
    params = exporter.pin("a", [1], 600)
    slot, stamp = params["remote_slot"], int(params["remote_stamp"], 16)
    for word in (b"", b"x" * 17, b"r", message(RELEASE, slot, stamp ^ 1), message(RELEASE, slot + 1, stamp)):
        exporter._hear("stranger", word)
    assert writer.freed == []
    exporter._hear("reader", message(RELEASE, slot, stamp))
    assert writer.freed == ["a"]
