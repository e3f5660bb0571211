"""When a child comes back, and when it does not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_llm.lifecycle import Lifecycle, RestartPolicy

POLICY = RestartPolicy(first_delay_s=1, factor=2, max_delay_s=10, stable_after_s=30, start_attempts=3)


def _live(life: Lifecycle, ready_at_s: float | None, end_s: float) -> float | None:
    life.started()
    if ready_at_s is not None:
        life.ready(ready_at_s)
    return life.exited(end_s)


def test_delays_double_up_to_the_limit() -> None:
    """A child that keeps dying soon after it was ready waits 1, 2, 4, 8, 10, 10 seconds."""
    life = Lifecycle(POLICY)
    assert [_live(life, 0, 1) for _ in range(6)] == [1, 2, 4, 8, 10, 10]
    assert life.state == "waiting"


def test_a_stable_child_starts_over() -> None:
    """After half a minute of being ready the earlier failures are forgotten."""
    life = Lifecycle(POLICY)
    assert [_live(life, 0, 1) for _ in range(3)] == [1, 2, 4]
    assert _live(life, 100, 130) == 1
    assert _live(life, 200, 229) == 2


def test_three_failures_before_ever_being_ready_are_final() -> None:
    """A child that cannot start is given up at its third failure."""
    life = Lifecycle(POLICY)
    assert [_live(life, None, 0) for _ in range(3)] == [1, 2, None]
    assert life.state == "failed"


def test_a_child_that_refuses_is_given_up_only_before_it_was_ready() -> None:
    """Refused arguments are final at the start; the same exit later is a failure like any other."""
    life = Lifecycle(POLICY)
    life.started()
    assert life.exited(0, refused=True) is None
    assert life.state == "failed"
    life = Lifecycle(POLICY)
    _live(life, 0, 1)
    life.started()
    assert life.exited(2, refused=True) == 2


def test_a_child_that_was_ready_once_is_never_given_up() -> None:
    """Later failures at start are retried for ever: the others serve in the meantime."""
    life = Lifecycle(POLICY)
    _live(life, 0, 1)
    assert None not in [_live(life, None, 2) for _ in range(20)]


def test_restarts_in_a_row_can_be_bounded() -> None:
    """One that was ready is given up after so many; a long life in between has them forgotten."""
    life = Lifecycle(RestartPolicy(stable_after_s=30, most_restarts=2))
    short = [_live(life, 0, 1) for _ in range(2)]
    assert None not in [*short, _live(life, 0, 100), _live(life, 0, 1)]
    assert _live(life, 0, 1) is None
    assert life.state == "failed"


@pytest.mark.parametrize("ready", [False, True])
def test_an_end_that_we_asked_for_is_no_failure(ready: bool) -> None:
    """After `stopping` the end is `stopped`, whether the child had been ready or not."""
    life = Lifecycle(POLICY)
    life.started()
    if ready:
        life.ready(0)
    life.stopping()
    assert life.exited(1) is None
    assert (life.state, life.failures) == ("stopped", 0)


def test_a_late_ready_of_a_stopping_child_changes_nothing() -> None:
    """A ready line that comes after the stop does not bring the child back."""
    life = Lifecycle(POLICY)
    life.started()
    life.stopping()
    life.ready(1)
    assert life.state == "stopping"


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 1e4)), max_size=2000))
def test_delays_stay_within_their_bounds(lives: list[tuple[bool, float]]) -> None:
    """Whatever happens and however often, a delay is between the first and the longest one."""
    life = Lifecycle(POLICY)
    for ready, lasted_s in [(True, 0.0), *lives]:
        delay_s = _live(life, 0 if ready else None, lasted_s)
        assert delay_s is not None
        assert 1 <= delay_s <= 10
