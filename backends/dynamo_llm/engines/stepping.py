"""What engines have in common that step on a thread of their own: commands, keys, refusals, load, death and the end.

The torch and the mock engine are subclasses. A subclass prepares a sequence of its own kind for each request
(`accept`), and says what it means to let it in (`enter`), to forget it (`leave`) and to `step`; see `engines/base.py`
for the contract that is kept here.
"""

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

import msgspec

from dynamo_llm.engines.base import EngineInfo, EngineRequest, RequestError, StepResult
from kvstore.cards import Cleared, KvOp
from kvstore.wire import FinishReason, Load, Output, WireError

logger = logging.getLogger(__name__)


class Queued(Protocol):
    """What is asked of a sequence here."""

    key: int
    prompt_tokens: int


_S = TypeVar("_S", bound=Queued)


class SteppingEngine(ABC, Generic[_S]):
    """See the module's docstring. A subclass sets `info` and calls `__init__` last of all in its constructor."""

    info: EngineInfo

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._sequences: dict[int, _S] = {}
        """By key; engine thread only."""
        self._outputs: list[Output] = []
        """Of this step so far; kept here so that a step which breaks loses none. Engine thread only."""
        self._thread: threading.Thread | None = None

        self._wake = threading.Condition()
        """Guards what follows: callers write it, the engine's thread takes it at the start of a step."""
        self._commands: list[_S | int] = []
        """Sequences to add and keys to cancel, in the order in which they came."""
        self._calls: list[Callable[[], None]] = []
        """See `post`."""
        self._queued = self._queued_tokens = 0
        """Sequences among the commands, and the tokens of their prompts; taken off when the next load counts them."""
        self._taken = 0, 0
        self._keys: set[int] = set()
        self._closing = False
        self._dead: str | None = None
        self._load = self.measure()

    # --- what a subclass says ---------------------------------------------------------------------------------------

    @abstractmethod
    def accept(self, request: EngineRequest, now_s: float) -> _S:
        """The sequence of a request. Raises `RequestError` for what can never be served. Any thread."""

    @abstractmethod
    def enter(self, sequence: _S) -> None:
        """It may be scheduled from now on."""

    @abstractmethod
    def leave(self, sequence: _S) -> None:
        """It has ended or is cancelled: free what it holds."""

    @abstractmethod
    def step(self) -> StepResult:
        """Begin with `take_commands`, end with `publish`."""

    @abstractmethod
    def measure(self) -> Load:
        """The load, without what is still among the commands."""

    @abstractmethod
    def take_ops(self) -> list[KvOp]:
        """What was stored and removed since the last call."""

    def stalled(self) -> bool:
        """After a step: the next one would do nothing, until there is a command or a call."""
        return False

    def prepare_thread(self) -> None:
        """Called once on the engine's thread, before the first step."""

    def interrupt(self) -> None:
        """The engine is to close: a step that waits should not. Any thread."""

    def free(self) -> None:
        """The thread has ended: give memory back. May be called twice."""

    # --- any thread ---------------------------------------------------------------------------------------------------

    def start(self, on_step: Callable[[StepResult], None], on_death: Callable[[str], None]) -> None:
        if self._thread is not None:
            raise RuntimeError("the engine has been started already")
        name = f"{self.info.name}-engine"
        self._thread = threading.Thread(target=self._serve, args=(on_step, on_death), name=name, daemon=True)
        self._thread.start()

    def submit(self, request: EngineRequest) -> None:
        sequence = self.accept(request, time.monotonic())
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

    def post(self, call: Callable[[], None]) -> None:
        """Have it called on the engine's thread, before its next step or its end. For what a subclass waits for."""
        with self._wake:
            self._calls.append(call)
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
        self.interrupt()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self.free()

    # --- the engine's thread ------------------------------------------------------------------------------------------

    def take_commands(self) -> None:
        """Let new sequences in and end the cancelled ones."""
        with self._wake:
            commands, self._commands = self._commands, []
            calls, self._calls = self._calls, []
            self._taken = self._queued, self._queued_tokens
        for call in calls:
            call()
        for command in commands:
            if not isinstance(command, int):
                self._sequences[command.key] = command
                self.enter(command)
            elif command in self._sequences:
                self.leave(self._sequences.pop(command))
                self._outputs.append(Output(command, [], "cancelled"))

    def publish(self, prefill_tokens: int, decode_tokens: int, step_s: float) -> StepResult:
        """What the step produced, and the load from now on."""
        outputs, self._outputs = self._outputs, []
        return StepResult(
            outputs=outputs,
            ops=self.take_ops(),
            load=self._publish_load(outputs),
            prefill_tokens=prefill_tokens,
            decode_tokens=decode_tokens,
            step_s=step_s,
        )

    def _serve(self, on_step: Callable[[StepResult], None], on_death: Callable[[str], None]) -> None:
        try:
            self.prepare_thread()
            while self._wait_for_work():
                on_step(self.step())
            on_step(self._end_all("cancelled"))
        except Exception as error:
            # The engine's boundary: whatever broke a step, every request gets its answer and the worker learns why.
            logger.exception("the engine's step failed")
            self._die(f"{type(error).__name__}: {error}", on_step, on_death)

    def _wait_for_work(self) -> bool:
        """False when the engine is to close."""
        with self._wake:
            while not (self._closing or self._commands or self._calls or (self._sequences and not self.stalled())):
                self._wake.wait()
            return not self._closing

    def _publish_load(self, outputs: list[Output]) -> Load:
        load = self.measure()
        with self._wake:
            self._keys.difference_update([output.rid for output in outputs if output.finish_reason])
            self._queued -= self._taken[0]
            self._queued_tokens -= self._taken[1]
            self._taken = 0, 0
            self._load = load
        return load

    # --- the end ------------------------------------------------------------------------------------------------------

    def _end_all(self, reason: FinishReason, error: WireError | None = None) -> StepResult:
        """Last outputs of everything in flight, queued commands included; all blocks are free afterwards."""
        self.take_commands()
        outputs, self._outputs = self._outputs, []
        while self._sequences:
            key, sequence = self._sequences.popitem()
            self.leave(sequence)
            outputs.append(Output(key, [], reason, error=error))
        return StepResult(outputs=outputs, ops=[*self.take_ops(), Cleared()], load=self._publish_load(outputs))

    def _die(self, reason: str, on_step: Callable[[StepResult], None], on_death: Callable[[str], None]) -> None:
        with self._wake:
            self._dead = reason
        try:
            on_step(self._end_all("error", WireError("engine_failure", reason)))
        except Exception:
            # What broke the step may break this too; the worker must be told in any case.
            logger.exception("requests in flight could not be answered one by one")
        on_death(reason)
