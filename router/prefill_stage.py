"""The first of a disaggregated request's two stages: whether and where its prompt is computed for the decode worker.

`generation.py` makes one stage per request and prepares it for each decode worker that it chooses. Where nothing is
handed over, the decode worker computes the prompt itself. docs/disaggregation.md shows all ways through this file.
"""

import asyncio
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec

from kvstore import wire
from kvstore.errors import StoreError
from router.config import DisaggSettings, PlacementSettings
from router.disaggregation import Verdict, decide, side_of
from router.live_settings import LiveSettings
from router.placer import Choice, Fleet, Job, Placer
from router.prefill_queues import PrefillQueues
from router.prefill_run import PrefillFailed, PrefillRun
from router.sequence import Retry
from router.types import Placed
from router.worker_client import WorkerConnection, next_rid
from router.worker_session import WorkerLost


class PrefillStages:
    """Makes the stages of all requests."""

    def __init__(
        self,
        fleet: Fleet,
        placement: PlacementSettings,
        settings: LiveSettings,
        queues: PrefillQueues | None,
        rng: random.Random,
    ) -> None:
        """`queues`: where requests wait while all prefill workers are busy; None: each waits at a worker."""
        self._fleet = fleet
        self._placer = Placer(fleet, placement, rng)
        self._settings = settings
        self._queues = queues

    def stage(self, job: Job) -> "PrefillStage":
        return PrefillStage(job, self._fleet, self._placer, self._settings.current, self._queues)


class PrefillStage:
    """See the module's docstring. `close` it when the request has ended, however it did."""

    def __init__(
        self, job: Job, fleet: Fleet, placer: Placer, settings: DisaggSettings, queues: PrefillQueues | None
    ) -> None:
        self._job = job
        self._fleet = fleet
        self._placer = placer
        self._settings = settings
        self._queues = queues
        self._run: PrefillRun | None = None
        """The prefill that has handed over, or is about to."""
        self._used = False
        """A decode worker was given what it handed over."""
        self._tried: set[str] = set()
        self._local = False
        """What a prefill worker does is of no use to this request."""

    @property
    def instance(self) -> str:
        """The prefill worker; empty while the prompt is the decode worker's own."""
        return self._run.worker.instance if self._run is not None else ""

    def take(self) -> dict[str, Any] | None:
        """`kv_transfer_params` for the decode worker, which gets them now."""
        if self._run is None:
            return None
        self._used = True
        return self._run.params

    def fit(self, workers: Sequence[WorkerConnection]) -> Sequence[WorkerConnection]:
        """Of the workers that generate: those that can take what was handed over, where there are any."""
        if self._run is None:
            return workers
        return [worker for worker in workers if worker.card.role == "decode"] or workers

    async def prepare(self, decode: Choice) -> None:
        """Have the prompt computed for a worker that was chosen, where that is worth it and not done yet.

        Afterwards the sequence may be complete, and the worker may have gone. Raises `RouterError`.
        """
        takes_blocks = decode.worker.card.role == "decode"
        if self._run is not None and (reason := _why_useless(self._run, takes_blocks)):
            self._job.metrics.disagg.failed(reason)
            self._drop()
        while self._run is None and takes_blocks and not self._job.sequence.token_ids:
            prefill = self._choose()
            if not self._is_remote(decode, prefill) or prefill is None:
                return
            try:
                if self._queues is not None and self._is_busy(self._queues):
                    prefill = await self._wait_for_room(self._queues, prefill, decode)
                await self._prefill(prefill, decode)
            except PrefillFailed as failure:
                self._job.metrics.disagg.failed(failure.reason)
                self._local = not failure.elsewhere
                self._drop()

    def blames(self, retry: Retry) -> bool:
        """The decode worker's attempt failed. Whether that may be the fault of what it was handed, and not its own:
        then that is dropped, and the request can be tried as it is on any worker."""
        run = self._run
        if run is None:
            return False
        if self._job.sequence.prefilled:  # the blocks had arrived
            self._run = None
            run.leave(fetched=True)
            return False
        if run.failure is not None:
            reason = run.failure.reason
        elif (retry.told and retry.lost) or retry.error.code not in wire.RETRYABLE:
            reason, self._local = "transfer", True
        else:
            return False
        self._job.metrics.disagg.failed(reason)
        self._drop()
        retry.handover = True
        return True

    def close(self) -> None:
        """Tell the prefill worker what it need not do or keep any longer."""
        if self._run is not None:
            self._run.leave(fetched=self._used and self._job.sequence.prefilled)
            self._run = None

    def _drop(self) -> None:
        if self._run is not None:
            self._run.leave(fetched=False)
        self._run, self._used = None, False

    def _choose(self) -> Choice | None:
        """A prefill worker; None where none is left to try."""
        if self._local or len(self._tried) >= self._settings.prefill_attempts:
            return None
        fit = self._fit()
        return self._placer.choose(fit, self._job, self._job.model.prefill_turn) if fit else None

    def _fit(self) -> list[WorkerConnection]:
        workers = self._fleet.prefill_workers(self._job.model.name)
        return [worker for worker in workers if worker.ready and worker.instance not in self._tried]

    def _is_remote(self, decode: Choice, prefill: Choice | None) -> bool:
        figures, model = self._job.metrics.disagg, self._job.model
        if prefill is None and self._tried:
            figures.decided(Verdict(remote=False, reason="failed"))
            return False
        tokens = len(self._job.sequence.request.token_ids) // 4
        remote = side_of(prefill.candidate, tokens, model.block_size) if prefill is not None else None
        if remote is not None and self._queues is not None and (queue := self._queues.find(model)) is not None:
            share = queue.tokens / len(self._fit())  # of what waits for all of them
            remote = msgspec.structs.replace(remote, queued_tokens=remote.queued_tokens + share)
        verdict = decide(
            side_of(decode.candidate, tokens, model.block_size),
            remote,
            figures.transfer_tokens_per_s or self._settings.transfer_tokens_per_s,
            self._settings,
        )
        figures.decided(verdict)
        return verdict.remote

    def _is_busy(self, queues: PrefillQueues) -> bool:
        """A request has to wait for a prefill worker, and others may wait already: one of them has the next turn."""
        model, limit, workers = self._job.model, self._settings.busy_prefill_tokens, self._fit()
        if not limit or not any(worker.card.prefill_queue for worker in workers):
            return False
        queue = queues.find(model)
        if queue is not None and queue.depth:
            return True
        return all(worker.load.prefill_blocks * model.block_size >= limit for worker in workers)

    async def _wait_for_room(self, queues: PrefillQueues, prefill: Choice, decode: Choice) -> Choice:
        """The prefill worker that calls for the request. Where the queue is out of reach, the one that was chosen.

        Raises `PrefillFailed` or `RouterError`.
        """
        job, timeout_s = self._job, self._settings.prefill_timeout_s
        try:
            waiting = await (await queues.open(job.model)).draw(len(job.sequence.request.token_ids) // 4, timeout_s)
        except StoreError:
            return prefill
        job.metrics.disagg.queued += 1
        with _reserved(decode.worker, job.hashes):
            try:
                await _first_of(waiting.called, job.sequence.aborted, timeout_s)
            finally:
                waiting.leave()
        if job.sequence.aborted.done():
            raise job.sequence.aborted.result()
        if not waiting.called.done():
            raise PrefillFailed("late", elsewhere=False)
        instance = waiting.called.result()
        called = [worker for worker in self._fit() if worker.instance == instance]
        if not called:
            self._tried.add(instance)
            raise PrefillFailed("lost", elsewhere=True)
        return self._placer.choose(called, job, job.model.prefill_turn)

    async def _prefill(self, prefill: Choice, decode: Choice) -> None:
        """Until something was handed over, or the whole answer is there. Raises `PrefillFailed` or `RouterError`."""
        job = self._job
        job.model.prefill_turn += 1
        self._tried.add(prefill.worker.instance)
        run = self._run = PrefillRun(job, prefill)
        job.metrics.placed(prefill.worker.instance, prefill.decision.reason)
        with _reserved(decode.worker, job.hashes):
            try:
                run.begin()
            except WorkerLost:
                raise PrefillFailed("lost", elsewhere=True) from None
            job.sequence.announce(placed_at(decode, job, self.instance))
            await _first_of(run.outcome, job.sequence.aborted, self._settings.prefill_timeout_s)
        if job.sequence.aborted.done():
            raise job.sequence.aborted.result()
        if not run.outcome.done():
            raise PrefillFailed("late", elsewhere=True)
        run.outcome.result()


def placed_at(choice: Choice, job: Job, prefill_instance: str, reason: str = "") -> Placed:
    """A choice as it is told to the client; `reason` instead of the placement's own."""
    return Placed(
        instance=choice.worker.instance,
        prompt_blocks=len(job.hashes),
        reused_blocks=choice.decision.reused_blocks,
        reason=reason or choice.decision.reason,
        prefill_instance=prefill_instance,
    )


def _why_useless(run: PrefillRun, takes_blocks: bool) -> str:
    """Why what was handed over is of no use to a decode worker, for metrics; empty: it is."""
    if not takes_blocks:
        return "no_decode_worker"
    if not run.held:
        return "lost"
    return "expired" if run.expired else ""


async def _first_of(one: asyncio.Future[Any], other: asyncio.Future[Any], timeout_s: float) -> None:
    """Until one of them is done, or the time is up."""
    await asyncio.wait((one, other), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)


@contextmanager
def _reserved(worker: WorkerConnection, hashes: Sequence[int]) -> Iterator[None]:
    """Count a request on the worker that will decode it while its prompt is computed elsewhere, so that a burst is not
    placed there as if nothing were coming."""
    rid = next_rid()
    worker.load.add(rid, hashes, len(hashes))
    try:
        yield
    finally:
        worker.load.remove(rid)
