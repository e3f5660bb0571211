"""Drives an engine as the service does, and waits for what it says."""

import queue
from array import array
from collections.abc import Callable
from typing import Any

from dynamo_llm.engines.base import Engine, EngineRequest, StepResult
from kvstore.cards import KvOp
from kvstore.wire import Load, Output, SamplingParams

WAIT_S = 20.0


class Driver:
    """Starts the engine. Outputs are kept by request, ops in order."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.outputs: dict[int, list[Output]] = {}
        self.ops: list[KvOp] = []
        self.load = Load()
        self.steps: list[StepResult] = []
        self.deaths: queue.Queue[str] = queue.Queue()
        self._news: queue.Queue[StepResult] = queue.Queue()
        engine.start(self._news.put, self.deaths.put)

    def submit(self, key: int, tokens: list[int], sampling: SamplingParams | None = None, **more: Any) -> None:
        prompt = array("I", tokens).tobytes()
        sampling = sampling or SamplingParams(max_tokens=4, temperature=0.0)
        self.engine.submit(EngineRequest(key=key, token_ids=prompt, sampling=sampling, **more))

    def wait(self, holds: Callable[[], bool]) -> None:
        """Take in steps until a condition holds; fails after `WAIT_S` without one."""
        while not holds():
            self._take(self._news.get(timeout=WAIT_S))

    def finish(self, *keys: int) -> list[list[Output]]:
        """All outputs of these requests, once they are final."""
        self.wait(lambda: all(self.is_final(key) for key in keys))
        return [self.outputs[key] for key in keys]

    def is_final(self, key: int) -> bool:
        return any(output.finish_reason for output in self.outputs.get(key, []))

    def tokens(self, key: int) -> list[int]:
        return [token for output in self.outputs.get(key, []) for token in output.token_ids]

    def drain(self) -> None:
        """Take in what has come, without waiting."""
        while not self._news.empty():
            self._take(self._news.get())

    def _take(self, step: StepResult) -> None:
        self.steps.append(step)
        self.load = step.load
        self.ops += step.ops
        for output in step.outputs:
            self.outputs.setdefault(output.rid, []).append(output)
