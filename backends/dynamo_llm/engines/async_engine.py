"""What the engines that live on asyncio share (vLLM, SGLang, TensorRT-LLM): the thread with the loop, one task per
request, one `StepResult` for all that a turn of the loop brought, cancelling, death, load figures and a bounded end.

A subclass makes its engine in its constructor (with `call`, where that must happen on the loop), sets `info`, and
implements the hooks `prepare`, `generate`, `watch` and `shut`. `engines/base.py` has the contract that is kept here.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from dynamo_llm.engines.async_speed import Pace
from dynamo_llm.engines.async_types import Delta, EngineDied, EngineLoad, check_request
from dynamo_llm.engines.base import EngineInfo, EngineRequest, RequestError, StepResult
from kvstore.cards import Cleared, KvOp
from kvstore.wire import FinishReason, Load, Output, Started, WireError

logger = logging.getLogger(__name__)
_T = TypeVar("_T")

CLOSE_TIMEOUT_S = 7.0
"""Most that `close` waits for the engine's own shutdown before it leaves it behind."""
_CANCEL_TIMEOUT_S = 1.5


class _Live:
    """A request in flight."""

    def __init__(self, request: EngineRequest, prepared: Any, submitted_s: float) -> None:
        self.request = request
        self.prepared = prepared
        self.submitted_s = submitted_s
        self.tokens = len(request.token_ids) // 4
        self.task: asyncio.Task[None] | None = None
        self.started = False
        """It has had its first output."""
        self.ended = False
        """It has had its last."""


class AsyncEngine:
    """See the module's docstring. Methods without a remark may be called from any thread."""

    info: EngineInfo

    def __init__(self, name: str, *, max_waiting: int = 1024) -> None:
        """`max_waiting`: requests without a first token beyond which more are refused with `overloaded`."""
        self._max_waiting = max_waiting
        self._on_step: Callable[[StepResult], None] = lambda step: None
        self._on_death: Callable[[str], None] = lambda reason: None
        self._lock = threading.Lock()
        """Guards what follows; never held while anything is called."""
        self._live: dict[int, _Live] = {}
        self._waiting = self._waiting_tokens = 0
        self._since_report = 0
        """Requests that came after the engine's last figures."""
        self._ops: list[KvOp] = []
        self._dead: str | None = None
        self._closing = self._started = False
        self._engine_load = EngineLoad()
        # On the loop only.
        self._tasks: set[asyncio.Task[None]] = set()
        self._outputs: list[Output] = []
        self._prefill_tokens = self._decode_tokens = 0
        self._earliest_s = float("inf")
        self._flush_due = False
        self._pace = Pace()
        self._watcher: asyncio.Task[None] | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run_loop, name=f"{name}-engine", daemon=True)
        self._thread.start()

    # --- hooks, all of them on the loop ---------------------------------------------------------------------------

    def prepare(self, request: EngineRequest) -> Any:
        """On the caller's thread: what `generate` is given beside the request. Raises `RequestError`; calls nothing
        that blocks."""
        raise NotImplementedError

    def generate(self, request: EngineRequest, prepared: Any) -> AsyncGenerator[Delta, None]:
        """The request's deltas, the last one with a finish reason. Closed or cancelled early, it aborts the request in
        the engine. Raises `RequestError` for what the engine refuses, and `EngineDied`."""
        raise NotImplementedError

    async def watch(self) -> str:
        """Returns the reason when the engine is found dead; until then it waits. Started with `start`."""
        await asyncio.Event().wait()
        return ""

    async def shut(self) -> None:
        """Stop the engine and free what it holds. Called once; may be cut off after `CLOSE_TIMEOUT_S`."""

    # --- for subclasses ----------------------------------------------------------------------------------------------

    def call(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Run a coroutine on the loop and wait for it, from the constructor's thread."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def stop_loop(self) -> None:
        """For a constructor that fails: end the thread. Nothing runs on the loop by then."""
        self._closing = True
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CANCEL_TIMEOUT_S)

    def add_ops(self, ops: Sequence[KvOp]) -> None:
        """KV operations, in the order in which they happened."""
        if not ops:
            return
        with self._lock:
            if self._closing or self._dead:
                return
            self._ops.extend(ops)
        self._wake(self._schedule_flush)

    def set_engine_load(self, load: EngineLoad) -> None:
        """The engine's newest figures; they leave with the next step."""
        with self._lock:
            self._engine_load = load
            self._since_report = 0

    def die(self, reason: str) -> None:
        """The engine is gone: every request is answered, then `on_death` is told, once."""
        self._wake(self._die, reason)

    # --- the contract of `Engine` ------------------------------------------------------------------------------------

    def start(self, on_step: Callable[[StepResult], None], on_death: Callable[[str], None]) -> None:
        if self._started:
            raise RuntimeError("the engine has been started already")
        self._started = True
        self._on_step, self._on_death = on_step, on_death
        self._wake(self._begin)

    def submit(self, request: EngineRequest) -> None:
        check_request(request, self.info)
        live = _Live(request, self.prepare(request), time.monotonic())
        with self._lock:
            if self._dead or self._closing:
                raise RequestError("engine_failure", self._dead or "the engine is closed")
            if request.key in self._live:
                raise RequestError("invalid_request", f"a request with key {request.key} is in flight")
            if self._waiting >= self._max_waiting:
                message = f"{self._max_waiting} requests wait already; try another worker or later"
                raise RequestError("overloaded", message)
            self._live[request.key] = live
            self._waiting += 1
            self._since_report += 1
            self._waiting_tokens += live.tokens
            self._loop.call_soon_threadsafe(self._spawn, live)

    def cancel(self, key: int) -> None:
        with self._lock:
            live = self._live.get(key)
        if live is not None:
            self._wake(self._cancel, live)

    def load(self) -> Load:
        with self._lock:
            said, waiting = self._engine_load, self._waiting
            if said.waiting is not None:
                waiting = min(waiting, said.waiting + self._since_report)
            return Load(
                running=len(self._live) - waiting,
                waiting=waiting,
                waiting_prefill_tokens=self._waiting_tokens,
                # An engine that has nothing to do may say nothing more, and its last figures were of work.
                kv_blocks_used=said.kv_blocks_used if self._live else 0,
                kv_blocks_cached=said.kv_blocks_cached,
                kv_blocks_total=self.info.kv_blocks,
                prefill_tokens_per_s=self._pace.prefill_tokens_per_s,
                decode_step_ms=self._pace.decode_step_ms,
            )

    def close(self) -> None:
        with self._lock:
            first, self._closing = not self._closing, True
        if not first:
            if self._thread is not threading.current_thread():
                self._thread.join(CLOSE_TIMEOUT_S + 2 * _CANCEL_TIMEOUT_S)
            return
        asyncio.run_coroutine_threadsafe(self._end(), self._loop)
        if self._thread is threading.current_thread():
            return  # `_end` follows on this very loop, and stops it
        self._thread.join(CLOSE_TIMEOUT_S + 2 * _CANCEL_TIMEOUT_S)
        if self._thread.is_alive():
            logger.warning("the engine did not stop in time and is left behind")

    # --- on the loop --------------------------------------------------------------------------------------------------

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()

    def _wake(self, function: Callable[..., object], *args: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: there is nothing left to do it for
            self._loop.call_soon_threadsafe(function, *args)

    def _begin(self) -> None:
        self._watcher = self._loop.create_task(self._watch())

    async def _watch(self) -> None:
        try:
            reason = await self.watch()
        except Exception as error:  # noqa: BLE001 - the vendor's boundary: who cannot watch the engine takes it for dead
            reason = f"{type(error).__name__}: {error}"
        self._die(reason)

    def _spawn(self, live: _Live) -> None:
        if live.ended:  # the engine died, or is closing, or the request was cancelled meanwhile
            return
        live.task = task = self._loop.create_task(self._serve(live))
        self._tasks.add(task)
        task.add_done_callback(lambda task: self._served(live, task))

    async def _serve(self, live: _Live) -> None:
        async with aclosing(self.generate(live.request, live.prepared)) as deltas:
            async for delta in deltas:
                self._emit(live, delta)
                if delta.finish_reason is not None:
                    return

    def _served(self, live: _Live, task: "asyncio.Task[None]") -> None:
        """The task is over: whatever became of it, the request has its final output afterwards."""
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if live.ended:
            return
        if isinstance(error, EngineDied):
            self._die(str(error))
        elif isinstance(error, RequestError):
            self._finish(live, "error", error.to_wire())
        else:
            if error is not None:
                logger.error("request %d failed in the engine", live.request.key, exc_info=error)
            reason = "the engine ended the request without an answer" if error is None else repr(error)
            self._finish(live, "error", WireError("engine_failure", reason))

    def _cancel(self, live: _Live) -> None:
        if not live.ended:
            self._finish(live, "cancelled")
        if live.task is not None:
            live.task.cancel()

    def _emit(self, live: _Live, delta: Delta) -> None:
        brings_tokens = bool(delta.token_ids or delta.finish_reason)
        if live.ended or not (brings_tokens or delta.kv_transfer_params):
            return
        output = Output(live.request.key, delta.token_ids, delta.finish_reason, delta.logprobs)
        output.kv_transfer_params, output.error = delta.kv_transfer_params, delta.error
        new_tokens = len(delta.token_ids)
        if brings_tokens and not live.started and delta.error is None:
            output.started = Started(delta.cached_tokens, delta.queue_ms, delta.prompt_logprobs)
            self._prefill_tokens += max(live.tokens - delta.cached_tokens, 0)
            self._earliest_s = min(self._earliest_s, live.submitted_s)
            self._leave_queue(live)
            new_tokens -= 1
        self._decode_tokens += max(new_tokens, 0)
        if delta.finish_reason is not None:
            self._forget(live)
        self._outputs.append(output)
        self._schedule_flush()

    def _finish(self, live: _Live, reason: FinishReason, error: WireError | None = None) -> None:
        self._forget(live)
        self._outputs.append(Output(live.request.key, [], reason, error=error))
        self._schedule_flush()

    def _leave_queue(self, live: _Live) -> None:
        if not live.started:
            live.started = True
            with self._lock:
                self._waiting -= 1
                self._waiting_tokens -= live.tokens

    def _forget(self, live: _Live) -> None:
        self._leave_queue(live)
        live.ended = True
        with self._lock:
            self._live.pop(live.request.key, None)

    def _schedule_flush(self) -> None:
        """All that this turn of the loop brings leaves together, in the next."""
        if not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_due = False
        outputs, self._outputs = self._outputs, []
        with self._lock:
            ops, self._ops = self._ops, []
        if not outputs and not ops:
            return
        prefill, decode = self._prefill_tokens, self._decode_tokens
        step_s = 0.0
        if prefill or decode:
            step_s = self._pace.turn(time.monotonic(), prefill, decode, self._earliest_s)
        self._prefill_tokens = self._decode_tokens = 0
        self._earliest_s = float("inf")
        step = StepResult(
            outputs=outputs, ops=ops, load=self.load(), prefill_tokens=prefill, decode_tokens=decode, step_s=step_s
        )
        try:
            self._on_step(step)
        except Exception as error:
            # The boundary to whoever takes the outputs: they are lost, and only its death answers those requests.
            logger.exception("a step could not be passed on")
            self._die(f"a step could not be passed on: {error!r}")

    # --- the end ------------------------------------------------------------------------------------------------------

    def _die(self, reason: str) -> None:
        with self._lock:
            if self._dead or self._closing:
                return
            self._dead = reason
        logger.error("the engine died: %s", reason)
        self._end_all("error", WireError("engine_failure", reason))
        self._on_death(reason)

    def _end_all(self, reason: FinishReason, error: WireError | None = None) -> None:
        with self._lock:
            lives = list(self._live.values())
            self._ops.append(Cleared())
        for live in lives:
            self._finish(live, reason, error)
            if live.task is not None:
                live.task.cancel()
        self._flush()

    async def _end(self) -> None:
        """Answer all requests, end their tasks, shut the engine, stop the loop; each within its time."""
        try:
            if not self._dead:
                self._end_all("cancelled")
            tasks = self._tasks | ({self._watcher} if self._watcher else set())
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks, timeout=_CANCEL_TIMEOUT_S)
            await asyncio.wait_for(self.shut(), CLOSE_TIMEOUT_S)
        except Exception:
            # The vendor's boundary: an engine that cannot be shut is left behind, and the caller goes on.
            logger.exception("the engine did not stop properly")
        finally:
            self._loop.stop()
