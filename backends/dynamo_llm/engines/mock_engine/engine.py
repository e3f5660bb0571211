"""The mock engine in real time: one thread that steps while there is work. See `engines/base.py` for the contract."""

import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dynamo_llm.engines.base import EngineError, EngineInfo, EngineRequest, StepResult
from dynamo_llm.engines.mock_engine.blocks import BlockPool
from dynamo_llm.engines.mock_engine.config import MockConfig
from dynamo_llm.engines.mock_engine.request import Answers, MockRequest, make_logprob, make_request
from dynamo_llm.engines.mock_engine.scheduler import MockScheduler, Run
from dynamo_llm.engines.mock_engine.words import make_tape, pick_words
from dynamo_llm.engines.model_files import fit_context, read_eos_token_ids, read_json
from dynamo_llm.engines.stepping import SteppingEngine
from dynamo_llm.engines.torch_engine.speed import Speed
from kvstore.cards import KvOp
from kvstore.wire import Load, Output, Started

_SHORTEST_SLEEP_S = 1e-4
"""Less is left to the next step: a thread does not sleep that exactly."""
_LONGEST_HOLD_S = 2e-4
"""Without a sleep. Other threads of the process (sessions, Triton's host) would wait for Python's lock, up to 5 ms."""


class MockEngine(SteppingEngine[MockRequest]):
    """See `engines.base.Engine`. Several may live in one process."""

    def __init__(self, folder: Path, model: str, options: dict[str, Any]) -> None:
        """Raises `EngineError` for options that are none and folders without a `config.json`."""
        config = MockConfig.from_options(options)
        self.info = _info(folder, model, config)
        words = pick_words(folder, self.info.vocab_size, frozenset(self.info.eos_token_ids))
        self._answers = Answers(words, make_tape(words, self.info.max_context), config.mean_output_tokens)
        blocks = BlockPool(config.kv_blocks, config.block_size, prefix_caching=config.prefix_caching)
        self._scheduler: MockScheduler[MockRequest] = MockScheduler(
            blocks, config.timing, max_batch_tokens=config.max_batch_tokens, max_seqs=config.max_seqs
        )
        self._announces = config.kv_events
        self._speed_up = config.speed_up
        self._speed = Speed()
        self._with_logprobs = 0
        """Sequences that want them."""
        self._closed = threading.Event()
        self._due_s: float | None = None
        """When the step before should have ended; None: the engine was idle since."""
        self._slept_s = 0.0
        """When it last let other threads run."""
        super().__init__(config.max_waiting)

    # --- what `SteppingEngine` asks ---------------------------------------------------------------------------------

    def accept(self, request: EngineRequest, now_s: float) -> MockRequest:
        return make_request(request, self.info, self._answers, now_s)

    def enter(self, sequence: MockRequest) -> None:
        self._scheduler.add(sequence, sequence.priority)
        self._with_logprobs += sequence.logprobs is not None

    def leave(self, sequence: MockRequest) -> None:
        self._scheduler.remove(sequence)
        self._with_logprobs -= sequence.logprobs is not None

    def measure(self) -> Load:
        return self._scheduler.load(self._speed.prefill_tokens_per_s, self._speed.decode_step_ms)

    def take_ops(self) -> list[KvOp]:
        ops = self._scheduler.blocks.take_ops()
        return ops if self._announces else []

    def interrupt(self) -> None:
        self._closed.set()

    def step(self) -> StepResult:
        """Schedule, let the step's time pass, hand out what it computed."""
        started_s = time.monotonic()
        self.take_commands()
        run = self._scheduler.begin(most_steps=1)
        if run is None:
            self._due_s = None
            return self.publish(0, 0, 0.0)
        decoding = list(self._scheduler.decoding)
        for sequence, _ in run.chunks:
            if sequence.first_step_s is None:
                sequence.first_step_s = started_s
        self._pace(run.step_ms / 1e3 / self._speed_up, started_s)
        self._scheduler.end(run)
        self._give(run, decoding)
        if not self._sequences:
            self._due_s = None
        step_s = time.monotonic() - started_s
        self._speed.note(run.prefill_tokens, run.decoding, step_s)
        return self.publish(run.prefill_tokens, run.decoding, step_s)

    # --- parts of a step ----------------------------------------------------------------------------------------------

    def _pace(self, duration_s: float, now_s: float) -> None:
        """Wait until the step is over, or the engine is to close. What one step oversleeps, the next does not wait."""
        late = self._due_s is not None and now_s - self._due_s < max(duration_s, _SHORTEST_SLEEP_S)
        self._due_s = (self._due_s if late and self._due_s is not None else now_s) + duration_s
        time_s = time.monotonic()
        left_s = self._due_s - time_s
        if left_s > _SHORTEST_SLEEP_S:
            self._closed.wait(left_s)
        elif time_s - self._slept_s > _LONGEST_HOLD_S:
            time.sleep(0)
        else:
            return
        self._slept_s = time.monotonic()

    def _give(self, run: Run[MockRequest], decoding: list[MockRequest]) -> None:
        """One token for each sequence that decoded, and one where a prompt was completed."""
        step = self._scheduler.steps
        outputs = [Output(s.key, [s.tape[s.shift + step]], s.reason if s.last_step == step else None) for s in decoding]
        outputs += [self._first(sequence) for sequence in run.first]
        if self._with_logprobs:
            self._add_logprobs(outputs)
        for sequence in run.finished:
            del self._sequences[sequence.key]
            self._with_logprobs -= sequence.logprobs is not None
        self._outputs += outputs

    def _first(self, sequence: MockRequest) -> Output:
        """Its prompt is computed, for the first time or again after a preemption."""
        place = sequence.start - sequence.prompt_tokens - 1
        sequence.shift = place + sequence.offset
        ended = sequence.ticket < 0
        output = Output(sequence.key, [sequence.tape[place + sequence.length]], sequence.reason if ended else None)
        if not sequence.started:
            queue_s = (sequence.first_step_s or sequence.submitted_s) - sequence.submitted_s
            output.started = Started(sequence.cached_tokens, queue_s * 1e3, sequence.prompt_logprobs)
            sequence.started, sequence.prompt_logprobs = True, None
        return output

    def _add_logprobs(self, outputs: list[Output]) -> None:
        for output in outputs:
            count = self._sequences[output.rid].logprobs
            if count is not None:
                output.logprobs = [make_logprob(token, count, self._answers.words) for token in output.token_ids]


def _info(folder: Path, model: str, config: MockConfig) -> EngineInfo:
    raw = read_json(folder / "config.json")
    text = raw.get("text_config", raw)  # of a model that sees or hears too
    try:
        vocab_size, own = int(text["vocab_size"]), int(text["max_position_embeddings"])
    except (KeyError, TypeError, ValueError) as error:
        raise EngineError(f"{folder / 'config.json'} lacks a usable {error}") from None
    return EngineInfo(
        name="mock",
        version=version("dynamo-llm"),
        model=model,
        block_size=config.block_size,
        kv_blocks=config.kv_blocks,
        # Nothing keeps a mock from a longer context than the model's own.
        max_context=fit_context(
            config.max_context, max(own, config.max_context or 0), config.kv_blocks, config.block_size
        ),
        vocab_size=vocab_size,
        eos_token_ids=read_eos_token_ids(folder, raw),
        announces_blocks=config.kv_events or not config.prefix_caching,
    )
