"""Foreign block hashes become the ones that a router computes for a prompt, and residency stays true."""

from typing import Any

import numpy as np
import pytest
from event_publisher import CLEARED, batch, removed, stored
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_llm.engines.kv_events import Translator, decode_events
from kvstore.cards import Cleared, KvOp, Removed, Stored
from kvstore.hashing import block_hashes, root_seed
from kvstore.residency import Residency

MODEL = "demo"
SIZE = 2


def ours(tokens: list[int], lora: str = "", salt: str = "") -> list[int]:
    """The hashes that the router looks up for a prompt."""
    values = block_hashes(np.array(tokens, dtype=np.uint32), SIZE, seed=root_seed(MODEL, lora, salt))
    return [int(value) for value in values]


def translate(translator: Translator, *events: Any) -> list[KvOp]:
    return translator.translate(decode_events(batch(*events)))


@pytest.fixture
def translator() -> Translator:
    return Translator(MODEL, SIZE)


def test_a_chain_over_several_events(translator: Translator) -> None:
    """Blocks get the hashes of the whole prompt, though each event holds only a piece of it."""
    tokens = [1, 2, 3, 4, 5, 6]
    a, b, c = ours(tokens)
    assert translate(translator, stored([-7, 8], tokens[:4])) == [Stored(None, [a, b])]
    assert translate(translator, stored([b"c"], tokens[4:], parent=8)) == [Stored(b, [c])]


def test_loras_and_salts_have_chains_of_their_own(translator: Translator) -> None:
    """vLLM puts adapter and salt among the extra keys, SGLang into fields of their own; later blocks inherit both."""
    tokens = [1, 2, 3, 4]
    vllm = stored([1, 2], tokens, lora_id=3, lora_name="pirate", extra_keys=[["pirate", "tenant"], ["pirate"]])
    assert translate(translator, vllm) == [Stored(None, ours(tokens, "pirate", "tenant"))]
    assert translate(translator, stored([3], tokens[:2], extra_keys=[["tenant"]])) == [
        Stored(None, ours(tokens[:2], salt="tenant"))
    ]
    assert translate(translator, stored([4], tokens[2:], parent=3)) == [
        Stored(ours(tokens, salt="tenant")[0], ours(tokens, salt="tenant")[1:])
    ]
    sglang = stored([5, 6], tokens, lora_name="pirate", cache_salt="tenant")
    assert translate(Translator(MODEL, SIZE), sglang) == [Stored(None, ours(tokens, "pirate", "tenant"))]
    same_name = stored([7], tokens[:2], lora_id=3, lora_name="x", extra_keys=[["x", "x"]])
    assert translate(translator, same_name) == [Stored(None, ours(tokens[:2], "x", "x"))]


def test_an_adapter_without_a_name_is_left_out(translator: Translator) -> None:
    """An engine that sends only a number for the adapter says nothing that a router could look up."""
    assert translate(translator, stored([1, 2], [1, 2, 3, 4], lora_id=3)) == []
    assert (translator.foreign, translator.blocks) == (2, 0)


def test_blocks_with_images_or_embeddings_are_left_out(translator: Translator) -> None:
    """What is not made of tokens alone would be found by prompts that it does not fit; so would what follows it."""
    tokens = [1, 2, 3, 4, 5, 6]
    event = stored([1, 2, 3], tokens, extra_keys=[["salt"], [["image", 0]], None])
    assert translate(translator, event) == [Stored(None, ours(tokens, salt="salt")[:1])]
    assert translate(translator, stored([4], [7, 8], parent=3)) == []
    assert translate(translator, stored([5], [1, 2], extra_keys=[[b"digest"]])) == []
    assert (translator.foreign, translator.orphans, translator.blocks) == (3, 1, 1)


def test_stored_again_is_no_news(translator: Translator) -> None:
    """A block that is announced twice is stored once; new ones beside it are announced with their parent."""
    tokens = [1, 2, 3, 4, 5, 6]
    a, b, c = ours(tokens)
    translate(translator, stored([2], tokens[2:4], parent=None))  # another chain: block 2 of this name stays what it is
    translator.clear()
    assert translate(translator, stored([1, 2], tokens[:4]), stored([1, 2, 3], tokens)) == [
        Stored(None, [a, b]),
        Stored(b, [c]),
    ]
    translate(translator, removed([1]))
    assert translate(translator, stored([1, 2, 3], tokens)) == [Stored(None, [a])]


def test_tiers(translator: Translator) -> None:
    """A block may lie in several media; it is known until it has left the last, and lets its children be named."""
    a, b = ours([1, 2, 3, 4])
    assert translate(translator, stored([1], [1, 2]), stored([1], [1, 2], medium="CPU")) == [
        Stored(None, [a]),
        Stored(None, [a], "host"),
    ]
    assert translate(translator, removed([1])) == [Removed([a])]
    assert translate(translator, stored([2], [3, 4], parent=1, medium="STORAGE")) == [Stored(a, [b], "disk")]
    assert translate(translator, removed([1], "CPU_PINNED"), removed([2], "DISK")) == [
        Removed([a], "host"),
        Removed([b], "disk"),
    ]
    assert translator.blocks == 0


def test_other_media(translator: Translator) -> None:
    """No medium is the device, what lies elsewhere is remote, and a word that nobody knows is left out."""
    (a,) = ours([1, 2])
    assert translate(translator, stored([1], [1, 2], medium=None)) == [Stored(None, [a])]
    assert translate(translator, stored([1], [1, 2], medium="EXTERNAL")) == [Stored(None, [a], "remote")]
    assert translate(translator, stored([2], [1, 2], medium="STORAGE", locality="REMOTE")) == []  # `a` is there already
    assert translate(translator, stored([3], [1, 2], medium="TAPE"), removed([1], "TAPE")) == []
    assert translate(Translator(MODEL, SIZE, media={"CPU": "device"}), stored([1], [1, 2], medium="CPU")) == [
        Stored(None, [a])
    ]


def test_offloaded_blocks_without_tokens(translator: Translator) -> None:
    """vLLM's offloading may name blocks only: those that are known are followed, the others counted."""
    (a,) = ours([1, 2])
    bare = {"token_ids": [], "block_size": 0, "medium": "CPU"}
    translate(translator, stored([1], [1, 2]))
    assert translate(translator, {**stored([1, 9], []), **bare}) == [Stored(None, [a], "host")]
    assert (translator.orphans, translator.blocks) == (1, 1)


def test_unknown_parents_and_removals(translator: Translator) -> None:
    """A missed event costs the blocks after it and nothing else; removing what is not known does nothing."""
    assert translate(translator, stored([2], [3, 4], parent=1), removed([2, 5])) == []
    assert (translator.orphans, translator.blocks) == (1, 0)


def test_other_groups_of_layers(translator: Translator) -> None:
    """Of a model with several kinds of layers the full attention's blocks are followed, whoever shares their name."""
    (a,) = ours([1, 2])
    window = {"group_idx": 0, "kv_cache_spec_kind": "sliding_window", "kv_cache_spec_sliding_window": 8}
    full = {"group_idx": 1, "kv_cache_spec_kind": "full_attention"}
    second = {"group_idx": 2, "kv_cache_spec_kind": "full_attention"}
    assert translate(translator, stored([1], [1, 2], **window), stored([1], [1, 2], **full)) == [Stored(None, [a])]
    assert translate(translator, stored([1], [1, 2], **second)) == []
    assert translate(translator, removed([1], group_idx=0), removed([1], group_idx=2)) == []
    assert translate(translator, removed([1], group_idx=1)) == [Removed([a])]


@pytest.mark.parametrize(
    "event",
    [
        stored([1], [1, 2, 3, 4], block_size=4),
        stored([1], [1], block_size=1),
        stored([1], [1, 2, 3, 4]),  # a window's blocks: more tokens than names
        stored([1, 2], [1, 2]),
        stored([1], [-1, 2]),
        stored([1], [1, 2**32]),
        stored([1], [[], [1, 2]]),  # type: ignore[list-item]
    ],
)
def test_blocks_that_are_not_ours(translator: Translator, event: dict[str, Any]) -> None:
    """Another block size, tokens that do not fit the names, and numbers that are no token ids are left out."""
    assert translate(translator, event) == []
    assert translator.foreign > 0


def test_pairs_of_tokens(translator: Translator) -> None:
    """SGLang names a token and its successor under speculative decoding; the first of each is the block's."""
    assert translate(translator, stored([1], [[1, 2], [2, 3]])) == [Stored(None, ours([1, 2]))]  # type: ignore[list-item]


def test_two_names_for_one_of_ours(translator: Translator) -> None:
    """An engine may tell blocks apart that we do not: ours is gone when the last of them is."""
    (a,) = ours([1, 2])
    assert translate(translator, stored([1], [1, 2]), stored([2], [1, 2])) == [Stored(None, [a])]
    assert translate(translator, removed([1])) == []
    assert translate(translator, removed([2])) == [Removed([a])]


def test_cleared(translator: Translator) -> None:
    """An emptied cache is one op, none where nothing was known, and leaves no memory of the blocks."""
    assert translate(translator, CLEARED) == []
    assert translate(translator, stored([1], [1, 2]), CLEARED)[-1] == Cleared()
    assert translate(translator, stored([2], [3, 4], parent=1)) == []
    assert translator.blocks == 0


def test_removals_are_merged(translator: Translator) -> None:
    """One op for a run of removals, for engines that send one event per block."""
    translate(translator, stored([1, 2, 3], [1, 2, 3, 4, 5, 6]))
    a, b, c = ours([1, 2, 3, 4, 5, 6])
    assert translate(translator, removed([3]), removed([2]), removed([1])) == [Removed([c, b, a])]


SEQUENCES = st.tuples(
    st.lists(st.integers(0, 1), min_size=1, max_size=4), st.sampled_from(["", "x"]), st.sampled_from(["", "y"])
)
ACTIONS = st.lists(
    st.tuples(st.sampled_from(["store", "store", "remove", "clear"]), SEQUENCES, st.sampled_from(["GPU", "CPU"])),
    max_size=30,
)


@settings(max_examples=200)
@given(ACTIONS)
def test_against_a_model_of_the_cache(actions: list[tuple[str, Any, str]]) -> None:
    """Whatever is stored, evicted and cleared: the ops amount to what the cache holds, and no name stays behind."""
    translator, residency = Translator(MODEL, SIZE), Residency()
    held: dict[str, dict[Any, int]] = {"GPU": {}, "CPU": {}}
    for action, (pieces, lora, salt), medium in actions:
        tokens = [token for piece in pieces for token in (piece, 0)]
        chain = [(lora, salt, tuple(tokens[: end * SIZE])) for end in range(1, len(pieces) + 1)]
        names = [hash(block) for block in chain]
        if action == "clear":
            event = CLEARED
            held = {"GPU": {}, "CPU": {}}
        elif action == "remove":
            event = removed(names[-1:], medium)
            held[medium].pop(chain[-1], None)
        else:
            known = {*held["GPU"], *held["CPU"]}
            begin = next((end for end in range(len(chain) - 1, 0, -1) if chain[end - 1] in known), 0)
            more = {"lora_name": lora or None, "cache_salt": salt or None, "medium": medium}
            parent = names[begin - 1] if begin else None
            event = stored(names[begin:], tokens[begin * SIZE :], parent=parent, **more)
            values = ours(tokens, lora, salt)
            held[medium].update(zip(chain[begin:], values[begin:], strict=True))
        residency.apply(translate(translator, event))
        assert residency.tiers["device"] == set(held["GPU"].values())
        assert residency.tiers["host"] == set(held["CPU"].values())
        assert translator.blocks == len({*held["GPU"], *held["CPU"]})
