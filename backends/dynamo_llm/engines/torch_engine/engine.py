"""The engine: one thread that steps while there is work. See `engines/base.py` for the contract it keeps."""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import torch

from dynamo_llm.engines.base import EngineInfo, EngineRequest, RequestError, StepResult
from dynamo_llm.engines.torch_engine.blocks import BlockManager
from dynamo_llm.engines.torch_engine.config import TorchConfig
from dynamo_llm.engines.torch_engine.request import make_sequence
from dynamo_llm.engines.torch_engine.runner import Runner
from dynamo_llm.engines.torch_engine.scheduler import Scheduler, Work
from dynamo_llm.engines.torch_engine.sequence import Sequence
from dynamo_llm.engines.torch_engine.speed import Speed
from kvstore.cards import Cleared
from kvstore.wire import FinishReason, Load, Output, Started, TokenLogprob, WireError

logger = logging.getLogger(__name__)


class TorchEngine:
    """See `engines.base.Engine`. The constructor loads the model; `start` begins to serve."""

    def __init__(self, folder: Path, model: str, options: dict[str, Any]) -> None:
        """Raises `EngineError` for options, folders and models that cannot be served."""
        config = TorchConfig.from_options(options)
        # On a thread that ends: OpenMP counts the idle helpers of every thread that ever computed, and with more of
        # them than cores it sleeps between pieces of work, which would make a step up to three times as long.
        with ThreadPoolExecutor(1) as loader:
            self._runner = runner = loader.submit(Runner, folder, config).result()
        self.info = EngineInfo(
            name="torch",
            version=str(torch.__version__),
            model=model,
            block_size=config.block_size,
            kv_blocks=runner.kv_blocks,
            max_context=runner.max_context,
            vocab_size=runner.model_config.vocab_size,
            eos_token_ids=runner.model_config.eos_token_ids,
        )
        blocks = BlockManager(
            runner.kv_blocks,
            config.block_size,
            model=model,
            max_seqs=config.max_seqs,
            max_context=runner.max_context,
            prefix_caching=config.prefix_caching,
        )
        self._scheduler = Scheduler(blocks, max_batch_tokens=config.max_batch_tokens, max_seqs=config.max_seqs)
        self._max_waiting = config.max_waiting
        self._speed = Speed()
        self._sequences: dict[int, Sequence] = {}
        """By key; engine thread only."""
        self._outputs: list[Output] = []
        """Of this step so far; kept here so that a step which breaks loses none. Engine thread only."""
        self._thread: threading.Thread | None = None

        self._wake = threading.Condition()
        """Guards what follows: callers write it, the engine's thread takes it at the start of a step."""
        self._commands: list[Sequence | int] = []
        """Sequences to add and keys to cancel, in the order in which they came."""
        self._queued = self._queued_tokens = 0
        """Sequences among the commands, and the tokens of their prompts; taken off when the next load counts them."""
        self._taken = 0, 0
        self._keys: set[int] = set()
        self._closing = False
        self._dead: str | None = None
        self._load = self._measure()

    # --- any thread ---------------------------------------------------------------------------------------------------

    def start(self, on_step: Callable[[StepResult], None], on_death: Callable[[str], None]) -> None:
        if self._thread is not None:
            raise RuntimeError("the engine has been started already")
        self._thread = threading.Thread(target=self._serve, args=(on_step, on_death), name="torch-engine", daemon=True)
        self._thread.start()

    def submit(self, request: EngineRequest) -> None:
        sequence = make_sequence(request, self.info, time.monotonic())
        with self._wake:
            if self._dead or self._closing:
                raise RequestError("engine_failure", self._dead or "the engine is closed")
            if request.key in self._keys:
                raise RequestError("invalid_request", f"a request with key {request.key} is in flight")
            if self._load.waiting + self._queued >= self._max_waiting:
                raise RequestError(
                    "overloaded", f"{self._max_waiting} requests wait already; try another worker or later"
                )
            self._keys.add(request.key)
            self._commands.append(sequence)
            self._queued += 1
            self._queued_tokens += sequence.prompt_tokens
            self._wake.notify()

    def cancel(self, key: int) -> None:
        with self._wake:
            if key in self._keys:
                self._commands.append(key)
                self._wake.notify()

    def load(self) -> Load:
        with self._wake:
            if not self._queued:
                return self._load
            return msgspec.structs.replace(
                self._load,
                waiting=self._load.waiting + self._queued,
                waiting_prefill_tokens=self._load.waiting_prefill_tokens + self._queued_tokens,
            )

    def close(self) -> None:
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self._runner.free()

    # --- the engine's thread ------------------------------------------------------------------------------------------

    def _serve(self, on_step: Callable[[StepResult], None], on_death: Callable[[str], None]) -> None:
        try:
            self._runner.prepare_thread()
            while self._wait_for_work():
                on_step(self.step())
            on_step(self._end_all("cancelled"))
        except Exception as error:
            # The engine's boundary: whatever broke a step, every request gets its answer and the worker learns why.
            logger.exception("the engine's step failed")
            self._die(f"{type(error).__name__}: {error}", on_step, on_death)

    def step(self) -> StepResult:
        """Schedule, run, sample, finish."""
        started_s = time.monotonic()
        self._take_commands()
        work = self._scheduler.schedule()
        self._note_start(work, started_s)
        sampled = self._runner.run(work, self._scheduler.blocks.tables) if work else []
        self._scheduler.advance(work)
        for token in sampled:
            self._outputs.append(self._append(*token))
        return self._result(work, started_s)

    def _wait_for_work(self) -> bool:
        """False when the engine is to close."""
        with self._wake:
            while not (self._closing or self._commands or self._sequences):
                self._wake.wait()
            return not self._closing

    def _take_commands(self) -> None:
        """Let new sequences in and end the cancelled ones."""
        with self._wake:
            commands, self._commands = self._commands, []
            self._taken = self._queued, self._queued_tokens
        for command in commands:
            if isinstance(command, Sequence):
                self._sequences[command.key] = command
                self._scheduler.add(command)
            elif command in self._sequences:
                self._forget(self._sequences[command])
                self._outputs.append(Output(command, [], "cancelled"))

    def _take_outputs(self) -> list[Output]:
        outputs, self._outputs = self._outputs, []
        return outputs

    def _forget(self, sequence: Sequence) -> None:
        self._scheduler.remove(sequence)
        del self._sequences[sequence.key]

    @staticmethod
    def _note_start(work: list[Work], now_s: float) -> None:
        for item in work:
            sequence = item.sequence
            if sequence.first_step_s is None:
                sequence.first_step_s = now_s
                sequence.cached_tokens = sequence.computed

    def _append(self, sequence: Sequence, token: int, logprob: TokenLogprob | None) -> Output:
        """Give a sequence its next token; frees it when that was the last."""
        sequence.tokens.append(token)
        output = Output(sequence.key, [token], logprobs=None if logprob is None else [logprob])
        if not sequence.started:
            queue_s = (sequence.first_step_s or sequence.submitted_s) - sequence.submitted_s
            output.started = Started(sequence.cached_tokens, queue_s * 1e3, sequence.prompt_logprobs)
            sequence.started, sequence.prompt_logprobs = True, None
        if token in sequence.stop_ids:
            output.finish_reason = "stop"
        elif len(sequence.tokens) >= sequence.max_tokens:
            output.finish_reason = "length"
        if output.finish_reason:
            self._forget(sequence)
        return output

    def _result(self, work: list[Work], started_s: float) -> StepResult:
        step_s = time.monotonic() - started_s
        decode_tokens = sum(item.sequence.started and item.tokens == 1 for item in work)
        prefill_tokens = sum(item.tokens for item in work) - decode_tokens
        self._speed.note(prefill_tokens, decode_tokens, step_s)
        outputs = self._take_outputs()
        return StepResult(
            outputs=outputs,
            ops=self._scheduler.blocks.take_ops(),
            load=self._publish(outputs),
            prefill_tokens=prefill_tokens,
            decode_tokens=decode_tokens,
            step_s=step_s,
        )

    def _publish(self, outputs: list[Output]) -> Load:
        load = self._measure()
        with self._wake:
            self._keys.difference_update(output.rid for output in outputs if output.finish_reason)
            self._queued -= self._taken[0]
            self._queued_tokens -= self._taken[1]
            self._taken = 0, 0
            self._load = load
        return load

    def _measure(self) -> Load:
        scheduler = self._scheduler
        unfinished = (*scheduler.waiting, *scheduler.running)
        return Load(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            waiting_prefill_tokens=sum(max(s.prompt_tokens - s.computed, 0) for s in unfinished),
            kv_blocks_used=scheduler.blocks.used,
            kv_blocks_cached=scheduler.blocks.cached,
            kv_blocks_total=scheduler.blocks.kv_blocks,
            prefill_tokens_per_s=self._speed.prefill_tokens_per_s,
            decode_step_ms=self._speed.decode_step_ms,
        )

    # --- the end ------------------------------------------------------------------------------------------------------

    def _end_all(self, reason: FinishReason, error: WireError | None = None) -> StepResult:
        """Last outputs of everything in flight, queued commands included; all blocks are free afterwards."""
        self._take_commands()
        outputs = self._take_outputs()
        for sequence in tuple(self._sequences.values()):
            self._forget(sequence)
            outputs.append(Output(sequence.key, [], reason, error=error))
        ops = [*self._scheduler.blocks.take_ops(), Cleared()]
        return StepResult(outputs=outputs, ops=ops, load=self._publish(outputs))

    def _die(self, reason: str, on_step: Callable[[StepResult], None], on_death: Callable[[str], None]) -> None:
        with self._wake:
            self._dead = reason
        try:
            on_step(self._end_all("error", WireError("engine_failure", reason)))
        except Exception:
            # What broke the step may break this too; the worker must be told in any case.
            logger.exception("requests in flight could not be answered one by one")
        on_death(reason)
