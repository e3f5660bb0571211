"""Scheduler and block pool of the mock engine under arbitrary lives of requests, and vLLM's rules for single ones."""

from collections import Counter
from collections.abc import Iterable
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_llm.engines.mock_engine.blocks import BlockPool
from dynamo_llm.engines.mock_engine.scheduler import MockScheduler, Run
from dynamo_llm.engines.mock_engine.sequence import MockSequence
from dynamo_llm.engines.mock_engine.timing import Timing
from kvstore.cards import Removed, Stored

SIZE = 4


class Sequence(MockSequence):
    """Its prompt is a list of tokens; what it generates is its own."""

    def __init__(self, key: int, tokens: list[int], new: int) -> None:
        chain, parent = [], 0
        for at in range(0, len(tokens) // SIZE * SIZE, SIZE):
            parent = hash((parent, *tokens[at : at + SIZE]))
            chain.append(parent)
        super().__init__(key, len(tokens), len(tokens) + new, chain)

    def name(self, index: int, parent: int | None) -> int:
        return hash((self.key, index, "own"))


def make(
    kv_blocks: int = 64, *, tokens: int = 64, seqs: int = 8, caching: bool = True
) -> tuple[BlockPool, MockScheduler[Sequence]]:
    pool = BlockPool(kv_blocks, SIZE, prefix_caching=caching)
    return pool, MockScheduler(pool, Timing(), max_batch_tokens=tokens, max_seqs=seqs)


def run_one(scheduler: MockScheduler[Sequence], most_steps: int | None = 1) -> Run[Sequence]:
    run = scheduler.begin(most_steps)
    assert run is not None
    scheduler.end(run)
    return run


def fold(pool: BlockPool, resident: set[int]) -> None:
    """Follow the events as an index would."""
    for op in pool.take_ops():
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


def check(
    pool: BlockPool, scheduler: MockScheduler[Sequence], resident: set[int], kept: Iterable[Sequence] = ()
) -> None:
    """The pool's books agree with each other, with the sequences and with the events so far."""
    references: Counter[int] = Counter()
    own = 0
    for item in (*scheduler.prefilling, *scheduler.arriving, *scheduler.decoding, *kept):
        assert 0 <= item.named <= item.held
        references.update(item.chain[: item.named])
        own += item.held - item.named
    assert all(item.held == 0 for item in scheduler.waiting)
    assert {block: n for block, n in pool._references.items() if n} == dict(references)
    assert min(pool._references.values(), default=0) >= 0
    assert set(pool._cached) == {block for block, n in pool._references.items() if not n}
    assert pool._free >= 0
    assert pool.used == own + len(references)
    assert pool.used + pool.available == pool.kv_blocks
    assert pool.resident == resident
    running = (*scheduler.prefilling, *scheduler.arriving, *scheduler.decoding)
    assert scheduler.load().running == len(running)
    assert scheduler.load().waiting_prefill_tokens == sum(
        item.length - item.computed for item in (*scheduler.waiting, *scheduler.prefilling) if not item.awaits_blocks
    )
    assert len({*running, *scheduler.waiting}) == len(running) + len(scheduler.waiting)


Request = tuple[list[int], int, int, int | None]

requests = st.lists(
    st.tuples(
        st.lists(st.integers(0, 1), min_size=1, max_size=20),  # few tokens: prefixes often agree
        st.integers(1, 12),  # tokens to generate
        st.integers(0, 2),  # priority
        st.none() | st.integers(0, 12),  # run before which it is cancelled
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=200, deadline=None)
@given(requests, st.integers(8, 16), st.integers(4, 12), st.integers(1, 4), st.booleans(), st.booleans())
def test_lives_of_requests(
    batch: list[Request], kv_blocks: int, tokens: int, seqs: int, caching: bool, jump: bool
) -> None:
    """Every request gets all its tokens and ends once, or is cancelled; budgets hold; no block leaks."""
    pool, scheduler = make(kv_blocks, tokens=tokens, seqs=seqs, caching=caching)
    resident: set[int] = set()
    live, got = {}, Counter[int]()
    for key, (prompt, new, priority, _) in enumerate(batch):
        live[key] = Sequence(key, prompt, new)
        scheduler.add(live[key], priority)
    for number in count():
        assert number < 2000, "no end"
        for key, (_, _, _, cancelled) in enumerate(batch):
            if cancelled == number and key in live:
                scheduler.remove(live.pop(key))
                check(pool, scheduler, resident | _fold(pool, resident))
        if not live:
            break
        run = scheduler.begin(None if jump else 1)
        assert run is not None, "requests wait and nothing is done"
        assert run.steps >= 1
        assert run.prefill_tokens + run.decoding <= tokens
        assert len(scheduler.prefilling) + len(scheduler.decoding) <= seqs
        got.update({item.key: run.steps for item in scheduler.decoding})
        scheduler.end(run)
        got.update(item.key for item in run.first)
        for item in run.finished:
            assert live.pop(item.key) is item
            assert got[item.key] == batch[item.key][1]
        fold(pool, resident)
        check(pool, scheduler, resident)
    assert scheduler.begin() is None
    assert pool.used == 0
    assert caching or not resident


@settings(max_examples=200, deadline=None)
@given(requests, st.data(), st.integers(8, 16), st.integers(4, 12), st.integers(1, 4), st.booleans())
def test_lives_of_disaggregated_requests(
    batch: list[Request], data: st.DataObject, kv_blocks: int, tokens: int, seqs: int, caching: bool
) -> None:
    """Sequences that keep their blocks or await them get all their tokens too, and hold nothing at the end."""
    pool, scheduler = make(kv_blocks, tokens=tokens, seqs=seqs, caching=caching)
    resident: set[int] = set()
    live, kept, awaited, got = dict[int, Sequence](), list[Sequence](), list[Sequence](), Counter[int]()
    for key, (prompt, new, priority, _) in enumerate(batch):
        live[key] = item = Sequence(key, prompt, new)
        item.awaits_blocks, item.keeps_blocks = data.draw(st.booleans()), data.draw(st.booleans())
        scheduler.add(item, priority)
    for number in count():
        assert number < 2000, "no end"
        if kept and (number % 3 == 0 or not scheduler.decoding):
            scheduler.release(kept.pop())
        for key, (_, _, _, cancelled) in enumerate(batch):
            if cancelled == number and key in live:
                scheduler.remove(live.pop(key))
        if not live and not kept:
            break
        run = scheduler.begin()
        awaited += scheduler.take_arriving()
        assert all(item.held for item in scheduler.arriving)
        assert {*scheduler.arriving} <= {*awaited}
        if run is not None:
            assert run.prefill_tokens + run.decoding <= tokens
            got.update({item.key: run.steps for item in scheduler.decoding})
            scheduler.end(run)
            got.update(item.key for item in run.first)
            for item in run.finished:
                assert live.pop(item.key) is item
                assert got[item.key] == batch[item.key][1]
                kept += [item] if item.keeps_blocks else []
        if scheduler.arriving and (run is None or data.draw(st.booleans())):
            scheduler.arrived(next(iter(scheduler.arriving)))
        fold(pool, resident)
        check(pool, scheduler, resident, kept)
    assert scheduler.begin() is None
    assert pool.used == 0


def test_awaited_blocks() -> None:
    """A sequence whose blocks come from elsewhere enters with blocks, decodes once they are there, and is cached."""
    pool, scheduler = make()
    item = Sequence(0, [1] * 9, 3)
    item.awaits_blocks = True
    scheduler.add(item)
    assert scheduler.load().waiting_prefill_tokens == 0
    assert scheduler.begin() is None
    assert scheduler.take_arriving() == [item]
    assert (item.held, item.computed, pool.used) == (3, 0, 3)
    scheduler.arrived(item)
    runs = [run_one(scheduler) for _ in range(3)]
    assert [(run.prefill_tokens, run.decoding) for run in runs] == [(0, 1)] * 3
    assert runs[2].finished == [item]
    again = Sequence(1, [1] * 9, 3)
    again.awaits_blocks = True
    scheduler.add(again)
    scheduler.begin()
    assert again.computed == 8


def test_a_victim_computes_what_it_awaited() -> None:
    """A sequence that has to give its blocks back before they are filled computes its prompt itself."""
    pool, scheduler = make(5, caching=False)
    scheduler.add(Sequence(0, [0] * 4, 14))
    run_one(scheduler)
    item = Sequence(1, [1] * 7, 2)
    item.awaits_blocks = True
    scheduler.add(item)
    finished, prefilled = list[int](), 0
    while len(finished) < 2:
        run = run_one(scheduler)
        finished += [done.key for done in run.finished]
        prefilled += run.prefill_tokens
    assert scheduler.preemptions == 1
    assert (finished, prefilled) == ([0, 1], 7)
    assert pool.used == 0


def test_kept_blocks() -> None:
    """What a sequence keeps beyond its end is used until it is released, and cached from then on."""
    pool, scheduler = make()
    item = Sequence(0, [1] * 8, 1)
    item.keeps_blocks = True
    scheduler.add(item)
    assert run_one(scheduler).finished == [item]
    assert (pool.used, pool.cached, scheduler.load().running) == (2, 0, 0)
    scheduler.release(item)
    assert (pool.used, pool.cached) == (0, 2)


def _fold(pool: BlockPool, resident: set[int]) -> set[int]:
    fold(pool, resident)
    return resident


@pytest.mark.parametrize(("tokens", "ttft_ms"), [(512, 24.4), (2048, 49.4), (8192, 169.1), (32768, 676.6)])
def test_time_to_first_token(tokens: int, ttft_ms: float) -> None:
    """A lone prompt takes as long as in Dynamo's mock engine, in chunks of at most 8,192 tokens."""
    pool = BlockPool(1024, 64)
    scheduler: MockScheduler[Sequence] = MockScheduler(pool, Timing())
    item = Sequence(0, [], 9)
    item.length, item.max_length = tokens, tokens + 9
    scheduler.add(item)
    elapsed_ms, first = 0.0, list[Sequence]()
    while not first:
        run = scheduler.begin()
        assert run is not None
        scheduler.end(run)
        elapsed_ms, first = elapsed_ms + run.step_ms, run.first
    assert elapsed_ms == pytest.approx(ttft_ms, abs=0.1)


def test_time_of_a_decode_step() -> None:
    """It depends on the share of blocks in use, not on how many sequences decode; chunks come on top."""
    timing = Timing()
    _, scheduler = make(100, tokens=64)
    for key in range(2):
        scheduler.add(Sequence(key, [key] * 36, 9))
    assert run_one(scheduler).step_ms == timing.prefill_ms(64)
    mixed = run_one(scheduler)
    assert mixed.decoding == 1
    assert mixed.step_ms == pytest.approx(timing.prefill_ms(8) + timing.decode_ms(0.19))
    assert run_one(scheduler).step_ms == pytest.approx(5.74 + 54.01 * 0.2 - 25.74 * 0.2**2)


def test_steps_take_no_less_than_no_time() -> None:
    """Coefficients that make a step negative make it instant."""
    timing = Timing(prefill=(-5.0, 1.0, 0.0), decode=(1.0, -2.0, 0.0))
    assert [timing.prefill_ms(n) for n in (0, 1, 6)] == [0.0, 0.0, 1.0]
    assert timing.decode_ms(1.0) == 0.0


def test_decodes_come_before_chunks() -> None:
    """Prompts get what running decodes leave of the budget, in order of arrival."""
    _, scheduler = make(tokens=16)
    scheduler.add(Sequence(0, [1], 30))
    run_one(scheduler)
    for key in (1, 2):
        scheduler.add(Sequence(key, [key] * 20, 30))
    chunks = [[(item.key, tokens) for item, tokens in run_one(scheduler).chunks] for _ in range(3)]
    assert chunks == [[(1, 15)], [(1, 5), (2, 10)], [(2, 10)]]


def test_priority_then_arrival() -> None:
    """Waiting requests enter by priority, equal ones in order of arrival."""
    _, scheduler = make(seqs=1)
    for key, priority in enumerate([1, 0, 1, -3, 0]):
        scheduler.add(Sequence(key, [key], 1), priority)
    assert [run_one(scheduler).finished[0].key for _ in range(5)] == [3, 1, 4, 0, 2]


def test_victim_is_the_least_urgent() -> None:
    """When blocks run out, the lowest priority gives way, of equals the latest; all get their tokens in the end."""
    pool, scheduler = make(9, caching=False)
    for key, priority in enumerate([0, 0, 5]):
        scheduler.add(Sequence(key, [key] * 4, 14), priority)
    victims, finished = list[int](), list[int]()
    while len(finished) < 3:
        before = {*scheduler.decoding}
        run = run_one(scheduler)
        after = {*scheduler.decoding, *run.finished}
        victims += [item.key for item in before - after]
        finished += [item.key for item in run.finished]
        assert run.preempted == len(before - after)
        if run.preempted:
            assert not run.chunks, "the victim came straight back"
    assert victims == [2, 1]
    assert finished == [0, 1, 2]
    assert scheduler.preemptions == 2
    assert pool.used == 0


def test_admission_leaves_blocks_to_grow_into() -> None:
    """A request enters only when each running sequence still has a block, and those behind it wait."""
    _, scheduler = make(7)
    scheduler.add(Sequence(0, [1] * 16, 8))
    run_one(scheduler)
    scheduler.add(Sequence(1, [2] * 12, 8))
    scheduler.add(Sequence(2, [3], 8))
    run_one(scheduler)
    assert [item.key for item in reversed(scheduler.waiting)] == [1, 2]
    assert (scheduler.load().running, scheduler.load().waiting, scheduler.load().waiting_prefill_tokens) == (1, 2, 13)


def test_whole_prompt_cached_leaves_a_token() -> None:
    """The last token is never taken from the cache."""
    _, scheduler = make()
    reused = []
    for key in range(2):
        item = Sequence(key, [1] * 8, 1)
        scheduler.add(item)
        run_one(scheduler)
        reused.append(item.cached_tokens)
    assert reused == [0, 4]


def test_twins_share_from_the_step_that_computed() -> None:
    """Two sequences that compute the same blocks side by side hold them once afterwards, announced once."""
    pool, scheduler = make()
    for key in range(2):
        scheduler.add(Sequence(key, [1] * 9, 5))
    run_one(scheduler)
    assert pool.used == 4  # two shared, and each one's third
    assert [len(op.hashes) for op in pool.take_ops() if isinstance(op, Stored)] == [2]


def test_eviction_takes_the_oldest_tail_first() -> None:
    """The prefix that was used longest ago goes first, and from its end."""
    pool, scheduler = make(5)
    items = [Sequence(key, [key] * 8, 1) for key in range(2)]
    for item in items:
        scheduler.add(item)
        run_one(scheduler)
    pool.take_ops()
    for key, tokens, victim in ((3, 8, items[0].chain[1]), (4, 4, items[0].chain[0])):
        scheduler.add(Sequence(key, [key] * tokens, 1))
        run_one(scheduler)
        [removed] = [op for op in pool.take_ops() if isinstance(op, Removed)]
        assert removed == Removed([victim])


def test_quiet_steps_are_one_run() -> None:
    """A run of decodes ends with the step that fills a block or ends a sequence, and not before."""
    _, scheduler = make()
    scheduler.add(Sequence(0, [1] * 5, 6))
    assert run_one(scheduler, None).steps == 1
    assert [run_one(scheduler, None).steps for _ in range(2)] == [3, 2]
    assert scheduler.begin() is None


@pytest.mark.parametrize("stage", ["waiting", "prefilling", "decoding", "preempted"])
def test_remove_at_every_stage(stage: str) -> None:
    """A removed sequence leaves nothing behind, and the others go on to their end."""
    pool, scheduler = make(9, tokens=8, seqs=1 if stage == "waiting" else 2)
    first, second = Sequence(0, [0] * 12, 16), Sequence(1, [1] * 12, 16)
    scheduler.add(first)
    scheduler.add(second)

    def reached() -> bool:
        return {
            "waiting": second in scheduler.waiting and first in scheduler.decoding,
            "prefilling": second in scheduler.prefilling,
            "decoding": second in scheduler.decoding and scheduler.length_of(second) > 14,
            "preempted": second in scheduler.waiting and scheduler.preemptions > 0,
        }[stage]

    while not reached():
        run_one(scheduler)
    scheduler.remove(second)
    assert pool.used == first.held
    while not (run := run_one(scheduler, None)).finished:
        pass
    assert run.finished == [first]
    assert scheduler.begin() is None
    assert pool.used == 0
