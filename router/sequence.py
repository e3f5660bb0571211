"""One sequence while it is generated: the sink of its worker's outputs, and all that it has got so far.

`generation.Generation` makes one per request and binds it to one worker after the other. A prefill worker hands in its
share through `prefill_run.py`. `on_output` runs once per frame and request: it is the hot path of the router.
"""

import asyncio
import time
from array import array
from collections.abc import Callable
from typing import Any

import msgspec

from kvstore import wire
from router.errors import RouterError, WorkerFailed
from router.metrics import ModelMetrics
from router.models import Model
from router.types import Delta, GenerationRequest, Placed, Result
from router.worker_client import WorkerConnection

clock = time.perf_counter


class Retry(Exception):
    """An attempt failed in a way that another worker may repair."""

    def __init__(self, error: wire.WireError, lost: bool, told: bool = False) -> None:
        super().__init__(error.message)
        self.error = error
        self.lost = lost
        """The worker (or its session) is gone, or its engine lost the request; else it refused."""
        self.told = told
        """The worker itself said so, of this request."""
        self.handover = False
        """Not the worker is at fault, but what a prefill worker had handed over."""


class Sequence:
    """See the module's docstring. Implements `worker_client.Sink`."""

    __slots__ = (
        "_first_at",
        "_last_at",
        "_logprobs",
        "_max_context",
        "_metrics",
        "_on_delta",
        "_on_placed",
        "_prompt_logprobs",
        "_queue_ms",
        "_rid",
        "_started_at",
        "_stop_reason",
        "_stream",
        "_text",
        "_worker",
        "aborted",
        "cached_tokens",
        "ended",
        "finish_reason",
        "placed",
        "prefilled",
        "request",
        "token_ids",
    )

    def __init__(
        self,
        request: GenerationRequest,
        model: Model,
        metrics: ModelMetrics,
        on_delta: Callable[[Delta], None] | None = None,
        on_placed: Callable[[Placed], None] | None = None,
    ) -> None:
        self.request = request
        self.token_ids: list[int] = []
        self.finish_reason: wire.FinishReason | None = None
        self.placed: Placed | None = None
        self.cached_tokens: int | None = None
        self.aborted: asyncio.Future[RouterError] = asyncio.get_running_loop().create_future()
        """Its result is why the sequence is to end, whatever the worker does."""
        self.ended: asyncio.Future[None] | None = None
        """Of the present attempt: a result when the sequence is complete, `Retry` or `RouterError` when it failed."""
        self.prefilled = False
        """The worker of the present attempt has given a token."""
        self._on_delta = on_delta
        self._on_placed = on_placed
        self._metrics = metrics
        self._max_context = model.max_context
        self._stream = model.tokenizer.stream(request.skip_special_tokens, request.stop, request.include_stop)
        self._text: list[str] = []
        self._logprobs: list[wire.TokenLogprob] | None = None
        self._prompt_logprobs: list[wire.TokenLogprob | None] | None = None
        self._stop_reason: str | int | None = None
        self._queue_ms = 0.0
        self._started_at = clock()
        self._first_at = 0.0
        self._last_at = 0.0
        self._worker: WorkerConnection | None = None
        self._rid = 0

    # --- attempts ---

    def begin(self, rid: int, worker: WorkerConnection, handed_over: dict[str, Any] | None = None) -> wire.Submit:
        """Bind to a worker: what is submitted is the prompt and whatever was generated before.

        `handed_over` are the `kv_transfer_params` of a prefill worker, untouched.
        """
        self._rid, self._worker, self.prefilled = rid, worker, False
        self.ended = asyncio.get_running_loop().create_future()
        request, done = self.request, len(self.token_ids)
        sampling, token_ids = request.sampling, request.token_ids
        if done:
            token_ids = token_ids + array("I", self.token_ids).tobytes()
        if done or self._prompt_logprobs is not None:
            sampling = msgspec.structs.replace(sampling, prompt_logprobs=None)  # it has had them
        return wire.Submit(
            rid=rid,
            token_ids=token_ids,
            sampling=sampling,
            generated=done,
            request_id=request.request_id,
            lora=request.lora,
            cache_salt=request.cache_salt,
            priority=request.priority,
            kv_transfer_params=handed_over,
            trace=request.trace,
        )

    def announce(self, placed: Placed) -> None:
        """It was placed; the client's side is told of what is new."""
        if placed != self.placed:
            self.placed = placed
            if self._on_placed is not None:
                self._on_placed(placed)

    def leave(self) -> None:
        """Leave the worker; what it still does for this sequence is cancelled."""
        if self._worker is not None:
            self._worker.release(self._rid)
            self._worker.load.remove(self._rid)
            self._worker = None

    def abort(self, error: RouterError) -> None:
        """End it with an error: its deadline passed, or the router is leaving."""
        if not self.aborted.done():
            self.aborted.set_result(error)
        self.fail(error)

    @property
    def exhausted(self) -> bool:
        """Nothing is left to generate: it has all tokens that it asked for, or that its context holds."""
        done = len(self.token_ids)
        prompt_tokens = len(self.request.token_ids) // 4
        return done > 0 and (done == self.request.sampling.max_tokens or prompt_tokens + done >= self._max_context)

    def finish_at_length(self) -> None:
        """Complete without a worker, when it is exhausted."""
        self._finish(self._stream.flush(), [], None, "length")

    def fail(self, error: RouterError | Retry) -> None:
        """End the present attempt, if there is one."""
        if self.ended is not None and not self.ended.done():
            self.ended.set_exception(error)

    # --- sink ---

    def on_lost(self, reason: str) -> None:
        self.fail(Retry(wire.WireError("engine_failure", reason), lost=True))

    def on_refused(self, error: wire.WireError) -> None:
        self.fail(Retry(error, lost=error.code == "no_session"))

    def on_failed(self, reason: str) -> None:
        # Never a `Retry`: what the client did not get is among the tokens that another worker would go on from.
        self.fail(WorkerFailed(reason))

    def on_output(self, output: wire.Output) -> None:
        token_ids, finish = output.token_ids, output.finish_reason
        if output.started is not None:
            self.start(output.started)
        if output.kv_transfer_params is not None:
            self._metrics.disagg.transferred(output.kv_transfer_params)
        if token_ids:
            self._count(len(token_ids))
        if finish == "cancelled" or finish == "error":
            error = output.error or wire.WireError("engine_failure", "the worker ended the request")
            # Any other code is a refusal, which an engine in a process of its own can only send in this way.
            self.fail(Retry(error, lost=error.code == "engine_failure", told=True))
            return
        stream = self._stream
        taken = stream.tokens
        # A token that ends the sequence has no text of its own: end-of-sequence, or a stop token.
        ends = finish == "stop" and not self.request.include_stop and bool(token_ids)
        text = stream.feed(token_ids[:-1] if ends else token_ids)
        logprobs = output.logprobs
        if finish is not None and stream.stopped is None:
            text += stream.flush()
            if ends and token_ids[-1] in self.request.sampling.stop_token_ids:
                self._stop_reason = token_ids[-1]
        if stream.stopped is not None:
            finish, self._stop_reason = "stop", stream.stopped
            if stream.tokens - taken < len(token_ids):
                token_ids = token_ids[: stream.tokens - taken]
                logprobs = logprobs and logprobs[: stream.tokens - taken]
        if finish is not None:
            self._finish(text, token_ids, logprobs, finish)
        else:
            self._take(text, token_ids, logprobs, None)

    def start(self, started: wire.Started) -> None:
        """Work on the prompt has begun. Only the first worker's word counts: a later one has its blocks from there."""
        if self.cached_tokens is None:
            self.cached_tokens = started.cached_tokens
            self._queue_ms = started.queue_ms
            self._prompt_logprobs = started.prompt_logprobs
            self._metrics.queue_s.observe(started.queue_ms / 1000.0)
            self._metrics.cached_prompt_tokens += started.cached_tokens

    def _count(self, tokens: int) -> None:
        now, metrics = clock(), self._metrics
        metrics.generated_tokens += tokens
        if not self.token_ids:
            self._first_at = now
            metrics.ttft_s.observe(now - self._started_at)
        else:
            metrics.itl_s.observe((now - self._last_at) / tokens, tokens)
        if not self.prefilled:
            self.prefilled = True
            if self._worker is not None:
                self._worker.first_token(self._rid)
        self._last_at = now

    def _take(
        self,
        text: str,
        token_ids: list[int],
        logprobs: list[wire.TokenLogprob] | None,
        finish: wire.FinishReason | None,
    ) -> None:
        self.token_ids += token_ids
        if text:
            self._text.append(text)
        if logprobs is not None:
            if self._logprobs is None:
                self._logprobs = []
            self._logprobs += logprobs
        if self._on_delta is not None:
            self._on_delta(Delta(text, token_ids, logprobs, finish))

    def _finish(
        self, text: str, token_ids: list[int], logprobs: list[wire.TokenLogprob] | None, finish: wire.FinishReason
    ) -> None:
        self.finish_reason = finish
        self.leave()
        self._metrics.e2e_s.observe(clock() - self._started_at)
        self._take(text, token_ids, logprobs, finish)
        if self.ended is not None and not self.ended.done():
            self.ended.set_result(None)

    def result(self) -> Result:
        """The final answer. Call it when the sequence is complete."""
        if self.finish_reason is None or self.placed is None:
            raise RuntimeError("the sequence is not complete")
        return Result(
            text="".join(self._text),
            token_ids=self.token_ids,
            logprobs=self._logprobs,
            prompt_logprobs=self._prompt_logprobs,
            finish_reason=self.finish_reason,
            stop_reason=self._stop_reason,
            prompt_tokens=len(self.request.token_ids) // 4,
            cached_tokens=self.cached_tokens or 0,
            queue_ms=self._queue_ms,
            ttft_ms=1000.0 * max(self._first_at - self._started_at, 0.0),
            placed=self.placed,
        )
