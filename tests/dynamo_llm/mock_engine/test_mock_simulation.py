"""The mock engine in simulated time: instances on one clock, jumps that change nothing, and Dynamo's figures."""

from collections.abc import Callable, Iterable
from math import inf
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_llm.engines.mock_engine.blocks import BlockPool
from dynamo_llm.engines.mock_engine.scheduler import MockScheduler, Run
from dynamo_llm.engines.mock_engine.sequence import MockSequence
from dynamo_llm.engines.mock_engine.simulation import Ended, SimulatedInstance
from dynamo_llm.engines.mock_engine.timing import Timing
from dynamo_llm.engines.mock_engine.trace import TraceRequest, read_trace
from kvstore.cards import KvOp

TRACE = Path(__file__).parents[4] / "shared" / "traces" / "conversation_trace.jsonl"


class OneByOne(MockScheduler[MockSequence]):
    """Never jumps."""

    def begin(self, most_steps: int | None = None) -> Run[MockSequence] | None:
        return super().begin(1)


def drive(
    instances: list[SimulatedInstance],
    arrivals: Iterable[tuple[float, int, MockSequence]],
    on_end: Callable[[int, Ended], None],
) -> None:
    """Deliver (time, instance, sequence), ordered by time, and let the instances run to their end."""

    def run_until(now_ms: float) -> None:
        while True:
            which = min(range(len(instances)), key=lambda i: instances[i].next_ms)
            if instances[which].next_ms >= now_ms:
                return
            ended = instances[which].advance()
            if ended is not None:
                on_end(which, ended)

    for now_ms, which, sequence in arrivals:
        run_until(now_ms)
        instances[which].submit(sequence, now_ms)
    run_until(inf)


class Life(NamedTuple):
    first_ms: dict[int, float]
    end_ms: dict[int, float]
    decode_ms: float
    ops: list[KvOp]


def live(scheduler: MockScheduler[MockSequence], arrivals: list[tuple[float, TraceRequest]]) -> Life:
    life = Life({}, {}, 0.0, [])
    total = 0.0

    def on_end(which: int, ended: Ended) -> None:
        nonlocal total
        run = ended.run
        assert ended.end_ms == pytest.approx(ended.start_ms + run.steps * run.step_ms)
        total += run.steps * run.step_ms * run.decoding
        for sequence in run.first:
            life.first_ms.setdefault(sequence.key, ended.end_ms)
        for sequence in run.finished:
            assert sequence.key not in life.end_ms
            life.end_ms[sequence.key] = ended.end_ms
        life.ops.extend(scheduler.blocks.take_ops())

    sequences = ((at, 0, request.sequence(key, 4, 8)) for key, (at, request) in enumerate(arrivals))
    drive([SimulatedInstance(scheduler)], sequences, on_end)
    return life._replace(decode_ms=total)


arrivals = st.lists(
    st.tuples(
        st.floats(0, 300),  # pause before it
        st.integers(1, 40),  # input
        st.integers(1, 40),  # output
        st.integers(0, 2),  # whose prompt it begins with
    ),
    min_size=1,
    max_size=10,
)


@settings(max_examples=150, deadline=None)
@given(arrivals, st.integers(21, 40), st.integers(4, 32))
def test_jumps_change_nothing(drawn: list[tuple[float, int, int, int]], kv_blocks: int, tokens: int) -> None:
    """Runs of quiet steps give the same times and the same block events in the same order as single steps."""
    requests, now_ms = [], 0.0
    for pause_ms, length, output, family in drawn:
        now_ms += pause_ms
        blocks = tuple(family * 100 + i for i in range(-(-length // 8)))
        requests.append((now_ms, TraceRequest(now_ms, length, output, blocks)))
    lives = [
        live(kind(BlockPool(kv_blocks, 4), Timing(), max_batch_tokens=tokens, max_seqs=4), requests)
        for kind in (MockScheduler, OneByOne)
    ]
    jumping, walking = lives
    assert jumping.ops == walking.ops
    assert jumping.first_ms == pytest.approx(walking.first_ms)
    assert jumping.end_ms == pytest.approx(walking.end_ms)
    assert jumping.decode_ms == pytest.approx(walking.decode_ms)
    assert set(jumping.end_ms) == set(range(len(requests)))


def sequence(key: int, tokens: int, output: int) -> MockSequence:
    return TraceRequest(0, tokens, output, tuple(range(key * 100, key * 100 + 20))).sequence(key, 4, 8)


def instance() -> SimulatedInstance:
    return SimulatedInstance(MockScheduler(BlockPool(256, 4), Timing()))


def test_simultaneous_arrivals_share_a_step() -> None:
    """What is delivered at one instant is in the batch of the step that begins at it."""
    simulated = instance()
    for key in range(3):
        simulated.submit(sequence(key, 10, 1), 5.0)
    assert simulated.next_ms == 5.0
    assert simulated.advance() is None
    ended = simulated.advance()
    assert ended is not None
    assert [item.key for item in ended.run.finished] == [0, 1, 2]
    assert ended.end_ms == pytest.approx(5.0 + Timing().prefill_ms(30))
    assert simulated.next_ms == inf


def test_an_arrival_joins_the_next_step() -> None:
    """A long run is cut at the end of the step that is on, not at its beginning and not later."""
    simulated = instance()
    simulated.submit(sequence(0, 4, 100), 0.0)
    simulated.advance()
    first = simulated.advance()
    assert first is not None
    step_ms = 5.74 + 54.01 * (2 / 256) - 25.74 * (2 / 256) ** 2
    simulated.submit(sequence(1, 4, 1), first.end_ms + 1.5 * step_ms)
    assert simulated.next_ms == pytest.approx(first.end_ms + 2 * step_ms)


def test_cancel_takes_effect_after_the_step() -> None:
    """A cancelled sequence is gone when the step that is on ends; one that ends with it has ended."""
    simulated = instance()
    items = [sequence(0, 4, 2), sequence(1, 4, 50)]
    for item in items:
        simulated.submit(item, 0.0)
    simulated.advance()
    simulated.advance()
    for item in (*items, *items):
        simulated.cancel(item, simulated.next_ms)
    ended = simulated.advance()
    assert ended is not None
    assert ended.run.finished == [items[0]]
    assert simulated.next_ms == inf
    assert simulated.scheduler.blocks.used == 0


def test_instant_steps_come_to_an_end() -> None:
    """A timing of zeros lets no time pass, and divides by none."""
    zero = Timing(prefill=(0.0, 0.0, 0.0), decode=(0.0, 0.0, 0.0))
    simulated = SimulatedInstance(MockScheduler(BlockPool(256, 4), zero))
    ended: list[Ended] = []
    drive([simulated], [(1.0, 0, sequence(key, 4, 9)) for key in range(3)], lambda _, end: ended.append(end))
    assert sorted(item.key for end in ended for item in end.run.finished) == [0, 1, 2]
    assert {end.end_ms for end in ended} == {1.0}


def test_trace_blocks_that_do_not_fit_are_refused() -> None:
    """Other names would stand for other prefixes."""
    request = TraceRequest(timestamp=0, input_length=512, output_length=1, hash_ids=(1,))
    with pytest.raises(ValueError, match="blocks of 48 tokens do not divide"):
        request.chain(48)


def test_trace_blocks_are_split() -> None:
    """Equal ids give equal names, only whole blocks have one, and output blocks belong to their request."""
    request = TraceRequest(0, 1100, 10, (7, 9, 4))
    chain = request.chain(64)
    assert len(chain) == 17
    assert chain[:8] == TraceRequest(0, 512, 1, (7,)).chain(64)
    assert len(set(chain)) == 17
    assert request.chain(512) == [7, 9]
    names = {request.sequence(key, 64).name(index, None) for key in range(3) for index in range(17, 20)}
    assert len(names) == 9
    assert min(names) >= 1 << 63


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2"),
        ('{"timestamp": 0, "input_length": 0, "output_length": 1, "hash_ids": []}', "line 2.*input_length"),
        ('{"timestamp": 0, "input_length": 513, "output_length": 1, "hash_ids": [1]}', "line 2.*hash_ids"),
        ('{"input_length": 5, "output_length": 1, "hash_ids": [1]}', "line 2.*timestamp"),
    ],
)
def test_wrong_traces(tmp_path: Path, line: str, words: str) -> None:
    """What is no trace is an error of one line that says where."""
    good = '{"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": [1], "more": 1}'
    path = tmp_path / "trace.jsonl"
    path.write_text(f"{good}\n{line}\n")
    with pytest.raises(ValueError, match=words) as raised:
        list(read_trace(path))
    assert "\n" not in str(raised.value)


@pytest.mark.skipif(not TRACE.exists(), reason="the trace is not part of the project")
@pytest.mark.parametrize(
    ("arrival_speed_up", "ttft_ms", "p99_ttft_ms", "itl_ms", "e2e_ms"),
    [(1, 321.1, 2048, 7.59, 2913), (2, 346.8, 2147, 10.29, 3861), (3, 392.2, 2406, 15.34, 5631)],
)
def test_figures_of_dynamo(
    arrival_speed_up: int, ttft_ms: float, p99_ttft_ms: float, itl_ms: float, e2e_ms: float
) -> None:
    """A conversation trace, dealt in turns to 8 instances, takes as long as in Dynamo's own replay, within 3 %."""
    trace = list(read_trace(TRACE))
    instances = [SimulatedInstance(MockScheduler(BlockPool(16384, 64), Timing())) for _ in range(8)]
    arrived = {key: request.timestamp / arrival_speed_up for key, request in enumerate(trace)}
    ttfts, e2es = [], []
    decode_ms, decoded, cached = 0.0, 0, 0

    def on_end(which: int, ended: Ended) -> None:
        nonlocal decode_ms, decoded, cached
        run = ended.run
        decode_ms += run.steps * run.step_ms * run.decoding
        decoded += run.steps * run.decoding
        for item in run.first:
            ttfts.append(ended.end_ms - arrived[item.key])
            cached += item.cached_tokens
        e2es.extend(ended.end_ms - arrived[item.key] for item in run.finished)
        instances[which].scheduler.blocks.take_ops()

    drive(instances, ((arrived[key], key % 8, item.sequence(key, 64)) for key, item in enumerate(trace)), on_end)
    assert len(ttfts) == len(e2es) == len(trace)
    figures = {
        "reuse": cached / sum(request.input_length for request in trace),
        "ttft_ms": sum(ttfts) / len(ttfts),
        "p99_ttft_ms": sorted(ttfts)[int(0.99 * len(ttfts))],
        "itl_ms": decode_ms / decoded,
        "e2e_ms": sum(e2es) / len(e2es),
    }
    print(arrival_speed_up, figures)
    expected = {"reuse": 0.082, "ttft_ms": ttft_ms, "p99_ttft_ms": p99_ttft_ms, "itl_ms": itl_ms, "e2e_ms": e2e_ms}
    assert figures == pytest.approx(expected, rel=0.03)
