"""Blocks and scheduler under arbitrary lives of requests: nothing leaks, and the events tell the truth."""

from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_llm.engines.torch_engine import blocks as blocks_module
from dynamo_llm.engines.torch_engine.blocks import BlockManager
from dynamo_llm.engines.torch_engine.scheduler import Scheduler, Work
from dynamo_llm.engines.torch_engine.sequence import Sequence
from kvstore.cards import Removed, Stored
from kvstore.hashing import block_hashes, root_seed
from kvstore.wire import SamplingParams

SIZE = 4


def sequence(tokens: list[int], key: int = 0, **more: Any) -> Sequence:
    return Sequence(key, list(tokens), SamplingParams(), **({"max_tokens": 99} | more))


def compute(manager: BlockManager, item: Sequence) -> None:
    item.computed = len(item.tokens)
    manager.commit(item)


def check(manager: BlockManager, live: list[Sequence], resident: set[int]) -> None:
    """The manager's books agree with each other, with the sequences and with the events so far."""
    references = [0] * manager.kv_blocks
    for item in live:
        assert len(item.blocks) == len(set(item.blocks))
        assert manager.tables[item.row, : len(item.blocks)].tolist() == item.blocks
        assert len(item.blocks) * manager.block_size >= item.computed
        for block in item.blocks:
            references[block] += 1
    assert manager._references == references
    free, cached = manager._free, list(manager._cached)
    assert sorted(free + cached) == [b for b in range(manager.kv_blocks) if not references[b]]
    assert manager.used + manager.available == manager.kv_blocks
    named = {name[0]: block for block, name in enumerate(manager._name) if name}
    assert named == manager._registered
    assert manager.resident == resident
    assert not set(free) & set(named.values())


def apply(manager: BlockManager, resident: set[int]) -> None:
    """Follow the events as an index would."""
    for op in manager.take_ops():
        assert isinstance(op, Stored | Removed)
        hashes = set(op.hashes)
        assert len(hashes) == len(op.hashes)
        if isinstance(op, Removed):
            assert hashes <= resident
            resident -= hashes
        else:
            assert not hashes & resident
            assert op.parent is None or op.parent in resident
            resident |= hashes


Request = tuple[list[int], int, int, int | None]

requests = st.lists(
    st.tuples(
        st.lists(st.integers(0, 1), min_size=1, max_size=20),  # few tokens: prefixes often agree
        st.integers(1, 12),  # tokens to generate
        st.integers(0, 2),  # priority
        st.none() | st.integers(0, 12),  # step at which it is cancelled
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=120, deadline=None)
@given(requests, st.integers(8, 16), st.integers(4, 12), st.integers(1, 4), st.booleans())
def test_lives_of_requests(
    batch: list[Request], kv_blocks: int, max_batch_tokens: int, max_seqs: int, caching: bool
) -> None:
    """Every request ends or is cancelled, budgets hold in each step, and at the end all blocks are free."""
    manager = BlockManager(kv_blocks, SIZE, max_seqs=max_seqs, prefix_caching=caching)
    scheduler = Scheduler(manager, max_batch_tokens=max_batch_tokens, max_seqs=max_seqs)
    resident: set[int] = set()
    live = {}
    for key, (tokens, new, priority, _) in enumerate(batch):
        live[key] = sequence(tokens, key, priority=priority, max_tokens=len(tokens) + new)
        scheduler.add(live[key])
    for step in count():
        assert step < 2000, "no end"
        for key, (_, _, _, cancelled) in enumerate(batch):
            if cancelled == step and key in live:
                scheduler.remove(live.pop(key))
        if not live:
            break
        work = scheduler.schedule()
        assert work, "requests wait and nothing is done"
        assert sum(item.tokens for item in work) <= max_batch_tokens
        assert len({id(item.sequence) for item in work}) == len(work)
        assert len(scheduler.running) <= max_seqs
        assert scheduler.running == sorted(scheduler.running, key=lambda s: (s.priority, s.order))
        _finish_step(scheduler, work, live)
        apply(manager, resident)
        check(manager, scheduler.running, resident)
    apply(manager, resident)
    check(manager, [], resident)
    assert manager.used == 0
    assert caching or not resident


def _finish_step(scheduler: Scheduler, work: list[Work], live: dict[int, Sequence]) -> None:
    done = [item.sequence for item in work if item.completes]
    for item in work:
        assert item.tokens >= 1
        assert len(item.sequence.blocks) * SIZE >= item.sequence.computed + item.tokens
    scheduler.advance(work)
    for item in done:
        item.tokens.append(len(item.tokens) % 2)
        if len(item.tokens) >= item.max_tokens:
            scheduler.remove(live.pop(item.key))


def test_hashes_are_the_contract() -> None:
    """Stored hashes are those that a router computes from the tokens."""
    manager = BlockManager(8, SIZE, model="m")
    item = sequence([1, 2, 3, 4, 5, 6, 7, 8, 9], root=("", "salt"))
    assert manager.admit(item)
    compute(manager, item)
    import numpy as np

    expected = block_hashes(np.array(item.tokens, dtype=np.uint32), SIZE, seed=root_seed("m", "", "salt")).tolist()
    assert manager.take_ops() == [Stored(None, expected)]


def test_later_blocks_name_their_parent() -> None:
    """Blocks stored in a later step follow the one before."""
    manager = BlockManager(8, SIZE)
    item = sequence([1, 2, 3, 4, 5])
    manager.admit(item)
    compute(manager, item)
    [first] = manager.take_ops()
    for token in range(6, 10):
        item.tokens.append(token)
        assert manager.extend(item)
        compute(manager, item)
    [second] = manager.take_ops()
    assert isinstance(first, Stored)
    assert isinstance(second, Stored)
    assert second.parent == first.hashes[-1]


def test_whole_prompt_cached_leaves_a_token() -> None:
    """The last token is never taken from the cache."""
    manager = BlockManager(8, SIZE)
    for _ in range(2):
        item = sequence([1, 2, 3, 4, 5, 6, 7, 8])
        manager.admit(item)
        reused = item.computed
        compute(manager, item)
        manager.release(item)
    assert reused == 4


def test_eviction_takes_the_oldest_tail_first() -> None:
    """The prefix that was used longest ago goes first, and from its end."""
    manager = BlockManager(5, SIZE, max_seqs=4)
    first, second = sequence([1] * 8), sequence([2] * 8)
    for item in (first, second):
        manager.admit(item)
        compute(manager, item)
        manager.release(item)
    names = [name for name, _ in first.chain]
    manager.take_ops()
    manager.admit(sequence([3] * 8))
    assert manager.take_ops() == [Removed([names[1]])]
    manager.admit(sequence([4] * 4))
    assert manager.take_ops() == [Removed([names[0]])]


def test_admission_counts_revived_blocks() -> None:
    """Cached blocks that a request reuses are not also counted as free for its other tokens."""
    manager = BlockManager(3, SIZE, max_seqs=2)
    item = sequence([1] * 8)
    manager.admit(item)
    compute(manager, item)
    manager.release(item)
    assert not manager.admit(sequence([1] * 14))
    check(manager, [], manager.resident)
    assert manager.admit(sequence([1] * 12))


def test_colliding_hashes_do_not_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """With every hash equal, other tokens are never served, and only one block is announced."""
    import numpy as np

    def collide(tokens: Any, block_size: int, *, seed: int) -> Any:
        return np.full(len(tokens) // block_size, 42, dtype=np.uint64)

    monkeypatch.setattr(blocks_module, "block_hashes", collide)
    manager = BlockManager(16, SIZE, max_seqs=3)
    first, second = sequence([1] * 9), sequence([2] * 9)
    for item in (first, second):
        assert manager.admit(item)
        assert item.computed == 0
        compute(manager, item)
    assert [op for op in manager.take_ops() if isinstance(op, Stored)] == [Stored(None, [42])]
    again = sequence([1] * 9)
    manager.admit(again)
    assert again.computed == 4
    for item in (first, second, again):
        manager.release(item)
    assert manager.used == 0


def test_priority_then_arrival() -> None:
    """Waiting requests enter by priority, equal ones in order of arrival."""
    manager = BlockManager(64, SIZE, max_seqs=1)
    scheduler = Scheduler(manager, max_batch_tokens=64, max_seqs=1)
    items = [sequence([1], key, priority=priority) for key, priority in enumerate([1, 0, 1, -3, 0])]
    for item in items:
        scheduler.add(item)
    order = []
    for _ in items:
        [work] = scheduler.schedule()
        order.append(work.sequence.key)
        scheduler.remove(work.sequence)
    assert order == [3, 1, 4, 0, 2]


def test_victim_is_the_least_urgent() -> None:
    """When blocks run out, the lowest priority gives way, and of equals the latest."""
    manager = BlockManager(6, SIZE, max_seqs=4, prefix_caching=False)
    scheduler = Scheduler(manager, max_batch_tokens=64, max_seqs=4)
    early, late, low = (sequence([1] * 4, key, priority=p) for key, p in enumerate([0, 0, 5]))
    for item in (early, late, low):
        scheduler.add(item)
    victims: list[int] = []
    while len(victims) < 2:
        before = list(scheduler.running)
        work = scheduler.schedule()
        victims += [item.key for item in before if item not in scheduler.running]
        scheduler.advance(work)
        for item in work:
            item.sequence.tokens.append(1)
    assert victims == [2, 1]


@pytest.mark.parametrize("stage", ["waiting", "prefilling", "decoding", "preempted"])
def test_cancel_at_every_stage(stage: str, make: Callable[..., Any], prompts: list[list[int]]) -> None:
    """A cancelled request's next output is its last, and its blocks are free in the same step."""
    options = {"kv_blocks": 12, "max_batch_tokens": 16, "max_seqs": 2 if stage == "preempted" else 1}
    driver = make(**options)
    scheduler = driver.engine._scheduler
    other = driver.submit(prompts[4], max_tokens=100) if stage in ("waiting", "preempted") else None
    key = driver.submit(prompts[3], max_tokens=100)

    def reached() -> bool:
        [item] = [s for s in scheduler.waiting + scheduler.running if s.key == key]
        return {
            "waiting": item.row < 0 and not item.started,
            "prefilling": item.row >= 0 and 0 < item.computed < item.prompt_tokens,
            "decoding": item.output_tokens > 2,
            "preempted": item.row < 0 and item.started,
        }[stage]

    driver.step()
    while not reached():
        driver.step()
    driver.engine.cancel(key)
    driver.step()
    assert driver.finish(key) == "cancelled"
    assert driver.outputs[key][-1].token_ids == []
    if other is not None:
        driver.engine.cancel(other)
        driver.step()
    assert driver.engine.load().kv_blocks_used == 0
    assert scheduler.running == scheduler.waiting == []
    driver.engine.cancel(key)
    driver.engine.cancel(999)
    assert driver.step().outputs == []
