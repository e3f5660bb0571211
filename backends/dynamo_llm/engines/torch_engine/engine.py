"""The engine: one thread that steps while there is work. See `engines/base.py` for the contract it keeps."""

import time
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from dynamo_llm.engines.base import EngineError, EngineInfo, EngineRequest, RequestError, StepResult
from dynamo_llm.engines.stepping import SteppingEngine
from dynamo_llm.engines.torch_engine.blocks import BlockManager
from dynamo_llm.engines.torch_engine.config import TorchConfig
from dynamo_llm.engines.torch_engine.handover import Handover
from dynamo_llm.engines.torch_engine.request import make_sequence
from dynamo_llm.engines.torch_engine.runner import Runner
from dynamo_llm.engines.torch_engine.scheduler import Scheduler, Work
from dynamo_llm.engines.torch_engine.sequence import Sequence
from dynamo_llm.engines.torch_engine.speed import Speed
from dynamo_llm.transfer import KvTransfer, TransferError
from dynamo_llm.transfer.metrics import TransferMetrics
from kvstore.cards import KvOp
from kvstore.wire import Load, Output, Started, TokenLogprob


class TorchEngine(SteppingEngine[Sequence]):
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
        self._speed = Speed()
        self._lease_s = config.kv_lease_s
        self._handover: Handover | None = None
        self._stalled = False
        super().__init__(config.max_waiting)

    # --- what `SteppingEngine` asks ---------------------------------------------------------------------------------

    def accept(self, request: EngineRequest, now_s: float) -> Sequence:
        sequence = make_sequence(request, self.info, now_s)
        if self._handover is None:
            if sequence.exports:
                raise RequestError("invalid_request", "this worker hands no KV blocks over: kv_transfer_params")
            sequence.remote = None  # it is computed here
        return sequence

    def enter(self, sequence: Sequence) -> None:
        self._scheduler.add(sequence)

    def leave(self, sequence: Sequence) -> None:
        if self._handover is not None:
            self._handover.leave(sequence)
        self._scheduler.remove(sequence)

    def cancel(self, key: int) -> None:
        super().cancel(key)
        if (handover := self._handover) is not None:
            self.post(lambda: handover.unpin(key))

    def take_ops(self) -> list[KvOp]:
        return self._scheduler.blocks.take_ops()

    def prepare_thread(self) -> None:
        self._runner.prepare_thread()

    def stalled(self) -> bool:
        return self._stalled

    def free(self) -> None:
        if self._handover is not None:
            self._handover.close()  # the pool must outlive it
        self._runner.free()

    def step(self) -> StepResult:
        """Schedule, run, sample, finish."""
        started_s = time.monotonic()
        self.take_commands()
        work = self._schedule()
        self._note_start(work, started_s)
        sampled = self._runner.run(work, self._scheduler.blocks.tables) if work else []
        self._scheduler.advance(work)
        for token in sampled:
            self._outputs.append(self._append(*token))
        return self._result(work, started_s)

    def measure(self) -> Load:
        scheduler = self._scheduler
        unfinished = (*scheduler.waiting, *scheduler.running)
        return Load(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            waiting_prefill_tokens=sum(max(s.prompt_tokens - s.computed, 0) for s in unfinished if s.pull is None),
            kv_blocks_used=scheduler.blocks.used,
            kv_blocks_cached=scheduler.blocks.cached,
            kv_blocks_total=scheduler.blocks.kv_blocks,
            prefill_tokens_per_s=self._speed.prefill_tokens_per_s,
            decode_step_ms=self._speed.decode_step_ms,
        )

    # --- disaggregation ---------------------------------------------------------------------------------------------

    def open_transfer(self, name: str, metrics: TransferMetrics | None = None) -> KvTransfer:
        """See `engines.base.MovesBlocks`."""

        def drop(blocks: Collection[int]) -> None:
            self.post(lambda: self._scheduler.blocks.drop(blocks))

        layout = self._runner.layout(self.info.model)
        try:
            transfer = KvTransfer(name, layout, lambda request_id, blocks: drop(blocks), metrics)
        except TransferError as error:
            raise EngineError(str(error)) from error
        self._handover = Handover(transfer, self._scheduler, self.post, self._lease_s)
        return transfer

    # --- parts of a step ----------------------------------------------------------------------------------------------

    def _schedule(self) -> list[Work]:
        preemptions = self._scheduler.preemptions
        work = self._scheduler.schedule()
        ready = self._handover is not None and self._handover.begin()
        # Without work nothing changes until blocks come or are free again, and both come as calls.
        self._stalled = not (work or ready or self._scheduler.preemptions > preemptions)
        return work

    @staticmethod
    def _note_start(work: list[Work], now_s: float) -> None:
        for item in work:
            sequence = item.sequence
            if sequence.first_step_s is None:
                sequence.first_step_s = now_s
                sequence.cached_tokens = max(sequence.computed - sequence.pulled_tokens, 0)

    def _append(self, sequence: Sequence, token: int, logprob: TokenLogprob | None) -> Output:
        """Give a sequence its next token; frees it when that was the last."""
        sequence.tokens.append(token)
        output = Output(sequence.key, [token], logprobs=None if logprob is None else [logprob])
        if not sequence.started:
            queue_s = (sequence.first_step_s or sequence.submitted_s) - sequence.submitted_s
            output.started = Started(sequence.cached_tokens, queue_s * 1e3, sequence.prompt_logprobs)
            sequence.started, sequence.prompt_logprobs = True, None
            if sequence.pulled_tokens:
                told = {"transfer_ms": sequence.pull_s * 1e3, "transferred_tokens": sequence.pulled_tokens}
                output.kv_transfer_params = told
        if token in sequence.stop_ids:
            output.finish_reason = "stop"
        elif len(sequence.tokens) >= sequence.max_tokens:
            output.finish_reason = "length"
        if output.finish_reason:
            if sequence.exports and self._handover is not None and output.finish_reason == "length":
                output.kv_transfer_params = self._handover.pin(sequence)
            self.leave(self._sequences.pop(sequence.key))
        return output

    def _result(self, work: list[Work], started_s: float) -> StepResult:
        step_s = time.monotonic() - started_s
        decode_tokens = sum(item.sequence.started and item.tokens == 1 for item in work)
        prefill_tokens = sum(item.tokens for item in work) - decode_tokens
        self._speed.note(prefill_tokens, decode_tokens, step_s)
        return self.publish(prefill_tokens, decode_tokens, step_s)
