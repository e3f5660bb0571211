"""From workers to a placement: what `generation.py` and `prefill_stage.py` share to choose one, each for its role."""

import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from kvstore.index.base import Match
from router.config import PlacementSettings
from router.loads import WorkerLoad
from router.metrics import ModelMetrics
from router.models import Model
from router.placement import Candidate, Decision, place
from router.sequence import Sequence as GeneratedSequence
from router.worker_client import WorkerConnection

NO_MATCH = Match(0, 0, 0, 0)


class Fleet(Protocol):
    """The workers, as the routing layer sees them. The implementation is `pool.Pool`."""

    def workers(self, model: str) -> Sequence[WorkerConnection]:
        """Connections of the model's instances that generate, ready or not."""

    def prefill_workers(self, model: str) -> Sequence[WorkerConnection]:
        """Connections of those that compute prompts for others, ready or not."""

    def match(self, model: str, hashes: Sequence[int]) -> Mapping[str, Match]:
        """The instances that hold a prefix of the blocks."""

    async def wait_for_change(self, timeout_s: float) -> None:
        """Return when a worker came, went, or changed its readiness, or after the timeout."""


class Job(NamedTuple):
    """A sequence on its way, and what all of its placements go by."""

    sequence: GeneratedSequence
    model: Model
    metrics: ModelMetrics
    hashes: list[int]
    """Of the prompt's whole blocks."""
    turn: int
    """For round robin: requests of the model before this one."""


class Choice(NamedTuple):
    """A worker that was chosen."""

    worker: WorkerConnection
    decision: Decision
    candidate: Candidate
    """What was known of it."""


class Placer:
    """Places by the router's policy (`placement.py`)."""

    def __init__(self, fleet: Fleet, settings: PlacementSettings, rng: random.Random) -> None:
        self._fleet = fleet
        self._settings = settings
        self._rng = rng

    def choose(self, workers: Sequence[WorkerConnection], job: Job, turn: int) -> Choice:
        """One of `workers`, which must not be empty."""
        model, hashes = job.model, job.hashes
        matches = self._fleet.match(model.name, hashes)
        candidates = [candidate_of(w.instance, w.load, matches.get(w.instance, NO_MATCH), hashes) for w in workers]
        decision = place(len(hashes), model.block_size, candidates, self._settings, turn, self._rng)
        position = next(i for i, worker in enumerate(workers) if worker.instance == decision.instance)
        return Choice(workers[position], decision, candidates[position])


def candidate_of(instance: str, load: WorkerLoad, match: Match, hashes: Sequence[int]) -> Candidate:
    """A worker as the policies see it; a simulator asks this too. `hashes`: the prompt's whole blocks."""
    report = load.report
    return Candidate(
        instance=instance,
        device_blocks=match.device,
        host_blocks=match.host,
        disk_blocks=match.disk,
        shared_blocks=load.shared_blocks(hashes),
        prefill_blocks=load.prefill_blocks,
        active_blocks=load.active_blocks,
        requests=load.requests,
        prefill_tokens_per_s=report.prefill_tokens_per_s if report else 0.0,
        decode_step_ms=report.decode_step_ms if report else 0.0,
    )
