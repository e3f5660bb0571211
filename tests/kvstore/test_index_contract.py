"""The contract of every prefix index, against a model made of sets. New implementations join `IMPLEMENTATIONS`."""

import functools
import operator
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.cards import TIERS, Cleared, Digest, KvOp, Removed, Stored, Tier
from kvstore.index.base import Match, PrefixIndex
from kvstore.index.memory import MemoryIndex
from kvstore.residency import Residency
from kvstore.wire import TierHashes

IMPLEMENTATIONS: dict[str, Callable[[], PrefixIndex]] = {"memory": MemoryIndex}
INSTANCES = [f"instance{number}" for number in range(6)]

index_of_each_kind = pytest.mark.parametrize("make", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)


class Model:
    """What an index should know, in the plainest form."""

    def __init__(self) -> None:
        self.held: dict[str, dict[Tier, set[int]]] = {}

    def tiers(self, instance: str) -> dict[Tier, set[int]]:
        return self.held.setdefault(instance, {tier: set() for tier in TIERS})

    def apply(self, instance: str, ops: list[KvOp]) -> None:
        tiers = self.tiers(instance)
        for op in ops:
            if isinstance(op, Stored):
                tiers[op.tier].update(op.hashes)
            elif isinstance(op, Removed):
                tiers[op.tier].difference_update(op.hashes)
            else:
                for held in tiers.values():
                    held.clear()

    def match(self, hashes: list[int]) -> dict[str, Match]:
        found = {}
        for instance, tiers in self.held.items():
            counts = dict.fromkeys(TIERS, 0)
            for value in hashes:
                best = next((tier for tier in TIERS if value in tiers[tier]), None)
                if best is None:
                    break
                counts[best] += 1
            if any(counts.values()):
                found[instance] = Match(*counts.values())
        return found

    def digest(self, instance: str) -> Digest:
        values = [value for held in self.held.get(instance, {}).values() for value in held]
        return Digest(len(values), functools.reduce(operator.xor, values, 0))

    def blocks(self) -> int:
        return len({value for tiers in self.held.values() for held in tiers.values() for value in held})


hashes = st.lists(st.integers(2**64 - 24, 2**64 - 1), max_size=24)
tier = st.sampled_from(TIERS)
op = st.one_of(st.builds(Stored, st.none(), hashes, tier), st.builds(Removed, hashes, tier), st.builds(Cleared))
step = st.one_of(
    st.tuples(st.just("apply"), st.sampled_from(INSTANCES), st.lists(op, max_size=4)),
    st.tuples(st.just("remove"), st.sampled_from(INSTANCES), st.just([])),
    st.tuples(st.just("reload"), st.sampled_from(INSTANCES), st.lists(op, max_size=4)),
)


def check(index: PrefixIndex, model: Model, prompts: list[list[int]]) -> None:
    """The index says what the model says."""
    assert sorted(index.instances()) == sorted(model.held)
    assert index.blocks() == model.blocks()
    for instance in INSTANCES:
        assert index.digest(instance) == model.digest(instance)
        resident = {tier: set(held) for tier, held in index.copy_hashes(instance).items()}
        expected = {tier: held for tier, held in model.held.get(instance, {}).items() if held}
        assert resident == expected
    for prompt in prompts:
        expected_matches = model.match(prompt)
        assert index.match(prompt) == expected_matches
        assert index.match(np.array(prompt, dtype=np.uint64)) == expected_matches


@index_of_each_kind
@settings(max_examples=200, deadline=None)
@given(steps=st.lists(step, max_size=12), prompts=st.lists(hashes, min_size=1, max_size=4))
def test_against_model(
    make: Callable[[], PrefixIndex], steps: list[tuple[str, str, list[KvOp]]], prompts: list[list[int]]
) -> None:
    """Whatever is stored, removed, cleared, loaded and forgotten in whatever order, matches and digests are exact."""
    index, model = make(), Model()
    for kind, instance, ops in steps:
        if kind == "apply":
            index.apply(instance, ops)
            model.apply(instance, ops)
        elif kind == "remove":
            index.remove(instance)
            model.held.pop(instance, None)
        else:
            residency = Residency()
            residency.apply(ops)
            index.load(instance, residency.snapshot())
            model.held.pop(instance, None)
            model.apply(instance, ops)
    check(index, model, prompts)


@index_of_each_kind
def test_prefix_and_tiers(make: Callable[[], PrefixIndex]) -> None:
    """A match ends at the first hole, and counts each block for its best tier."""
    index = make()
    index.apply("a", [Stored(None, [1, 2, 3]), Stored(None, [2], "host"), Stored(3, [4, 5], "disk")])
    index.apply("b", [Stored(None, [1]), Stored(None, [3, 4])])
    index.apply("c", [Stored(None, [2, 3])])
    assert index.match([1, 2, 3, 4, 6, 5]) == {"a": Match(3, 0, 1, 0), "b": Match(1, 0, 0, 0)}
    assert index.match([1, 2, 3, 4, 6, 5])["a"].blocks == 4
    assert index.match([]) == index.match([9]) == {}


@index_of_each_kind
def test_slots_are_used_again(make: Callable[[], PrefixIndex]) -> None:
    """A thousand instances that come and go leave nothing behind and never mix with the one that stays."""
    index = make()
    index.apply("stays", [Stored(None, [1, 2])])
    for number in range(1000):
        index.apply(f"i{number}", [Stored(None, [1, number + 10]), Stored(None, [number + 10], "host")])
        index.remove(f"i{number}")
    assert index.instances() == ["stays"]
    assert index.blocks() == 2
    assert index.match([1, 2]) == {"stays": Match(2, 0, 0, 0)}


@index_of_each_kind
@pytest.mark.parametrize("tiers", [[TierHashes("tape", b"")], [TierHashes("device", b"123")]])
def test_broken_snapshot(make: Callable[[], PrefixIndex], tiers: list[TierHashes]) -> None:
    """A snapshot that cannot be read is refused and leaves the index as it was."""
    index = make()
    index.apply("a", [Stored(None, [1])])
    with pytest.raises(ValueError, match=r"tier|uint64"):
        index.load("a", tiers)
    assert index.match([1]) == {"a": Match(1, 0, 0, 0)}


@index_of_each_kind
def test_unknown_instance(make: Callable[[], PrefixIndex]) -> None:
    """Asking for or removing an instance that was never there is harmless."""
    index = make()
    index.remove("a")
    assert index.copy_hashes("a") == {}
    assert index.digest("a") == Digest()
    assert index.instances() == []
