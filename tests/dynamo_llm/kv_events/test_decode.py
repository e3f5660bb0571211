"""The payload of foreign KV events, in the shapes of several engines and versions, and what is none."""

import contextlib
from typing import Any

import msgspec
import pytest
from event_publisher import CLEARED, batch, removed, stored
from hypothesis import given
from hypothesis import strategies as st

from dynamo_llm.engines.kv_events import BlockRemoved, BlocksCleared, BlockStored, KvEventError, decode_events


def test_maps_of_vllm() -> None:
    """A batch as vLLM 0.32 sends it, with all its fields, is read in order."""
    store = stored(
        [11, -12],
        [1, 2, 3, 4],
        parent=10,
        lora_name="pirate",
        extra_keys=[["pirate", "tenant"], None],
        group_idx=0,
        kv_cache_spec_kind="full_attention",
        ownership="tier-1",
        session_id="s",
    )
    events = decode_events(batch(store, removed([11], group_idx=0), CLEARED))
    assert events == [
        BlockStored(
            block_hashes=[11, -12],
            parent_block_hash=10,
            token_ids=[1, 2, 3, 4],
            block_size=2,
            medium="GPU",
            lora_name="pirate",
            extra_keys=[["pirate", "tenant"], None],
            group_idx=0,
            kv_cache_spec_kind="full_attention",
        ),
        BlockRemoved(block_hashes=[11], medium="GPU", group_idx=0),
        BlocksCleared(),
    ]


@pytest.mark.parametrize("length", range(5, 12))
def test_arrays_of_older_engines(length: int) -> None:
    """Positional events may end early, as vLLM 0.9 to 0.23 and older SGLang send them, or go on longer than known."""
    event: list[Any] = ["BlockStored", [1], None, [5, 6], 2, None, "CPU", "lora", [None], 3, "full_attention"]
    (found,) = decode_events(batch(event[:length]))
    whole = BlockStored([1], None, [5, 6], 2, None, "CPU", "lora", [None], 3, "full_attention")
    fields = BlockStored.__struct_fields__
    assert [getattr(found, name) for name in fields[: length - 1]] == [
        getattr(whole, name) for name in fields[: length - 1]
    ]
    longer = ["BlockRemoved", [1, b"digest"], "GPU", 0, "LOCAL", {"new": 1}, 2]
    assert decode_events(batch(longer)) == [BlockRemoved([1, b"digest"], "GPU", 0, "LOCAL")]
    assert decode_events(batch(["AllBlocksCleared"])) == [BlocksCleared()]


def test_a_batch_without_a_rank_and_one_with_more() -> None:
    """The batch's own array may be shorter or longer than today's."""
    assert decode_events(msgspec.msgpack.encode([1, [CLEARED]])) == [BlocksCleared()]
    assert decode_events(msgspec.msgpack.encode([1, [CLEARED], None, {}, 5])) == [BlocksCleared()]


def test_digests_and_unsigned_numbers_are_hashes() -> None:
    """Names of blocks are 64-bit integers of either sign, or bytes."""
    names = [b"\x00" * 32, 2**64 - 1, -(2**63)]
    (event,) = decode_events(batch(stored(names, [1, 2] * 3, parent=b"p")))
    assert isinstance(event, BlockStored)
    assert (event.block_hashes, event.parent_block_hash) == (names, b"p")


def test_what_is_not_known_is_left_out() -> None:
    """Kinds of events and fields of newer engines do not disturb the others."""
    new = {"type": "BlockPinned", "block_hashes": "?"}
    assert decode_events(batch(new, ["BlockPinned", 1], removed([7], colour="red"))) == [BlockRemoved([7], "GPU")]


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        msgspec.msgpack.encode({}),
        msgspec.msgpack.encode([1]),
        batch({}),
        batch([]),
        batch(3),
        batch("BlockStored"),
        batch({"type": 5}),
        batch({"type": "BlockStored"}),
        batch(["BlockStored", [1], None]),
        batch(stored(["name"], [1, 2])),
        batch(stored([1], ["one", "two"])),
        batch(stored([2**70 % 2**64], [1, 2], block_size=2.5)),  # type: ignore[arg-type]
        batch(removed([None])),
        batch(CLEARED)[:-1],
        batch(CLEARED) + b"\x00",
        b"\x91" * 100_000,
        msgspec.msgpack.encode([1, [CLEARED, msgspec.Raw(b"\x82\xa1a" + b"\x91" * 100_000)]]),
    ],
)
def test_what_is_no_batch_is_one_kind_of_error(payload: bytes) -> None:
    """Broken and hostile payloads raise `KvEventError` and nothing else."""
    with pytest.raises(KvEventError):
        decode_events(payload)


@given(st.binary(max_size=64) | st.integers(0, 200).map(lambda n: batch(stored([1, 2], [1, 2, 3, 4]), CLEARED)[:n]))
def test_no_payload_breaks_the_reader(payload: bytes) -> None:
    """Whatever comes is a list of events or a `KvEventError`."""
    with contextlib.suppress(KvEventError):
        assert isinstance(decode_events(payload), list)
