"""A worker's load as the router knows it: nothing twice, nothing left behind."""

from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvstore.wire import Load
from router.loads import WorkerLoad

BLOCK = 16


def test_own_work_counts_before_any_report() -> None:
    """What was sent counts at once: its prefill until the first token, its blocks until the end."""
    load = WorkerLoad(BLOCK)
    load.add(1, [11, 12, 13, 14], reused_blocks=1)
    assert (load.prefill_blocks, load.active_blocks, load.requests) == (3, 5, 1)
    load.first_token(1)
    assert (load.prefill_blocks, load.active_blocks, load.requests) == (0, 5, 1)
    load.remove(1)
    assert (load.prefill_blocks, load.active_blocks, load.requests) == (0, 0, 0)


def test_a_report_is_not_added_to_what_it_contains() -> None:
    """A request that the worker accepted before its report is in the report; one after it is not."""
    load = WorkerLoad(BLOCK)
    load.add(1, [1, 2, 3, 4], 0)
    load.accepted(1)
    load.on_report(Load(running=5, waiting_prefill_tokens=10 * BLOCK, kv_blocks_used=50), 0.0)
    assert (load.prefill_blocks, load.active_blocks, load.requests) == (10, 50, 5)
    load.add(2, [7, 8], 0)
    assert (load.prefill_blocks, load.active_blocks, load.requests) == (12, 53, 6)
    load.accepted(2)
    load.on_report(Load(running=6, waiting_prefill_tokens=2 * BLOCK, kv_blocks_used=52), 0.0)
    assert (load.prefill_blocks, load.active_blocks, load.requests) == (6, 52, 6)


def test_a_report_that_was_overtaken_tells_nothing() -> None:
    """A control reply may arrive after the frame of a later step: what ended in between must not come back."""
    load = WorkerLoad(BLOCK)
    load.on_report(Load(steps=8), 1.0)
    load.add(1, [1, 2], 0)
    load.accepted(1)
    load.on_report(Load(running=100, kv_blocks_used=400, steps=7), 2.0)
    assert (load.active_blocks, load.requests, load.reported_at_s) == (3, 1, 1.0)
    load.on_report(Load(running=1, kv_blocks_used=3, steps=8), 3.0)
    assert (load.active_blocks, load.requests, load.reported_at_s) == (3, 1, 3.0), "of the same step: taken"
    load.clear()
    load.on_report(Load(running=2, steps=1), 4.0)
    assert load.requests == 2, "a new session begins anew"


def test_a_prompt_below_one_block_weighs_something() -> None:
    """Else a burst of short prompts would all see the same idle worker until its next report."""
    load = WorkerLoad(BLOCK)
    load.on_report(Load(), 0.0)
    for rid in range(3):
        load.add(rid, [], 0)
    assert load.active_blocks == 3


def test_shared_prefix_counts_once() -> None:
    """Two requests with one prefix reference its blocks together."""
    load = WorkerLoad(BLOCK)
    load.add(1, [1, 2, 3], 0)
    assert load.shared_blocks([1, 2, 9, 10]) == 2
    load.add(2, [1, 2, 9, 10], 0)
    assert load.active_blocks == 5 + 2, "and one that each has for itself"
    load.remove(1)
    assert load.active_blocks == 4 + 1
    assert load.shared_blocks([1, 2, 3]) == 2


def test_a_lost_worker_has_no_load() -> None:
    """After a loss nothing of it is remembered."""
    load = WorkerLoad(BLOCK)
    load.add(1, [1, 2, 3], 0)
    load.on_report(Load(running=9, kv_blocks_used=90), 0.0)
    load.clear()
    assert (load.prefill_blocks, load.active_blocks, load.requests, load.report) == (0, 0, 0, None)


@given(
    prompts=st.lists(st.lists(st.integers(0, 3), max_size=6), max_size=8), probe=st.lists(st.integers(0, 3), max_size=6)
)
def test_shared_blocks_are_the_longest_common_prefix(prompts: list[list[int]], probe: list[int]) -> None:
    """The bisection finds what a comparison with every prompt finds."""

    def chain(tokens: list[int]) -> list[int]:
        return [hash(tuple(tokens[: n + 1])) for n in range(len(tokens))]

    load = WorkerLoad(BLOCK)
    for rid, prompt in enumerate(prompts):
        load.add(rid, chain(prompt), 0)

    def common(prompt: list[int]) -> int:
        return next(
            (n for n, (a, b) in enumerate(zip(prompt, probe, strict=False)) if a != b), min(len(prompt), len(probe))
        )

    assert load.shared_blocks(chain(probe)) == max(map(common, prompts), default=0)


class Lifecycle(RuleBasedStateMachine):
    """Requests in any order of events; the totals must follow the requests that are there."""

    def __init__(self) -> None:
        super().__init__()
        self.load = WorkerLoad(BLOCK)
        self.prefill: dict[int, int] = {}
        self.rid = 0

    @rule(blocks=st.integers(0, 9), reused=st.integers(0, 9))
    def add(self, blocks: int, reused: int) -> None:
        self.rid += 1
        self.load.add(self.rid, list(range(blocks)), reused)
        self.prefill[self.rid] = max(blocks - reused, 0)

    @rule(data=st.data())
    def accepted(self, data: st.DataObject) -> None:
        self.load.accepted(data.draw(st.integers(0, self.rid + 1)))

    @rule(data=st.data())
    def first_token(self, data: st.DataObject) -> None:
        rid = data.draw(st.integers(0, self.rid + 1))
        self.load.first_token(rid)
        if rid in self.prefill:
            self.prefill[rid] = 0

    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        rid = data.draw(st.integers(0, self.rid + 1))
        self.load.remove(rid)
        self.prefill.pop(rid, None)

    @rule()
    def report(self) -> None:
        self.load.on_report(Load(), 0.0)

    @invariant()
    def totals(self) -> None:
        assert self.load.requests == len(self.prefill)
        assert self.load.prefill_blocks == sum(self.prefill.values())
        if not self.prefill:
            assert self.load.active_blocks == 0


TestLifecycle = Lifecycle.TestCase
TestLifecycle.settings = hypothesis_settings(max_examples=50, stateful_step_count=30, deadline=None)
