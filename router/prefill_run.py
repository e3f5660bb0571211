"""One prefill on one prefill worker: the sink of its outputs, and what it hands over to the decode worker.

`prefill_stage.py` makes one per attempt. Engines hand over in one of three ways, all in `kv_transfer_params` of an
output: at the end (vLLM; the prefill's token is dropped, since the decode worker generates it anew), at the end with
`first_token_counts` (the token is the answer's first), or before the end and without a token (SGLang, whose two workers
have to be at it at the same time).
"""

import asyncio
import math
import time
from typing import Any

import msgspec

from kvstore import wire
from router.errors import RouterError, WorkerFailed
from router.placer import Choice, Job
from router.sequence import Retry
from router.worker_client import next_rid

_LEASE_SHARE = 0.5
"""Of a lease, in which the hand-over may be sent on: it began before we heard of it, and the decode worker has to come
to it yet."""
DO_REMOTE_DECODE = {"do_remote_decode": True, "do_remote_prefill": False}
"""What a prefill worker is asked for."""


class PrefillFailed(Exception):
    """Nothing was handed over. The request can go on without it."""

    def __init__(self, reason: str, elsewhere: bool) -> None:
        super().__init__(reason)
        self.reason = reason
        """For metrics: `lost`, `late`, `no_params`, or the wire's error code."""
        self.elsewhere = elsewhere
        """Another prefill worker may do better."""


class PrefillRun:
    """Implements `worker_client.Sink`."""

    def __init__(self, job: Job, choice: Choice) -> None:
        self.worker = choice.worker
        self.params: dict[str, Any] | None = None
        """What goes to the decode worker, untouched."""
        self.failure: PrefillFailed | None = None
        self.outcome: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the prompt was handed over or the sequence is complete; raises `PrefillFailed` or `RouterError`."""
        self._job = job
        self._choice = choice
        self._rid = next_rid()
        self._session = self.worker.sessions
        self._ended = False
        self._output = wire.Output(self._rid, [])
        """All that came so far."""
        self._began_s = time.perf_counter()
        self._expires_s = math.inf

    def begin(self) -> None:
        """Submit it. Raises `WorkerLost`."""
        job = self._job
        request = job.sequence.request
        min_tokens = min(request.sampling.min_tokens, 1)
        self.worker.load.add(self._rid, job.hashes, self._choice.decision.reused_blocks)
        command = wire.Submit(
            rid=self._rid,
            token_ids=request.token_ids,
            sampling=msgspec.structs.replace(request.sampling, max_tokens=1, min_tokens=min_tokens),
            request_id=request.request_id,
            lora=request.lora,
            cache_salt=request.cache_salt,
            priority=request.priority,
            kv_transfer_params=DO_REMOTE_DECODE,
            trace=request.trace,
        )
        self.worker.submit(command, self)

    @property
    def held(self) -> bool:
        """The worker can still be expected to hold what it handed over."""
        return self.failure is None and self.worker.connected and self.worker.sessions == self._session

    @property
    def expired(self) -> bool:
        """The blocks may soon be others' (`lease_s` in what was handed over): a decode worker must not be sent there,
        since not every engine notices."""
        return time.perf_counter() > self._expires_s

    def leave(self, *, fetched: bool) -> None:
        """No more is wanted of the worker. Unless the blocks were `fetched`, it is told to let go of them."""
        self.worker.load.remove(self._rid)
        if not self._ended:
            self._ended = True
            self.worker.release(self._rid)
        elif not fetched and self.held:
            self.worker.withdraw(self._rid)

    # --- sink ---

    def on_lost(self, reason: str) -> None:
        self._fail(PrefillFailed("lost", elsewhere=True))

    def on_refused(self, error: wire.WireError) -> None:
        self._fail(PrefillFailed(error.code, elsewhere=error.code in wire.RETRYABLE))

    def on_failed(self, reason: str) -> None:
        self._end()
        self._resolve(WorkerFailed(reason))  # the client may have lost a part: see `Sequence.on_failed`

    def on_output(self, output: wire.Output) -> None:
        finish = output.finish_reason
        self._merge(output)
        if finish is not None:
            self._end()
        if finish == "cancelled" or finish == "error":
            code = output.error.code if output.error is not None else "engine_failure"
            self._fail(PrefillFailed(code, elsewhere=code in wire.RETRYABLE))
        elif self.outcome.done():
            self._note_start()  # of one that handed over before its end
        elif finish == "stop" or (finish == "length" and self._is_whole):
            self._deliver(finish)
            self._resolve(None)
        elif finish == "length" and self.params is None:
            self._fail(PrefillFailed("no_params", elsewhere=False))
        elif self.params is not None and (finish is not None or not (self._output.token_ids or self._is_whole)):
            self._hand_over()

    # --- what they amount to ---

    @property
    def _is_whole(self) -> bool:
        """The prefill's token is all that was asked for."""
        return self._job.sequence.request.sampling.max_tokens == 1

    def _merge(self, output: wire.Output) -> None:
        all_ = self._output
        if output.started is not None and all_.started is None:
            all_.started = output.started
            self._job.metrics.disagg.queue_s.observe(output.started.queue_ms / 1000.0)
        if output.token_ids:
            self.worker.first_token(self._rid)
            all_.token_ids += output.token_ids
        if output.logprobs is not None:
            all_.logprobs = (all_.logprobs or []) + output.logprobs
        if self.params is None and output.kv_transfer_params is not None:
            self.params = output.kv_transfer_params
            lease_s = self.params.get("lease_s")
            if isinstance(lease_s, int | float):
                self._expires_s = time.perf_counter() + lease_s * _LEASE_SHARE

    def _hand_over(self) -> None:
        self._job.metrics.disagg.prefill_s.observe(time.perf_counter() - self._began_s)
        if self.params is not None and self.params.get("first_token_counts") is True and self._output.token_ids:
            self._deliver(None)
            if self._job.sequence.exhausted:
                self._job.sequence.finish_at_length()
        self._note_start()
        self._resolve(None)

    def _note_start(self) -> None:
        if self._output.started is not None:
            self._job.sequence.start(self._output.started)

    def _deliver(self, finish: wire.FinishReason | None) -> None:
        """Give the client what came. With a finish reason it is the whole answer, and no other worker is needed."""
        sequence, whole = self._job.sequence, self._output
        if finish is not None and sequence.placed is not None:
            sequence.announce(msgspec.structs.replace(sequence.placed, instance=self.worker.instance))
        sequence.on_output(wire.Output(self._rid, whole.token_ids, finish, whole.logprobs, whole.started))

    def _fail(self, failure: PrefillFailed) -> None:
        self._end()
        self.failure = failure
        if not self.outcome.done():
            self._resolve(failure)
        elif not self._job.sequence.prefilled:  # it had handed over already, and the decode worker waits for its blocks
            error = wire.WireError("engine_failure", "the prefill worker failed before its KV blocks were there")
            self._job.sequence.fail(Retry(error, lost=True))

    def _end(self) -> None:
        self._ended = True
        self.worker.load.remove(self._rid)

    def _resolve(self, error: PrefillFailed | RouterError | None) -> None:
        if self.outcome.done():
            return
        if error is None:
            self.outcome.set_result(None)
        else:
            self.outcome.set_exception(error)
            self.outcome.exception()  # whoever left before takes no notice
