"""Placement is a pure function: its formula by hand, and what must hold for all inputs."""

from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.config import PlacementSettings
from router.placement import Candidate, cost, place

KV = PlacementSettings()
blocks = st.integers(0, 200)
candidates = st.builds(
    Candidate,
    instance=st.uuids().map(str),
    device_blocks=blocks,
    host_blocks=blocks,
    disk_blocks=blocks,
    shared_blocks=blocks,
    prefill_blocks=st.floats(0, 500),
    active_blocks=st.floats(0, 500),
    requests=st.integers(0, 50),
)
fleets = st.lists(candidates, min_size=1, max_size=8, unique_by=lambda c: c.instance)
policies = st.sampled_from(["kv", "round-robin", "random"])


def chosen(fleet: list[Candidate], settings: PlacementSettings = KV, turn: int = 0, seed: int = 0) -> str:
    return place(10, 16, fleet, settings, turn, Random(seed)).instance


def test_the_formula() -> None:
    """The cost is what its documentation says, tier credits and scale included."""
    candidate = Candidate("a", 4, 4, 4, shared_blocks=3, prefill_blocks=5, active_blocks=7)
    settings = PlacementSettings(prefill_load_scale=2.0)
    assert cost(20, candidate, settings) == 2.0 * (5 + 20 - (4 + 3 + 1)) + 7 + (20 - 3)


def test_overlap_never_makes_a_negative_prefill() -> None:
    """More overlap than there is to compute counts as nothing to compute."""
    assert cost(2, Candidate("a", device_blocks=50), KV) == 2


def test_prefix_wins_until_its_holder_is_busy() -> None:
    """The holder of the prefix is chosen, unless its load outweighs what the prefix saves."""
    other = Candidate("b")
    assert chosen([Candidate("a", device_blocks=8), other]) == "a"
    assert chosen([Candidate("a", device_blocks=8, active_blocks=9), other]) == "b"


@pytest.mark.parametrize(("overlap", "reason"), [(0, "load"), (1, "kv")])
def test_reason(overlap: int, reason: str) -> None:
    """The reason says whether the chosen worker holds a part of the prompt."""
    decision = place(10, 16, [Candidate("a", device_blocks=overlap)], KV, 0, Random(0))
    assert (decision.reason, decision.reused_blocks) == (reason, overlap)


@given(fleet=fleets, policy=policies, turn=st.integers(0, 1000), seed=st.integers(), temperature=st.floats(0, 3))
def test_somebody_is_chosen(fleet: list[Candidate], policy: str, turn: int, seed: int, temperature: float) -> None:
    """Every policy chooses one of the candidates, the same one for the same inputs."""
    settings = PlacementSettings(policy=policy, temperature=temperature)
    first = place(10, 16, fleet, settings, turn, Random(seed))
    assert first.instance in {c.instance for c in fleet}
    assert place(10, 16, fleet, settings, turn, Random(seed)) == first


@given(fleet=fleets, seed=st.integers())
def test_the_lowest_cost_wins(fleet: list[Candidate], seed: int) -> None:
    """Without a temperature nobody is cheaper than the chosen one."""
    by_id = {c.instance: cost(10, c, KV) for c in fleet}
    assert by_id[chosen(fleet, seed=seed)] == min(by_id.values())


@given(fleet=fleets, more=st.integers(1, 20), seed=st.integers())
def test_a_longer_prefix_never_hurts(fleet: list[Candidate], more: int, seed: int) -> None:
    """Who was chosen stays chosen when it holds more of the prompt."""
    settings = PlacementSettings()
    before = chosen(fleet, settings, seed=seed)
    better = next(c for c in fleet if c.instance == before)
    better.device_blocks += more
    others = [cost(10, c, settings) for c in fleet if c is not better]
    assert all(cost(10, better, settings) <= value for value in others)


def test_round_robin_takes_turns() -> None:
    """Each instance gets the same share, whatever order they are listed in."""
    fleet = [Candidate(name) for name in "cab"]
    settings = PlacementSettings(policy="round-robin")
    order = [chosen(fleet[turn % 3 :] + fleet[: turn % 3], settings, turn) for turn in range(6)]
    assert order == list("abcabc")


def test_ties_are_shared() -> None:
    """Equally good workers get about the same share; fewer requests win a tie."""
    rng = Random(1)
    fleet = [Candidate("a"), Candidate("b"), Candidate("c", requests=1)]
    shares = Counter(place(10, 16, fleet, KV, 0, rng).instance for _ in range(400))
    assert shares["c"] == 0
    assert min(shares["a"], shares["b"]) > 150


def test_temperature_spreads() -> None:
    """A temperature lets a dearer worker have some, and the cheapest still the most."""
    rng = Random(1)
    fleet = [Candidate("a"), Candidate("b", active_blocks=10)]
    hot = PlacementSettings(temperature=1.0)
    shares = Counter(place(10, 16, fleet, hot, 0, rng).instance for _ in range(500))
    assert shares["a"] > shares["b"] > 50


def test_predicted_ttft() -> None:
    """Queue and uncached part at the measured speed, plus a step; nothing while the speed is unknown."""
    candidate = Candidate("a", device_blocks=4, prefill_blocks=10, prefill_tokens_per_s=1600.0, decode_step_ms=5.0)
    assert place(14, 16, [candidate], KV, 0, Random(0)).predicted_ttft_ms == pytest.approx(1000 * 20 * 16 / 1600 + 5)
    assert place(14, 16, [Candidate("a")], KV, 0, Random(0)).predicted_ttft_ms is None
