"""Leads requests through a simulated cluster, by the policies of the real router.

The steps are those of `router/generation.py` and `router/prefill_stage.py`, without what can only fail: place a worker
that decodes; where it is a `decode` worker, place a prefill worker and decide; have the prompt computed there, hand the
blocks over, decode. Policies, loads, prefix index and measured speeds are the real ones.
"""

from collections.abc import Sequence
from math import isnan
from random import Random
from typing import NamedTuple

from msgspec import Struct
from msgspec.structs import replace

from _simulator.cluster import Cluster, Worker
from _simulator.figures import Journal, Record
from _simulator.prefill_queue import QueueTiming, SimulatedPrefillQueue, Ticket
from _simulator.workload import TRACE_BLOCK
from dynamo_llm.engines.mock_engine.sequence import MockSequence
from dynamo_llm.engines.mock_engine.simulation import Ended
from dynamo_llm.engines.mock_engine.trace import TraceRequest, TraceSequence
from router.config import DisaggSettings, PlacementSettings
from router.disagg_metrics import DisaggFigures
from router.disaggregation import decide, side_of
from router.placement import Candidate, Decision, place
from router.placer import NO_MATCH, candidate_of


class Link(Struct, frozen=True, kw_only=True):
    """From prefill workers to decode workers. Each worker has one, which carries one pull after the other."""

    kv_bytes_per_token: int = 131_072
    """Llama 3.1 8B in BF16: 32 layers, 8 KV heads of 128, keys and values. The mock's default steps fit such a model
    on one GPU of the H100's kind: 16 GB of weights are read in 5.7 ms at 2.8 TB/s."""
    gb_per_s: float = 25.0
    """One NIC of 200 Gbit/s."""
    overhead_ms: float = 5.0
    """From the end of a prefill until the decode worker has the request."""

    @property
    def tokens_per_s(self) -> float:
        return self.gb_per_s * 1e9 / self.kv_bytes_per_token


class RoutingOptions(Struct, frozen=True, kw_only=True):
    placement: PlacementSettings = PlacementSettings()
    disagg: DisaggSettings = DisaggSettings()
    link: Link = Link()
    queue: QueueTiming = QueueTiming()
    first_token_counts: bool = True
    """The prefill worker's token is the answer's first, as with the torch engine. Else it is dropped, and the decode
    worker generates it anew, as with vLLM and TensorRT-LLM."""
    block_size: int = 64


class _Choice(NamedTuple):
    worker: Worker
    decision: Decision
    candidate: Candidate


class _Job:
    """A request on its way."""

    def __init__(self, key: int, request: TraceRequest, record: Record, block_size: int) -> None:
        self.key, self.request, self.record = key, request, record
        self.hashes = request.chain(block_size, TRACE_BLOCK)
        self.decode: _Choice
        self.prefill: Worker | None = None
        self.prefill_sequence: MockSequence | None = None
        self.late = False
        """It has waited in the prefill queue in vain."""


class SimulatedRouter:
    """Implements `cluster.Observer`."""

    def __init__(
        self, cluster: Cluster, requests: Sequence[TraceRequest], options: RoutingOptions, seed: int, warm_up: float
    ) -> None:
        """`requests` come by their timestamps, which ascend."""
        self.figures = DisaggFigures()
        records = [Record(r.timestamp, r.input_length, r.output_length) for r in requests]
        self.journal = Journal(records, warm_up)
        self._cluster, self._options, self._rng = cluster, options, Random(seed)
        self._jobs = [_Job(i, r, records[i], options.block_size) for i, r in enumerate(requests)]
        self._open = len(requests)
        """Requests that have not ended."""
        self._rids: dict[tuple[int, str], int] = {}
        """By job and worker: its entry in the worker's load."""
        self._last_rid = self._turn = self._prefill_turn = 0
        self._prefillers = [worker for worker in cluster.workers if worker.role == "prefill"]
        self._decoders = [worker for worker in cluster.workers if worker.role != "prefill"]
        queued = options.disagg.busy_prefill_tokens and self._prefillers
        self._queue = (
            SimulatedPrefillQueue(cluster, self._prefillers, options.queue, lambda: not self._open) if queued else None
        )
        for job in self._jobs:
            cluster.at(job.record.arrival_ms, lambda job=job: self._arrive(job))  # type: ignore[misc]

    # --- the way of a request -----------------------------------------------------------------------------------------

    def _arrive(self, job: _Job) -> None:
        job.decode = self._choose(self._decoders, job, self._turn)
        self._turn += 1
        if job.decode.worker.role == "decode":
            self._decide(job)
        else:
            self._compute(job)

    def _decide(self, job: _Job) -> None:
        """As `PrefillStage.prepare`."""
        prefill, options, tokens = None, self._options, job.record.prompt_tokens
        if self._prefillers:
            prefill = self._choose(self._prefillers, job, self._prefill_turn)
        remote = side_of(prefill.candidate, tokens, options.block_size) if prefill is not None else None
        if remote is not None and self._queue is not None:
            share = self._queue.tokens / len(self._prefillers)
            remote = replace(remote, queued_tokens=remote.queued_tokens + share)
        verdict = decide(
            side_of(job.decode.candidate, tokens, options.block_size),
            remote,
            self.figures.transfer_tokens_per_s or options.disagg.transfer_tokens_per_s,
            options.disagg,
        )
        job.record.reason = verdict.reason
        if not verdict.remote or prefill is None:
            self._compute(job)
        elif self._queue is not None and self._is_busy(self._queue):
            self._wait(job, self._queue)
        else:
            self._prefill(job, prefill)

    def _is_busy(self, queue: SimulatedPrefillQueue) -> bool:
        limit, size = self._options.disagg.busy_prefill_tokens, self._options.block_size
        return bool(queue.depth) or all(w.load.prefill_blocks * size >= limit for w in self._prefillers)

    def _wait(self, job: _Job, queue: SimulatedPrefillQueue) -> None:
        began_ms = self._cluster.now_ms

        def called(worker: Worker) -> None:
            job.record.waited_ms = self._cluster.now_ms - began_ms
            self._count_off(job, job.decode.worker)
            self._prefill(job, self._choose([worker], job, 0))

        def give_up() -> None:
            if queue.leave(ticket):
                job.record.reason = "failed"
                self._count_off(job, job.decode.worker)
                self._compute(job)

        self._count(job, job.decode.worker, len(job.hashes), accepted=False)
        ticket = Ticket(job.record.prompt_tokens, called)
        queue.draw(ticket)
        self._cluster.at(began_ms + 1e3 * self._options.disagg.prefill_timeout_s, give_up)

    def _prefill(self, job: _Job, prefill: _Choice) -> None:
        worker, request = prefill.worker, job.request
        self._prefill_turn += 1
        job.prefill, job.record.prefill_instance = worker, worker.name
        self._count(job, worker, prefill.decision.reused_blocks)
        self._count(job, job.decode.worker, len(job.hashes), accepted=False)
        sequence = TraceSequence(job.key, request.input_length, request.input_length + 1, list(job.hashes))
        sequence.keeps_blocks = request.output_length > 1
        job.prefill_sequence = sequence
        worker.instance.submit(sequence, self._cluster.now_ms)

    def _hand_over(self, job: _Job) -> None:
        """The decode worker gets the request, and will read the blocks."""
        worker, request = job.decode.worker, job.request
        self._count_off(job, worker)
        self._count(job, worker, len(job.hashes))
        known = request.input_length + self._options.first_token_counts
        end = request.input_length + request.output_length
        sequence = TraceSequence(job.key, known, end, list(job.hashes), prompt_tokens=request.input_length)
        sequence.awaits_blocks = True
        job.record.instance = worker.name
        worker.instance.submit(sequence, self._cluster.now_ms)

    def _compute(self, job: _Job) -> None:
        """Prompt and answer on one worker."""
        worker, request = job.decode.worker, job.request
        self._count(job, worker, job.decode.decision.reused_blocks)
        end = request.input_length + request.output_length
        job.record.instance = worker.name
        sequence = TraceSequence(job.key, request.input_length, end, list(job.hashes))
        worker.instance.submit(sequence, self._cluster.now_ms)

    # --- what the workers do ------------------------------------------------------------------------------------------

    def on_ended(self, worker: Worker, ended: Ended) -> None:
        run, journal = ended.run, self.journal
        journal.decoded(ended)
        for sequence in ended.joined:
            self._token(worker, sequence, ended.start_ms + run.step_ms)
        for sequence in run.first:
            job = self._jobs[sequence.key]
            job.record.cached_tokens = job.record.cached_tokens or sequence.cached_tokens
            if sequence is job.prefill_sequence:
                self._prefilled(job, worker)
            else:
                journal.give(1, ended.end_ms)
                self._token(worker, sequence, ended.end_ms)
        for sequence in run.finished:
            job = self._jobs[sequence.key]
            if sequence is not job.prefill_sequence:
                self._end(job, worker)

    def on_arriving(self, worker: Worker, sequence: MockSequence) -> None:
        job, now_ms = self._jobs[sequence.key], self._cluster.now_ms
        source = job.prefill
        if source is None or job.prefill_sequence is None:
            raise RuntimeError("blocks are awaited of nobody")
        kept, tokens = job.prefill_sequence, sequence.length - 1 - sequence.computed
        end_ms = max(now_ms, source.link_free_ms, worker.link_free_ms) + 1e3 * tokens / self._options.link.tokens_per_s
        source.link_free_ms = worker.link_free_ms = end_ms

        def arrived() -> None:
            job.record.transfer_ms, job.record.transferred_tokens = end_ms - now_ms, tokens
            self.figures.transferred({"transfer_ms": end_ms - now_ms, "transferred_tokens": tokens})
            worker.instance.arrive(sequence, self._cluster.now_ms)
            source.instance.release(kept, self._cluster.now_ms)

        self._cluster.at(end_ms, arrived)

    def on_preempted(self, worker: Worker) -> None:
        scheduler = worker.instance.scheduler
        for sequence in (*scheduler.waiting, *scheduler.prefilling):
            record = self._jobs[sequence.key].record
            if isnan(record.paused_ms) and not isnan(record.first_ms):
                record.paused_ms = self._cluster.now_ms

    def _prefilled(self, job: _Job, worker: Worker) -> None:
        now_ms = self._cluster.now_ms
        worker.load.first_token(self._rids[job.key, worker.name])
        if job.request.output_length == 1:
            self._count_off(job, job.decode.worker)
            self.journal.give(1, now_ms)
            job.record.first_ms, job.record.tokens = now_ms, 1
            self._end(job, worker)
            return
        self._count_off(job, worker)
        if self._options.first_token_counts:
            self.journal.give(1, now_ms)
            job.record.first_ms, job.record.tokens = now_ms, 1
        self._cluster.at(now_ms + self._options.link.overhead_ms, lambda: self._hand_over(job))

    def _token(self, worker: Worker, sequence: MockSequence, now_ms: float) -> None:
        """The first one that a request gets on this worker, or the first one after a preemption."""
        record = self._jobs[sequence.key].record
        record.tokens += 1
        worker.load.first_token(self._rids[sequence.key, worker.name])
        if isnan(record.first_ms):
            record.first_ms = now_ms
        else:
            before_ms = record.first_ms if isnan(record.paused_ms) else record.paused_ms
            self.journal.gap(now_ms - before_ms, now_ms)
            record.paused_ms = float("nan")

    def _end(self, job: _Job, worker: Worker) -> None:
        job.record.end_ms = self._cluster.now_ms
        self._count_off(job, worker)
        self._open -= 1

    # --- what the router knows ----------------------------------------------------------------------------------------

    def _choose(self, workers: Sequence[Worker], job: _Job, turn: int) -> _Choice:
        """As `Placer.choose`."""
        options, matches = self._options, self._cluster.index.match(job.hashes)
        candidates = [candidate_of(w.name, w.load, matches.get(w.name, NO_MATCH), job.hashes) for w in workers]
        decision = place(len(job.hashes), options.block_size, candidates, options.placement, turn, self._rng)
        position = next(i for i, worker in enumerate(workers) if worker.name == decision.instance)
        return _Choice(workers[position], decision, candidates[position])

    def _count(self, job: _Job, worker: Worker, reused_blocks: int, *, accepted: bool = True) -> None:
        """The request is on its way there; `accepted`: the worker knows it."""
        self._last_rid += 1
        self._rids[job.key, worker.name] = self._last_rid
        worker.load.add(self._last_rid, job.hashes, reused_blocks)
        if accepted:
            worker.load.accepted(self._last_rid)

    def _count_off(self, job: _Job, worker: Worker) -> None:
        worker.load.remove(self._rids.pop((job.key, worker.name)))


def simulate(
    workers: Sequence[Worker],
    requests: Sequence[TraceRequest],
    options: RoutingOptions,
    *,
    seed: int = 0,
    warm_up: float = 0.1,
) -> SimulatedRouter:
    """All requests to their ends."""
    cluster = Cluster(workers)
    router = SimulatedRouter(cluster, requests, options, seed, warm_up)
    cluster.run(router)
    return router
