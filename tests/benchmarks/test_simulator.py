"""The simulated cluster: no request, token, block or transfer is lost, and the same happens every time."""

from math import isnan

import pytest
from _simulator.cluster import Cluster, EngineOptions, Worker, make_workers
from _simulator.figures import Journal, Limits, Record, summary
from _simulator.prefill_queue import QueueTiming, SimulatedPrefillQueue, Ticket
from _simulator.routing import Link, RoutingOptions, SimulatedRouter, simulate
from _simulator.workload import Mix, at_rate, mixed
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_llm.engines.mock_engine.simulation import Ended
from dynamo_llm.engines.mock_engine.trace import TraceRequest
from router.config import DisaggSettings, PlacementSettings

MIX = Mix(chat_tokens=(10, 700), document_tokens=(2000, 9000), output_tokens=(1, 60))
DISAGG = (("prefill", 2), ("decode", 2))


def run(
    requests: list[TraceRequest],
    shape: tuple[tuple[str, int], ...] = DISAGG,
    engine: EngineOptions | None = None,
    **changes: object,
) -> tuple[list[Worker], SimulatedRouter]:
    workers = make_workers(shape, engine or EngineOptions())
    return workers, simulate(workers, requests, RoutingOptions(**changes))  # type: ignore[arg-type]


def check(workers: list[Worker], router: SimulatedRouter, requests: list[TraceRequest]) -> None:
    """What must hold at the end, whatever happened."""
    records = router.journal.records
    assert not any(isnan(record.end_ms) or record.first_ms > record.end_ms for record in records)
    assert all(record.arrival_ms < record.first_ms for record in records)
    assert router.journal.tokens == sum(request.output_length for request in requests)
    remote = [record for record in records if record.prefill_instance]
    for worker in workers:
        scheduler = worker.instance.scheduler
        assert scheduler.blocks.used == 0
        load = scheduler.load()
        assert (load.running, load.waiting, load.waiting_prefill_tokens) == (0, 0, 0)
        assert not worker.load._requests
        assert not worker.load._references
    assert sum(router.figures.prefills.values()) in (0, len(records))
    assert router.figures.transfer_s.total * 1e3 == pytest.approx(
        sum(record.transfer_ms for record in remote if not isnan(record.transfer_ms))
    )
    assert router.figures.transferred_tokens == sum(record.transferred_tokens for record in remote)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    rate=st.floats(1, 200),
    shape=st.sampled_from([DISAGG, (("agg", 3),), (("prefill", 1), ("decode", 1), ("agg", 1)), (("decode", 2),)]),
    kv_blocks=st.sampled_from([160, 400, 16384]),
    remote_prefill=st.sampled_from(["auto", "always", "never"]),
    busy=st.sampled_from([0, 500, 8192]),
    counts=st.booleans(),
)
def test_nothing_is_lost(
    seed: int,
    rate: float,
    shape: tuple[tuple[str, int], ...],
    kv_blocks: int,
    remote_prefill: str,
    busy: int,
    counts: bool,
) -> None:
    """Every request gets all its tokens and ends, all blocks are free, every transfer is told of, loads are empty."""
    requests = at_rate(mixed(MIX, 40, seed), rate)
    disagg = DisaggSettings(remote_prefill=remote_prefill, busy_prefill_tokens=busy)  # type: ignore[arg-type]
    engine = EngineOptions(kv_blocks=kv_blocks)
    workers, router = run(requests, shape, engine, disagg=disagg, first_token_counts=counts)
    check(workers, router, requests)


def test_equal_arguments_give_equal_figures() -> None:
    """A simulation depends on nothing but its arguments."""
    requests = at_rate(mixed(MIX, 200, 3), 60)
    one, two = (summary(run(requests)[1].journal, 4) for _ in range(2))
    assert one == two
    assert mixed(MIX, 200, 3) != mixed(MIX, 200, 4)


@pytest.mark.parametrize("counts", [True, False])
def test_a_lone_remote_prefill(counts: bool) -> None:
    """Its time is the prefill's, the handover's, the transfer's and the decode steps', and no more."""
    link = Link(kv_bytes_per_token=1000, gb_per_s=0.1, overhead_ms=7.0)
    requests = [TraceRequest(5.0, 4096, 3, tuple(range(8)))] * 2
    (prefill, _, decode, _), router = run(
        requests[:1],
        link=link,
        first_token_counts=counts,
        disagg=DisaggSettings(remote_prefill="always"),
        placement=PlacementSettings(policy="round-robin"),
    )
    (record,) = router.journal.records
    timing = prefill.instance.scheduler.timing
    tokens = 4096 if counts else 4095
    assert record.transferred_tokens == tokens
    assert record.transfer_ms == pytest.approx(1e3 * tokens / 100_000)
    prefill_ms, step_ms = timing.prefill_ms(4096), timing.decode_ms(65 / 16384 if counts else 64 / 16384)
    handed_ms = 5.0 + prefill_ms + 7.0 + record.transfer_ms
    assert record.first_ms == pytest.approx(5.0 + prefill_ms if counts else handed_ms + step_ms)
    steps_ms = 2 * step_ms if counts else step_ms + 2 * timing.decode_ms(65 / 16384)
    assert record.end_ms == pytest.approx(handed_ms + steps_ms)
    assert (record.prefill_instance, record.instance) == (prefill.name, decode.name)


def test_a_link_carries_one_pull_after_the_other() -> None:
    """Prompts that are handed over at the same time share the link of their workers."""
    link = Link(kv_bytes_per_token=1000, gb_per_s=0.1)
    requests = [TraceRequest(0.0, 1024, 2, (2 * n, 2 * n + 1)) for n in range(2)]
    shape = (("prefill", 1), ("decode", 1))
    _, router = run(requests, shape, link=link, disagg=DisaggSettings(remote_prefill="always"))
    assert [record.transfer_ms for record in router.journal.records] == pytest.approx([10.24, 20.48])


def test_blocks_stay_until_they_are_read() -> None:
    """The prefill worker's blocks are used until the transfer's end, so a pool that is full of them admits nobody."""
    link = Link(kv_bytes_per_token=1000, gb_per_s=0.01, overhead_ms=0.0)
    requests = [TraceRequest(0.0, 1024, 2, (2 * n, 2 * n + 1)) for n in range(2)]
    shape, engine = (("prefill", 1), ("decode", 1)), EngineOptions(kv_blocks=20)
    _, router = run(requests, shape, engine, link=link, disagg=DisaggSettings(remote_prefill="always"))
    first, second = router.journal.records
    assert first.transfer_ms == pytest.approx(102.4)
    assert second.first_ms - first.first_ms > 102.4


def test_what_the_decode_worker_holds_is_not_sent() -> None:
    """Of a prompt whose beginning is in the decode worker's cache only the rest is transferred."""
    blocks = tuple(range(8))
    requests = [TraceRequest(0.0, 4096, 2, blocks), TraceRequest(5000.0, 4096 + 512, 2, (*blocks, 9))]
    shape, disagg = (("prefill", 1), ("decode", 1)), DisaggSettings(remote_prefill="always")
    _, router = run(requests, shape, disagg=disagg)
    assert [record.transferred_tokens for record in router.journal.records] == [4096, 512]


def test_stalls_are_gaps() -> None:
    """A prompt that is computed in a running sequence's step makes a gap of that length."""
    arrivals = [(0.0, 64, 50), (100.0, 8000, 1), (2000.0, 10, 1)]
    requests = [
        TraceRequest(at, length, output, tuple(range(100 * n, 100 * n + 16)))
        for n, (at, length, output) in enumerate(arrivals)
    ]
    workers = make_workers((("agg", 1),), EngineOptions())
    journal = simulate(workers, requests, RoutingOptions(), warm_up=0.0).journal
    median_ms, longest_ms = journal.itl_ms(0.5, 1.0)
    timing = workers[0].instance.scheduler.timing
    assert median_ms == pytest.approx(timing.decode_ms(2 / 16384), abs=0.1)
    assert longest_ms == pytest.approx(timing.prefill_ms(8000) + timing.decode_ms(127 / 16384), abs=0.1)


def test_a_handover_is_a_gap() -> None:
    """Where the prefill worker's token is streamed, the next one comes with the first decode step."""
    requests = [TraceRequest(n * 1000.0, 4096, 3, tuple(range(8 * n, 8 * n + 8))) for n in range(2)]
    workers = make_workers((("prefill", 1), ("decode", 1)), EngineOptions())
    options = RoutingOptions(disagg=DisaggSettings(remote_prefill="always"))
    journal = simulate(workers, requests, options, warm_up=0.0).journal
    first = journal.records[0]
    step_ms = workers[0].instance.scheduler.timing.decode_ms(65 / 16384)
    assert journal.itl_ms(0.0, 1.0) == pytest.approx([step_ms, 5.0 + first.transfer_ms + step_ms])


def test_quantiles_weigh_runs_by_their_gaps() -> None:
    """One entry of a hundred gaps counts a hundred times."""
    journal = Journal([Record(0.0, 1, 1), Record(10.0, 1, 1)], 0.0)
    journal.gap(5.0, 1.0, 98)
    journal.gap(50.0, 1.0, 2)
    journal.gap(500.0, 11.0, 9)
    assert journal.itl_ms(0.5, 0.97, 0.99) == [5.0, 5.0, 50.0]


def test_limits() -> None:
    """Both have to hold."""
    limits = Limits(itl_p99_ms=50, ttft_p99_ms=1000)
    assert limits.hold({"itl_p99_ms": 50, "ttft_p99_ms": 1000})
    assert not limits.hold({"itl_p99_ms": 51, "ttft_p99_ms": 10})
    assert not limits.hold({"itl_p99_ms": 5, "ttft_p99_ms": 1001})


def test_the_queue_calls_by_room() -> None:
    """A worker claims what it has room for, with what is on its way; the rest waits for another one, or leaves."""
    workers = make_workers((("prefill", 2),), EngineOptions())
    cluster, over, called = Cluster(workers), False, list[tuple[int, str]]()
    queue = SimulatedPrefillQueue(cluster, workers[:1], QueueTiming(room_tokens=100), lambda: over)
    tickets = [Ticket(60, lambda worker, n=n: called.append((n, worker.name))) for n in range(3)]  # type: ignore[misc]
    for ticket in tickets:
        queue.draw(ticket)
    assert (queue.depth, queue.tokens) == (3, 180)
    cluster.at(30.0, lambda: called.append((9, "30 ms")))

    class Quiet:
        def on_ended(self, worker: Worker, ended: Ended) -> None: ...
        def on_arriving(self, worker: Worker, sequence: object) -> None: ...
        def on_preempted(self, worker: Worker) -> None: ...

    def end() -> None:
        nonlocal over
        over = True

    cluster.at(100.0, end)
    cluster.run(Quiet())
    assert called == [(0, "prefill-0"), (1, "prefill-0"), (9, "30 ms"), (2, "prefill-0")]
    assert not queue.leave(tickets[2])
