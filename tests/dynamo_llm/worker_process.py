"""A worker process, over the scripted engine by that name. `worker_runner.Worker` starts it, its options as JSON."""

import sys
from pathlib import Path
from typing import Any

import msgspec
from scripted_engine import ScriptedEngine, tokens

from dynamo_llm import instance
from dynamo_llm.config import WorkerConfig
from dynamo_llm.engines.base import Engine, EngineRequest
from dynamo_llm.worker import run
from kvstore.wire import Load

FATAL_TOKEN = 666


class SteeredEngine(ScriptedEngine):
    """Dies of a prompt that ends in `FATAL_TOKEN`, and lets requests wait that say so in `SamplingParams.extra`."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._waiting: dict[int, EngineRequest] = {}

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


def create(config: WorkerConfig, folder: Path, model: str) -> Engine:
    if config.engine == "scripted":
        return SteeredEngine(model, **config.engine_options)
    return instance.create(config, folder, model)


if __name__ == "__main__":
    options = msgspec.json.decode(sys.argv[1], type=dict[str, Any])
    sys.exit(run(WorkerConfig.from_dict(options), create))
