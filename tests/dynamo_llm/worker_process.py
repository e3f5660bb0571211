"""A worker process, over the scripted engine by that name. `worker_runner.Worker` starts it, its options as JSON.

Options of the engine beside the scripted one's: `stuck`, the number of the engine that never comes out of its
constructor, and `unstartable`, the number of the one that cannot be started.
"""

import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
from scripted_engine import ScriptedEngine, tokens

from dynamo_llm import instance
from dynamo_llm.config import WorkerConfig
from dynamo_llm.engines.base import Engine, EngineRequest, StepResult
from dynamo_llm.worker import run
from kvstore.wire import Load

FATAL_TOKEN = 666
_numbers = count(1)


class SteeredEngine(ScriptedEngine):
    """Dies of a prompt that ends in `FATAL_TOKEN`, and lets requests wait that say so in `SamplingParams.extra`."""

    unstartable = False

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, takes=("wait",), **options)
        self._waiting: dict[int, EngineRequest] = {}

    def start(self, on_step: Callable[[StepResult], None], on_death: Callable[[str], None]) -> None:
        if self.unstartable:
            raise ZeroDivisionError("as it was told")
        super().start(on_step, on_death)

    def submit(self, request: EngineRequest) -> None:
        if request.sampling.extra.get("wait"):
            self._waiting[request.key] = request
            return
        super().submit(request)
        if request.token_ids[-4:] == tokens(FATAL_TOKEN):
            self.die("the scripted engine met its fatal token")

    def cancel(self, key: int) -> None:
        if (waiting := self._waiting.pop(key, None)) is not None:
            super().submit(waiting)
        super().cancel(key)

    def load(self) -> Load:
        return msgspec.structs.replace(super().load(), waiting=len(self._waiting))


def _steered(model: str, stuck: int = 0, unstartable: int = 0, **options: Any) -> SteeredEngine:
    number = next(_numbers)
    if number == stuck:
        print("stuck", file=sys.stderr, flush=True)
        with ThreadPoolExecutor(1) as loader:  # as the torch engine does: the interpreter waits for such a thread
            loader.submit(threading.Event().wait).result()
    engine = SteeredEngine(model, **options)
    engine.unstartable = number == unstartable
    return engine


def create(config: WorkerConfig, folder: Path, model: str) -> Engine:
    if config.engine == "scripted":
        return _steered(model, **config.engine_options)
    return instance.create(config, folder, model)


if __name__ == "__main__":
    options = msgspec.json.decode(sys.argv[1], type=dict[str, Any])
    sys.exit(run(WorkerConfig.from_dict(options), create))
