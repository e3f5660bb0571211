"""A worker process, over the scripted engine by that name; `test_worker.py` starts it with its options as JSON."""

import sys
from pathlib import Path
from typing import Any

import msgspec
from scripted_engine import ScriptedEngine, tokens

from dynamo_llm.config import WorkerConfig
from dynamo_llm.engines import create_engine
from dynamo_llm.engines.base import Engine, EngineRequest
from dynamo_llm.worker import run

FATAL_TOKEN = 666


class MortalEngine(ScriptedEngine):
    """Dies of a prompt that ends in `FATAL_TOKEN`."""

    def submit(self, request: EngineRequest) -> None:
        super().submit(request)
        if request.token_ids[-4:] == tokens(FATAL_TOKEN):
            self.die("the scripted engine met its fatal token")


def create(name: str, folder: Path, model: str, options: dict[str, Any]) -> Engine:
    return MortalEngine(model, **options) if name == "scripted" else create_engine(name, folder, model, options)


if __name__ == "__main__":
    options = msgspec.json.decode(sys.argv[1], type=dict[str, Any])
    sys.exit(run(WorkerConfig.from_dict(options), create))
