"""The routing layer: hash the prompt, match it, place it, follow it to its end, and move it when its worker is lost.

The API layers call `Generation.generate` (the `types.Generator` protocol). What a sequence has got so far is in
`sequence.py`, the choice of a worker in `placement.py`, the workers themselves in `pool.py`.
"""

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from kvstore import wire
from kvstore.hashing import block_hashes, root_seed
from kvstore.index.base import Match
from kvstore.tasks import spawn, stop
from router import errors
from router.config import RouterConfig
from router.metrics import Metrics, ModelMetrics
from router.models import Model, Models
from router.placement import Candidate, Decision, place
from router.sequence import Retry
from router.sequence import Sequence as GeneratedSequence
from router.types import Delta, GenerationRequest, Placed, Result
from router.worker_client import WorkerConnection, next_rid
from router.worker_session import WorkerLost

WIRE_ERRORS: dict[str, type[errors.RouterError]] = {
    "invalid_request": errors.InvalidRequest,
    "context_length_exceeded": errors.ContextLengthExceeded,
    "overloaded": errors.Overloaded,
    "draining": errors.Unavailable,
    "engine_failure": errors.WorkerFailed,
    "no_session": errors.WorkerFailed,
}
"""What a worker's error means to the client, once no other worker is left to try."""

_NO_MATCH = Match(0, 0, 0, 0)


class Fleet(Protocol):
    """The workers, as the routing layer sees them. The implementation is `pool.Pool`."""

    def workers(self, model: str) -> Sequence[WorkerConnection]:
        """Connections of the model's instances that generate, ready or not."""

    def match(self, model: str, hashes: Sequence[int]) -> Mapping[str, Match]:
        """The instances that hold a prefix of the blocks."""

    async def wait_for_change(self, timeout_s: float) -> None:
        """Return when a worker came, went, or changed its readiness, or after the timeout."""


class Generation:
    """Serves requests, one call of `generate` each."""

    def __init__(
        self,
        models: Models,
        fleet: Fleet,
        metrics: Metrics,
        config: RouterConfig,
        rng: random.Random | None = None,
    ) -> None:
        self._models = models
        self._fleet = fleet
        self._metrics = metrics
        self._config = config
        self._rng = rng or random.Random()
        self._sequences: set[GeneratedSequence] = set()

    @property
    def inflight(self) -> int:
        """Sequences that have not had their final answer."""
        return len(self._sequences)

    def abandon(self) -> None:
        """The router's time to drain is over: what is still in flight gets its final answer now."""
        for sequence in list(self._sequences):
            sequence.abort(errors.Unavailable("the router is shutting down, try another one", retry_after_s=1.0))

    async def generate(
        self,
        request: GenerationRequest,
        on_delta: Callable[[Delta], None] | None = None,
        on_placed: Callable[[Placed], None] | None = None,
    ) -> Result:
        """See `types.Generator`."""
        model = self._models.get(request.model)
        _check_length(request, model)
        if len(self._sequences) >= self._config.max_inflight:
            raise errors.Overloaded("the router has too many requests in flight, try again later", retry_after_s=1.0)
        metrics = self._metrics.model(model.name)
        sequence = GeneratedSequence(request, model, metrics, on_delta)
        timeout_s = self._config.request_timeout_s
        timer = asyncio.get_running_loop().call_later(timeout_s, _expire, sequence) if timeout_s else None
        self._sequences.add(sequence)
        metrics.inflight += 1
        metrics.prompt_tokens += len(request.token_ids) // 4
        try:
            await self._serve(sequence, model, metrics, on_placed)
            return sequence.result()
        finally:
            self._sequences.discard(sequence)
            metrics.inflight -= 1
            if timer is not None:
                timer.cancel()

    async def _serve(
        self,
        sequence: GeneratedSequence,
        model: Model,
        metrics: ModelMetrics,
        on_placed: Callable[[Placed], None] | None,
    ) -> None:
        request = sequence.request
        seed = root_seed(model.name, request.lora, request.cache_salt)
        hashes: list[int] = block_hashes(request.token_ids, model.block_size, seed=seed).tolist()
        turn, model.turn = model.turn, model.turn + 1
        tried: set[str] = set()
        failure: Retry | None = None
        for _ in range(self._config.max_attempts):
            workers = await self._ready_workers(sequence, model, tried, failure)
            if failure is not None:
                metrics.migrated("lost" if failure.lost else failure.error.code)
            decision, worker = self._place(workers, model, hashes, turn)
            placed = Placed(
                instance=decision.instance,
                prompt_blocks=len(hashes),
                reused_blocks=decision.reused_blocks,
                reason="migration" if failure is not None and failure.lost else decision.reason,
            )
            sequence.placed = placed
            metrics.placed(placed.instance, placed.reason)
            metrics.prompt_blocks += placed.prompt_blocks
            metrics.reused_blocks += placed.reused_blocks
            try:
                await self._attempt(sequence, worker, hashes, decision, on_placed)
                return
            except Retry as retry:
                failure = retry
            if failure.error.code not in wire.RETRYABLE:
                break
            tried.add(worker.instance)
            if _complete(sequence, model):
                sequence.finish_at_length()
                return
        raise self._client_error(failure, model)

    async def _attempt(
        self,
        sequence: GeneratedSequence,
        worker: WorkerConnection,
        hashes: Sequence[int],
        decision: Decision,
        on_placed: Callable[[Placed], None] | None,
    ) -> None:
        """One worker's go at a sequence. Raises `Retry` or `RouterError`."""
        rid = next_rid()
        command = sequence.begin(rid, worker)
        worker.load.add(rid, hashes, decision.reused_blocks)
        try:
            worker.submit(command, sequence)
            if on_placed is not None and sequence.placed is not None:
                on_placed(sequence.placed)
            if sequence.ended is not None:
                await sequence.ended
        except WorkerLost as error:
            raise Retry(wire.WireError("engine_failure", str(error)), lost=True) from error
        finally:
            sequence.leave()

    async def _ready_workers(
        self, sequence: GeneratedSequence, model: Model, tried: set[str], failure: Retry | None
    ) -> list[WorkerConnection]:
        """Those that a sequence can be placed on, at least one.

        A sequence that lost its worker waits for one to come up, since its client has been promised an answer; a new
        one is told at once. Raises `RouterError`.
        """
        loop = asyncio.get_running_loop()
        lost = failure is not None and failure.lost
        give_up_at = loop.time() + (self._config.worker_wait_s if lost else 0.0)
        while True:
            if sequence.aborted.done():
                raise sequence.aborted.result()
            ready = [worker for worker in self._fleet.workers(model.name) if worker.ready]
            fresh = [worker for worker in ready if worker.instance not in tried]
            if fresh or (ready and lost):
                return fresh or ready
            left_s = give_up_at - loop.time()
            if left_s <= 0:
                raise self._client_error(failure, model)
            change = spawn("change of the fleet", self._fleet.wait_for_change(left_s))
            try:
                await asyncio.wait((change, sequence.aborted), return_when=asyncio.FIRST_COMPLETED)
            finally:
                await stop(change)

    def _place(
        self, workers: Sequence[WorkerConnection], model: Model, hashes: Sequence[int], turn: int
    ) -> tuple[Decision, WorkerConnection]:
        matches = self._fleet.match(model.name, hashes)
        candidates = [_candidate(worker, matches.get(worker.instance, _NO_MATCH), hashes) for worker in workers]
        decision = place(len(hashes), model.block_size, candidates, self._config.placement, turn=turn, rng=self._rng)
        return decision, next(worker for worker in workers if worker.instance == decision.instance)

    def _client_error(self, failure: Retry | None, model: Model) -> errors.RouterError:
        """What the client is told when no worker is left to try."""
        if failure is None:
            message = f"no worker of the model `{model.name}` takes requests at the moment"
            return errors.Unavailable(message, retry_after_s=5.0)
        kind = WIRE_ERRORS.get(failure.error.code, errors.WorkerFailed)
        retry_after_s = None
        if failure.error.code in wire.RETRYABLE:
            retry_after_s = self._retry_after_s(model)
        return kind(failure.error.message, retry_after_s=retry_after_s)

    def _retry_after_s(self, model: Model) -> float:
        """When the first worker will have worked its queue off, as far as its speed is known; 1 to 30 s."""
        times = [
            worker.load.report.waiting_prefill_tokens / worker.load.report.prefill_tokens_per_s
            for worker in self._fleet.workers(model.name)
            if worker.load.report is not None and worker.load.report.prefill_tokens_per_s > 0
        ]
        return min(max(min(times, default=1.0), 1.0), 30.0)


def _expire(sequence: GeneratedSequence) -> None:
    sequence.abort(errors.DeadlineExceeded("the request took longer than this router allows"))


def _candidate(worker: WorkerConnection, match: Match, hashes: Sequence[int]) -> Candidate:
    load = worker.load
    report = load.report
    return Candidate(
        instance=worker.instance,
        device_blocks=match.device,
        host_blocks=match.host,
        disk_blocks=match.disk,
        shared_blocks=load.shared_blocks(hashes),
        prefill_blocks=load.prefill_blocks,
        active_blocks=load.active_blocks,
        requests=load.requests,
        prefill_tokens_per_s=report.prefill_tokens_per_s if report else 0.0,
        decode_step_ms=report.decode_step_ms if report else 0.0,
    )


def _check_length(request: GenerationRequest, model: Model) -> None:
    tokens = len(request.token_ids) // 4
    if tokens == 0:
        raise errors.InvalidRequest("the prompt is empty", param="prompt")
    asked = request.sampling.max_tokens
    if tokens + (asked or 1) > model.max_context:
        wanted = f"{tokens} prompt tokens" + (f" and max_tokens {asked}" if asked else "")
        raise errors.ContextLengthExceeded(
            f"the model's context is {model.max_context} tokens, but the request has {wanted}"
        )


def _complete(sequence: GeneratedSequence, model: Model) -> bool:
    """Whether a sequence that lost its worker has nothing left to generate."""
    done, asked = len(sequence.token_ids), sequence.request.sampling.max_tokens
    if done == 0:
        return False
    return done == asked or len(sequence.request.token_ids) // 4 + done >= model.max_context
