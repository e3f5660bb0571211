"""Which worker gets a request: a pure function of what is known, with no clock, no I/O and no logging.

`generation.py` calls it for each request, and a simulator can call it for a trace.
"""

import math
from collections.abc import Sequence
from random import Random

from msgspec import Struct

from router.config import PlacementSettings


class Candidate(Struct, gc=False):
    """What is known of one worker at the moment of a placement. All blocks are of the model's block size."""

    instance: str
    device_blocks: int = 0
    """Leading prompt blocks that it holds on the device."""
    host_blocks: int = 0
    """Further prompt blocks of the same prefix in host memory."""
    disk_blocks: int = 0
    shared_blocks: int = 0
    """Leading prompt blocks that its running sequences reference: they take no further memory."""
    prefill_blocks: float = 0.0
    """Prompt blocks that it has still to compute for other requests."""
    active_blocks: float = 0.0
    """Blocks that its sequences reference."""
    requests: int = 0
    """Sequences waiting or running there; breaks ties."""
    prefill_tokens_per_s: float = 0.0
    """0: not known."""
    decode_step_ms: float = 0.0


class Decision(Struct, frozen=True, kw_only=True):
    """The worker that was chosen, and why."""

    instance: str
    reason: str
    """`kv` (it holds a part of the prompt), `load`, `round_robin` or `random`."""
    reused_blocks: int
    cost: float
    """In blocks; 0 for policies without one."""
    predicted_ttft_ms: float | None
    """None while the worker's speed is not known."""


def cost(prompt_blocks: int, candidate: Candidate, settings: PlacementSettings) -> float:
    """Dynamo's cost of a worker, in blocks (its documentation, "KV cache routing"); the lowest wins."""
    prefill = max(candidate.prefill_blocks + prompt_blocks - _credit(candidate, settings), 0.0)
    incoming = max(prompt_blocks - candidate.shared_blocks, 0)
    return settings.prefill_load_scale * prefill + candidate.active_blocks + incoming


def place(
    prompt_blocks: int,
    block_size: int,
    candidates: Sequence[Candidate],
    settings: PlacementSettings,
    turn: int,
    rng: Random,
) -> Decision:
    """Choose one of `candidates`, which must not be empty.

    `turn` counts the placements before this one; round robin goes by it, in the order of the instances' ids. `rng`
    draws for the random policy, for a temperature above 0 and between workers that are equally good.
    """
    if settings.policy == "round-robin":
        ordered = sorted(candidates, key=lambda c: c.instance)
        return _decision(ordered[turn % len(ordered)], "round_robin", 0.0, prompt_blocks, block_size, settings)
    if settings.policy == "random":
        return _decision(rng.choice(candidates), "random", 0.0, prompt_blocks, block_size, settings)
    costs = [cost(prompt_blocks, c, settings) for c in candidates]
    index = _softmax(costs, settings.temperature, rng) if settings.temperature > 0 else _lowest(costs, candidates, rng)
    chosen = candidates[index]
    reason = "kv" if _overlap(chosen) else "load"
    return _decision(chosen, reason, costs[index], prompt_blocks, block_size, settings)


def _lowest(costs: Sequence[float], candidates: Sequence[Candidate], rng: Random) -> int:
    """Index of the lowest cost; among equals the one with the fewest requests, among those any."""
    best = min(costs)
    tied = [i for i, value in enumerate(costs) if value == best]
    if len(tied) > 1:
        fewest = min(candidates[i].requests for i in tied)
        tied = [i for i in tied if candidates[i].requests == fewest]
    return tied[0] if len(tied) == 1 else rng.choice(tied)


def _softmax(costs: Sequence[float], temperature: float, rng: Random) -> int:
    low, span = min(costs), max(costs) - min(costs)
    weights = [math.exp(-(value - low) / (span or 1.0) / temperature) for value in costs]
    return rng.choices(range(len(costs)), weights)[0]


def _overlap(candidate: Candidate) -> int:
    return candidate.device_blocks + candidate.host_blocks + candidate.disk_blocks


def _credit(candidate: Candidate, settings: PlacementSettings) -> float:
    return (
        settings.device_credit * candidate.device_blocks
        + settings.host_credit * candidate.host_blocks
        + settings.disk_credit * candidate.disk_blocks
    )


def _decision(
    chosen: Candidate, reason: str, value: float, prompt_blocks: int, block_size: int, settings: PlacementSettings
) -> Decision:
    ttft_ms = None
    if chosen.prefill_tokens_per_s > 0:
        blocks = max(chosen.prefill_blocks + prompt_blocks - _credit(chosen, settings), 0.0)
        ttft_ms = 1000.0 * blocks * block_size / chosen.prefill_tokens_per_s + chosen.decode_step_ms
    return Decision(
        instance=chosen.instance,
        reason=reason,
        reused_blocks=_overlap(chosen),
        cost=value,
        predicted_ttft_ms=ttft_ms,
    )
