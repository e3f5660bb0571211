"""The router's own routing layer over the workers of a test: the least that `Generation` needs besides connections."""

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from worker_runner import MODEL

from kvstore import model_files
from kvstore.index.base import Match
from kvstore.text import Tokenizer
from router.config import RouterConfig
from router.generation import Generation
from router.metrics import Metrics
from router.models import Model, Models
from router.worker_client import WorkerConnection

TOKENIZER = Tokenizer.from_files(model_files.read(Path(MODEL) / "1/model"))


class Fleet:
    """Connections, and which of them is said to hold every prompt."""

    def __init__(self) -> None:
        self.connections: list[WorkerConnection] = []
        self.holder = ""
        self._changed = asyncio.Event()

    def on_change(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def workers(self, model: str) -> Sequence[WorkerConnection]:
        return self.connections

    def match(self, model: str, hashes: Sequence[int]) -> Mapping[str, Match]:
        return {self.holder: Match(len(hashes), 0, 0, 0)}

    async def wait_for_change(self, timeout_s: float) -> None:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._changed.wait(), timeout_s)


def models_of(*connections: WorkerConnection) -> Models:
    """The model that these workers serve."""
    models = Models()
    card = connections[0].card
    models.put(Model(card.model, card.block_size, TOKENIZER, None, 0.0))  # type: ignore[arg-type]
    for connection in connections:
        models.add(connection.card)
    return models


def generation_over(fleet: Fleet) -> Generation:
    return Generation(models_of(*fleet.connections), fleet, Metrics(), RouterConfig(redis_url=""))
