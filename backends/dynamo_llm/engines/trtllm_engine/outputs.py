"""From a result of TensorRT-LLM, which grows, to deltas. Pure. `TrtllmEngine.generate` calls it."""

from dynamo_llm.engines.async_types import Delta, token_logprob
from dynamo_llm.engines.trtllm_engine.handover import to_transfer
from dynamo_llm.engines.trtllm_engine.vendor import RequestOutput
from kvstore.wire import FinishReason, WireError

_REASONS: dict[str, FinishReason] = {
    "stop": "stop",
    "length": "length",
    "cancelled": "cancelled",
    "not_finished": "length",  # a context that another engine goes on with
}


class Results:
    """One request's stream: TensorRT-LLM hands out the same object at each step, with all there is so far."""

    def __init__(self, logprobs: int | None) -> None:
        """`logprobs`: how many likeliest tokens were asked for, None for none."""
        self._logprobs = logprobs
        self._seen = 0

    def delta(self, result: RequestOutput) -> Delta:
        output = result.outputs[0]
        begin, self._seen = self._seen, len(output.token_ids)
        tokens = list(output.token_ids[begin:])
        reason = None
        if result.finished:
            reason = _REASONS.get(output.finish_reason or "", "error")
        logprobs = None
        if self._logprobs is not None and tokens:
            pairs = zip(tokens, output.logprobs[begin:], strict=True)
            logprobs = [token_logprob(token, entry, self._logprobs) for token, entry in pairs]
        return Delta(
            token_ids=tokens,
            logprobs=logprobs,
            finish_reason=reason,
            cached_tokens=int(result.cached_tokens or 0),
            kv_transfer_params=to_transfer(output.disaggregated_params) if result.finished else None,
            error=WireError("engine_failure", f"TensorRT-LLM ended the request: {output.finish_reason or 'no reason'}")
            if reason == "error"
            else None,
        )
