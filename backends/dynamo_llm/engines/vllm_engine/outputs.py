"""What vLLM says of a request in a step, in the wire's terms. Pure. `VllmEngine.generate` calls it."""

from collections.abc import Mapping, Sequence
from typing import Any

from vllm.logprobs import Logprob
from vllm.outputs import RequestOutput

from dynamo_llm.engines.async_types import Delta, token_logprob
from kvstore.wire import FinishReason, TokenLogprob, WireError

_REASONS: dict[str, FinishReason] = {
    "stop": "stop",
    "length": "length",
    "abort": "cancelled",
    "error": "error",
    "repetition": "stop",
}


def to_delta(output: RequestOutput, logprobs: int | None, prompt_logprobs: int | None, lease_s: float = 0.0) -> Delta:
    """`logprobs`, `prompt_logprobs`: how many likeliest tokens were asked for, None for none. `lease_s`: how long the
    blocks of a prefill are kept."""
    completion = output.outputs[0]
    token_ids = list(completion.token_ids)
    reason = None if completion.finish_reason is None else _REASONS.get(completion.finish_reason, "error")
    stats = output.metrics
    return Delta(
        token_ids=token_ids,
        logprobs=None if logprobs is None or not token_ids else _logprobs(token_ids, completion.logprobs, logprobs),
        finish_reason=reason,
        cached_tokens=output.num_cached_tokens or 0,
        # Both of the engine core's clock; the way there is not in it.
        queue_ms=0.0 if stats is None else max(stats.scheduled_ts - stats.queued_ts, 0.0) * 1e3,
        prompt_logprobs=_prompt_logprobs(output, prompt_logprobs),
        kv_transfer_params=_handed_over(output.kv_transfer_params, lease_s),
        error=WireError("engine_failure", "vLLM could not go on with the request; its log says why")
        if reason == "error"
        else None,
    )


def _handed_over(params: dict[str, Any] | None, lease_s: float) -> dict[str, Any] | None:
    """vLLM's own, and beside them `lease_s`, which vLLM passes over. Its decode side reads whatever is in the blocks by
    then, so it is for the router to know when that may not be the prompt's any more."""
    if not params or not params.get("do_remote_prefill"):
        return params
    return {**params, "lease_s": lease_s}


def _logprobs(
    token_ids: Sequence[int], entries: Sequence[Mapping[int, Logprob]] | None, count: int
) -> list[TokenLogprob]:
    return [token_logprob(token, entry, count) for token, entry in zip(token_ids, entries or (), strict=True)]


def _prompt_logprobs(output: RequestOutput, count: int | None) -> list[TokenLogprob | None] | None:
    if count is None or not output.prompt_logprobs:
        return None
    tokens = output.prompt_token_ids or ()
    return [
        token_logprob(token, entry, count) if entry else None  # of flat log-probabilities the first is empty
        for token, entry in zip(tokens, output.prompt_logprobs, strict=False)
    ]
