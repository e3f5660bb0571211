"""A worker process, over the scripted engine by that name. `worker_runner.Worker` starts it, its options as JSON."""

import sys
from pathlib import Path
from typing import Any

import msgspec
from scripted_engine import ScriptedEngine, tokens

from dynamo_llm.config import WorkerConfig
from dynamo_llm.engines import create_engine
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


def create(name: str, folder: Path, model: str, options: dict[str, Any]) -> Engine:
    return SteeredEngine(model, **options) if name == "scripted" else create_engine(name, folder, model, options)


if __name__ == "__main__":
    options = msgspec.json.decode(sys.argv[1], type=dict[str, Any])
    sys.exit(run(WorkerConfig.from_dict(options), create))
