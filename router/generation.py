"""The routing layer: hash the prompt, match it, place it, follow it to its end, and move it when its worker is lost.

The API layers call `Generation.generate` (the `types.Generator` protocol). What a sequence has got so far is in
`sequence.py`, the choice of a worker in `placer.py` and `placement.py`, the workers themselves in `pool.py`. Where a
prompt is computed by a prefill worker first, `prefill_stage.py` sees to that.
"""

import asyncio
import random
import time
from array import array
from collections.abc import Callable

from kvstore import wire
from kvstore.hashing import block_hashes, root_seed
from kvstore.tasks import spawn, stop
from router import errors
from router.config import RouterConfig
from router.live_settings import LiveSettings
from router.metrics import Metrics
from router.models import Model, Models
from router.placer import Choice, Fleet, Job, Placer
from router.prefill_queues import PrefillQueues
from router.prefill_stage import PrefillStage, PrefillStages, placed_at
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


class Generation:
    """Serves requests, one call of `generate` each."""

    def __init__(
        self,
        models: Models,
        fleet: Fleet,
        metrics: Metrics,
        config: RouterConfig,
        settings: LiveSettings | None = None,
        queues: PrefillQueues | None = None,
        rng: random.Random | None = None,
    ) -> None:
        """`settings`: where those of `config` can change meanwhile. `queues`: see `PrefillStages`."""
        rng = rng or random.Random()
        self._models = models
        self._fleet = fleet
        self._metrics = metrics
        self._config = config
        self._placer = Placer(fleet, config.placement, rng)
        self._stages = PrefillStages(fleet, config.placement, settings or LiveSettings(config.disagg), queues, rng)
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
        sequence = GeneratedSequence(request, model, metrics, on_delta, on_placed)
        timeout_s = self._config.request_timeout_s
        timer = asyncio.get_running_loop().call_later(timeout_s, _expire, sequence) if timeout_s else None
        self._sequences.add(sequence)
        metrics.inflight += 1
        metrics.prompt_tokens += len(request.token_ids) // 4
        try:
            seed = root_seed(model.name, request.lora, request.cache_salt)
            hashes: list[int] = block_hashes(request.token_ids, model.block_size, seed=seed).tolist()
            turn, model.turn = model.turn, model.turn + 1
            await self._serve(Job(sequence, model, metrics, hashes, turn))
            return sequence.result()
        finally:
            self._sequences.discard(sequence)
            metrics.inflight -= 1
            if timer is not None:
                timer.cancel()

    async def _serve(self, job: Job) -> None:
        """From one worker to the next until the sequence is complete. Raises `RouterError`."""
        sequence, stage = job.sequence, self._stages.stage(job)
        tried: set[str] = set()
        failure: Retry | None = None
        attempts_left = self._config.max_attempts
        try:
            while attempts_left:
                choice = await self._place(job, stage, tried, failure)
                if sequence.finish_reason is not None:
                    return  # the prefill worker's token was all of it
                placed = _account(job, choice, stage, failure)
                try:
                    await self._attempt(job, choice, stage, placed)
                    return
                except Retry as retry:
                    failure = retry
                if stage.blames(failure):
                    continue  # without what was handed over any worker may do, this one too
                if failure.error.code not in wire.RETRYABLE:
                    break
                attempts_left -= 1
                tried.add(choice.worker.instance)
                if sequence.exhausted:
                    sequence.finish_at_length()
                    return
            raise self._client_error(failure, job.model)
        finally:
            stage.close()

    async def _place(self, job: Job, stage: PrefillStage, tried: set[str], failure: Retry | None) -> Choice:
        """A worker for the sequence, whose prompt was computed elsewhere by then, where that is worth it.

        Raises `RouterError`. The sequence may be complete afterwards.
        """
        while True:
            workers = await self._ready_workers(job, tried, failure, has_begun=bool(stage.instance))
            choice = self._placer.choose(stage.fit(workers), job, job.turn)
            await stage.prepare(choice)
            if choice.worker.ready or job.sequence.finish_reason is not None:
                return choice

    async def _attempt(self, job: Job, choice: Choice, stage: PrefillStage, placed: Placed) -> None:
        """One worker's go at a sequence. Raises `Retry` or `RouterError`."""
        sequence, worker, rid = job.sequence, choice.worker, next_rid()
        handed_over = stage.take()
        command = sequence.begin(rid, worker, handed_over)
        reused_blocks = choice.decision.reused_blocks if handed_over is None else len(job.hashes)
        worker.load.add(rid, job.hashes, reused_blocks)
        try:
            worker.submit(command, sequence)
            sequence.announce(placed)
            if sequence.ended is not None:
                await sequence.ended
            if worker.predicted is not None:
                worker.predicted.hold(_all_hashes(job), time.monotonic())
        except WorkerLost as error:
            raise Retry(wire.WireError("engine_failure", str(error)), lost=True) from error
        finally:
            sequence.leave()

    async def _ready_workers(
        self, job: Job, tried: set[str], failure: Retry | None, has_begun: bool
    ) -> list[WorkerConnection]:
        """Those that a sequence can be placed on, at least one.

        One that lost its worker, or `has_begun` on a prefill worker, waits for one to come up, since its client has
        been promised an answer; a new one is told at once. Raises `RouterError`.
        """
        sequence, model = job.sequence, job.model
        loop = asyncio.get_running_loop()
        lost = failure is not None and failure.lost
        give_up_at = loop.time() + (self._config.worker_wait_s if lost or has_begun else 0.0)
        while True:
            if sequence.aborted.done():
                raise sequence.aborted.result()
            ready = [worker for worker in self._fleet.workers(model.name) if worker.ready]
            fresh = [worker for worker in ready if worker.instance not in tried]
            if fresh or (ready and lost):
                return fresh or ready
            left_s = give_up_at - loop.time()
            if ready or left_s <= 0:
                raise self._client_error(failure, model)
            change = spawn("change of the fleet", self._fleet.wait_for_change(left_s))
            try:
                await asyncio.wait((change, sequence.aborted), return_when=asyncio.FIRST_COMPLETED)
            finally:
                await stop(change)

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


def _account(job: Job, choice: Choice, stage: PrefillStage, failure: Retry | None) -> Placed:
    """Count a placement, which is a migration after a failure that was the worker's own."""
    metrics = job.metrics
    migrates = failure is not None and not failure.handover
    if failure is not None and migrates:
        metrics.migrated("lost" if failure.lost else failure.error.code)
    placed = placed_at(choice, job, stage.instance, "migration" if failure and migrates and failure.lost else "")
    metrics.placed(placed.instance, placed.reason)
    metrics.prompt_blocks += placed.prompt_blocks
    metrics.reused_blocks += placed.reused_blocks
    return placed


def _all_hashes(job: Job) -> list[int]:
    """Of the prompt and what was generated behind it, but for the last token, whose KV nobody has computed."""
    request, size = job.sequence.request, job.model.block_size
    begun = len(job.hashes) * 4 * size
    rest = request.token_ids[begun:] + array("I", job.sequence.token_ids[:-1]).tobytes()
    seed = job.hashes[-1] if job.hashes else root_seed(job.model.name, request.lora, request.cache_salt)
    more: list[int] = block_hashes(rest, size, seed=seed).tolist()
    return job.hashes + more


def _expire(sequence: GeneratedSequence) -> None:
    sequence.abort(errors.DeadlineExceeded("the request took longer than this router allows"))


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
