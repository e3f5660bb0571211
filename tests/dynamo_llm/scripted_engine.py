"""An engine that generates what the prompt says: below the `Engine` boundary, for tests of the service and its hosts.

A request's tokens count up from its last prompt token: prompt [.., 5] gives 6, 7, 8, … . It steps by itself on a
thread, each step after a pause of `step_s`, or, with `step_s` None, only when a test calls `step`. Logprobs are -1 for
the token and -2, -3, … for the likeliest ones behind it.
"""

import threading
from array import array
from collections.abc import Callable
from typing import Any

from dynamo_llm.engines.base import EngineInfo, EngineRequest, RequestError, StepResult
from kvstore.cards import KvOp, Stored
from kvstore.wire import Load, Output, SnapshotReply, Started, TokenLogprob

BLOCK_SIZE = 16


class _Running:
    def __init__(self, request: EngineRequest) -> None:
        tokens = array("I", request.token_ids)
        self.request = request
        self.next_token = tokens[-1] + 1
        self.left = (request.sampling.max_tokens or 1_000_000) - request.generated
        self.fresh = True
        self.cancelled = False


class ScriptedEngine:
    """See the module's docstring. `refuse` names an error for each further submission."""

    def __init__(
        self, model: str = "demo", step_s: float | None = None, vocab_size: int = 4096, takes: tuple[str, ...] = ()
    ) -> None:
        self.info = EngineInfo(
            name="scripted",
            version="1",
            model=model,
            block_size=BLOCK_SIZE,
            kv_blocks=64,
            max_context=1024,
            vocab_size=vocab_size,
            eos_token_ids=(0,),
        )
        self.cancelled: list[int] = []
        self.submitted: list[EngineRequest] = []
        self.takes = takes
        """Names of `sampling.extra` that it does not refuse."""
        self.refuse: Exception | None = None
        self.hands_over: dict[str, Any] | None = None
        """`kv_transfer_params` of outputs that end a request."""
        self.steps = 0
        self._step_s = step_s
        self._lock = threading.Lock()
        self._running: dict[int, _Running] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._dead = False
        self._on_step: Callable[[StepResult], None]
        self._on_death: Callable[[str], None]

    def start(self, on_step: Callable[[StepResult], None], on_death: Callable[[str], None]) -> None:
        self._on_step, self._on_death = on_step, on_death
        if self._step_s is not None:
            self._thread = threading.Thread(target=self._loop, daemon=True)
            self._thread.start()

    def submit(self, request: EngineRequest) -> None:
        if self.refuse is not None:
            raise self.refuse
        if len(request.token_ids) // 4 >= self.info.max_context:
            raise RequestError("context_length_exceeded", f"at most {self.info.max_context} tokens")
        for name in request.sampling.extra:
            if name not in self.takes:
                raise RequestError("invalid_request", f"unknown sampling option {name!r}")
        self.submitted.append(request)
        with self._lock:
            self._running[request.key] = _Running(request)

    def cancel(self, key: int) -> None:
        self.cancelled.append(key)
        with self._lock:
            if key in self._running:
                self._running[key].cancelled = True

    def load(self) -> Load:
        return Load(running=len(self._running), kv_blocks_total=self.info.kv_blocks)

    def close(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def step(self) -> None:
        """One token for each sequence."""
        with self._lock:
            outputs = [self._advance(running) for running in list(self._running.values())]
            for output in outputs:
                if output.finish_reason is not None:
                    del self._running[output.rid]
        ops: list[KvOp] = [Stored(None, [output.rid]) for output in outputs if output.started is not None]
        self.steps += 1
        self._on_step(StepResult(outputs=outputs, ops=ops, load=self.load(), decode_tokens=len(outputs), step_s=0.001))

    def die(self, reason: str) -> None:
        self._stop.set()
        self._on_death(reason)

    def _advance(self, running: _Running) -> Output:
        key = running.request.key
        if running.cancelled:
            return Output(key, [], "cancelled")
        started = Started(0, 1.0) if running.fresh else None
        running.fresh = False
        running.left -= 1
        token, running.next_token = running.next_token, running.next_token + 1
        most = running.request.sampling.logprobs
        top = [(token + rank, -1.0 - rank) for rank in range(most or 0)]
        logprobs = None if most is None else [TokenLogprob(token, -1.0, top)]
        if running.left:
            return Output(key, [token], None, logprobs, started)
        return Output(key, [token], "length", logprobs, started, self.hands_over)

    def _loop(self) -> None:
        while not self._stop.wait(self._step_s):
            if self._running:
                self.step()


class Events:
    """Stands for the event publisher: keeps what was published."""

    def __init__(self) -> None:
        self.ops: list[KvOp] = []

    def publish(self, ops: list[KvOp]) -> None:
        self.ops += ops

    def snapshot(self) -> SnapshotReply:
        return SnapshotReply("0" * 16, 7, 3, [])


def tokens(*ids: int) -> bytes:
    return array("I", ids).tobytes()
