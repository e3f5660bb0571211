"""Whether a prompt is prefilled remotely: a pure function of what is known, with no clock, no I/O and no logging.

`prefill_stage.py` calls it once a decode worker and a prefill worker were placed, and a simulator can call it for a
trace. docs/disaggregation.md derives the formulas.
"""

from msgspec import Struct

from router.config import DisaggSettings
from router.placement import Candidate


class Side(Struct, frozen=True, kw_only=True, gc=False):
    """One worker that could compute a prompt, at the moment of the decision."""

    uncached_tokens: int
    """Of this prompt: those that it would really have to compute, at least one."""
    queued_tokens: float
    """Prompt tokens that it has still to compute for others."""
    requests: int
    """Sequences waiting or running there."""
    prefill_tokens_per_s: float
    """0: not known."""
    decode_step_ms: float
    """0: not known."""


class Verdict(Struct, frozen=True, kw_only=True):
    """Where the prompt is computed, and why."""

    remote: bool
    reason: str
    """Local: `never`, `short`, `no_prefill_worker` or `sooner`. Remote: `always`, `itl` or `cheaper`."""
    local_ttft_ms: float | None = None
    remote_ttft_ms: float | None = None
    """Predicted; None while no worker's speed is known, or where it was not asked for."""


def side_of(candidate: Candidate, prompt_tokens: int, block_size: int) -> Side:
    """A placed worker as the policy sees it. A cached block counts whatever its tier; one token is always computed."""
    cached = candidate.device_blocks + candidate.host_blocks + candidate.disk_blocks
    return Side(
        uncached_tokens=max(prompt_tokens - cached * block_size, 1),
        queued_tokens=candidate.prefill_blocks * block_size,
        requests=candidate.requests,
        prefill_tokens_per_s=candidate.prefill_tokens_per_s,
        decode_step_ms=candidate.decode_step_ms,
    )


def decide(local: Side, remote: Side | None, transfer_tokens_per_s: float, settings: DisaggSettings) -> Verdict:
    """`local` is the decode worker, `remote` the prefill worker that was placed, None where none is there.

    What has to be transferred is what the decode worker lacks.
    """
    if settings.remote_prefill == "never":
        return Verdict(remote=False, reason="never")
    if local.uncached_tokens <= settings.max_local_prefill_tokens:
        return Verdict(remote=False, reason="short")
    if remote is None:
        return Verdict(remote=False, reason="no_prefill_worker")
    local_rate, remote_rate = _rates(local, remote)
    stall_ms = _ms(local.uncached_tokens, local_rate)
    local_ttft_ms = _ms(local.queued_tokens, local_rate) + stall_ms + local.decode_step_ms
    transfer_ms = _ms(local.uncached_tokens, transfer_tokens_per_s) + settings.transfer_overhead_ms
    computed_ms = _ms(remote.queued_tokens + remote.uncached_tokens, remote_rate)
    remote_ttft_ms = computed_ms + transfer_ms + local.decode_step_ms
    if settings.remote_prefill == "always":
        is_remote, reason = True, "always"
    elif local.requests and 0.0 < settings.max_itl_ms < local.decode_step_ms + stall_ms:
        is_remote, reason = True, "itl"
    else:
        local_cost_ms = local_ttft_ms + settings.itl_weight * max(local.requests, 1) * stall_ms
        is_remote = remote_ttft_ms < local_cost_ms
        reason = "cheaper" if is_remote else "sooner"
    known = local.prefill_tokens_per_s > 0 or remote.prefill_tokens_per_s > 0
    return Verdict(
        remote=is_remote,
        reason=reason,
        local_ttft_ms=local_ttft_ms if known else None,
        remote_ttft_ms=remote_ttft_ms if known else None,
    )


_ASSUMED_TOKENS_PER_S = 1000.0
"""Where nobody has measured anything: so slow that a transfer weighs little beside it."""


def _rates(local: Side, remote: Side) -> tuple[float, float]:
    """Who has not computed a prompt yet is taken to be as fast as the other one."""
    local_rate = local.prefill_tokens_per_s or remote.prefill_tokens_per_s or _ASSUMED_TOKENS_PER_S
    return local_rate, remote.prefill_tokens_per_s or local_rate


def _ms(tokens: float, tokens_per_s: float) -> float:
    return 1000.0 * tokens / tokens_per_s
