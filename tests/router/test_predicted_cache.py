"""The guess at what an engine without KV events holds."""

from hypothesis import given
from hypothesis import strategies as st

from router.predicted_cache import PredictedCache


def cache(capacity: int = 8, ttl_s: float = 100.0) -> PredictedCache:
    return PredictedCache(capacity, ttl_s)


def test_what_was_computed_is_there() -> None:
    """The common beginning counts, up to the first block that differs."""
    held = cache()
    held.hold([1, 2, 3], 0.0)
    assert held.match([1, 2, 9, 3], 1.0) == 2
    assert held.match([1, 2, 3, 4], 1.0) == 3
    assert held.match([9, 1], 1.0) == 0


def test_the_least_recently_used_goes_first() -> None:
    """As in the engines; of one prompt its end goes before its beginning."""
    held = cache(capacity=4)
    held.hold([1, 2, 3], 0.0)
    held.hold([7, 8], 1.0)
    assert len(held) == 4
    assert held.match([1, 2, 3], 1.0) == 2
    held.hold([1, 2], 2.0)
    held.hold([9, 10], 3.0)
    assert held.match([7, 8], 3.0) == 0
    assert held.match([1, 2], 3.0) == 2


def test_a_prompt_larger_than_the_cache() -> None:
    """Its beginning is what is left."""
    held = cache(capacity=3)
    held.hold([1, 2, 3, 4, 5], 0.0)
    assert held.match([1, 2, 3, 4, 5], 0.0) == 3


def test_what_nobody_uses_is_given_up() -> None:
    """After the time to live, counted from the last use; the memory goes with the next request."""
    held = cache(ttl_s=10.0)
    held.hold([1, 2], 0.0)
    held.hold([1], 6.0)
    assert held.match([1, 2], 11.0) == 1
    assert held.match([1, 2], 17.0) == 0
    held.hold([5], 17.0)
    assert len(held) == 1


def test_a_new_engine_holds_nothing() -> None:
    """Whatever the one before held."""
    held = cache()
    held.hold([1, 2], 0.0)
    held.clear()
    assert held.match([1, 2], 0.0) == 0


@given(st.lists(st.tuples(st.lists(st.integers(1, 12), unique=True, max_size=6), st.floats(0, 5)), max_size=30))
def test_never_more_than_its_capacity(prompts: list[tuple[list[int], float]]) -> None:
    """Whatever comes in, and the last prompt is there as far as it fits."""
    held, now_s = cache(capacity=5, ttl_s=8.0), 0.0
    for hashes, later_s in prompts:
        now_s += later_s
        held.hold(hashes, now_s)
        assert len(held) <= 5
        assert held.match(hashes, now_s) == min(len(hashes), 5)
