"""From the chunks that SGLang streams to deltas. Pure."""

from http import HTTPStatus
from typing import Any

from dynamo_llm.engines.async_types import Delta
from dynamo_llm.engines.base import RequestError
from kvstore.wire import ErrorCode, FinishReason, SamplingParams, TokenLogprob

_CODES: dict[int, ErrorCode] = {
    HTTPStatus.BAD_REQUEST: "invalid_request",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "context_length_exceeded",
    HTTPStatus.TOO_MANY_REQUESTS: "overloaded",
    HTTPStatus.SERVICE_UNAVAILABLE: "overloaded",
}


class Chunks:
    """One request's stream. Chunks repeat what came before, unless the engine was told to stream increments."""

    def __init__(self, sampling: SamplingParams, *, incremental: bool) -> None:
        self._sampling = sampling
        self._incremental = incremental
        self._seen = 0

    def delta(self, chunk: dict[str, Any]) -> Delta:
        """Raises `RequestError` for a request that SGLang gave up."""
        meta: dict[str, Any] = chunk["meta_info"]
        reason = _finish_reason(meta.get("finish_reason"))
        begin = 0 if self._incremental else self._seen
        tokens: list[int] = list(chunk["output_ids"][begin:])
        first = not self._seen
        self._seen += len(tokens)
        return Delta(
            token_ids=tokens,
            logprobs=self._logprobs(meta, begin, len(tokens)),
            finish_reason=reason,
            cached_tokens=int(meta.get("cached_tokens") or 0),
            queue_ms=float(meta.get("queue_time") or 0.0) * 1e3,
            prompt_logprobs=self._prompt_logprobs(meta) if first else None,
        )

    def _logprobs(self, meta: dict[str, Any], begin: int, count: int) -> list[TokenLogprob] | None:
        wanted = self._sampling.logprobs
        if wanted is None:
            return None
        end = begin + count
        chosen = meta.get("output_token_logprobs", [])[begin:end]
        likely = meta.get("output_top_logprobs", [])[begin:end]
        return [_token(entry, likely[i] if i < len(likely) else None, wanted) for i, entry in enumerate(chosen)]

    def _prompt_logprobs(self, meta: dict[str, Any]) -> list[TokenLogprob | None] | None:
        """The first token of the prompt follows nothing and has none."""
        wanted = self._sampling.prompt_logprobs
        if wanted is None:
            return None
        chosen, likely = meta.get("input_token_logprobs", []), meta.get("input_top_logprobs", [])
        return [
            None if entry[0] is None else _token(entry, likely[i] if i < len(likely) else None, wanted)
            for i, entry in enumerate(chosen)
        ]


def _token(entry: Any, likely: Any, wanted: int) -> TokenLogprob:
    """SGLang's entries are (logprob, token id, text)."""
    return TokenLogprob(entry[1], entry[0], [(token, logprob) for logprob, token, *_ in (likely or ())[:wanted]])


def _finish_reason(reason: Any) -> FinishReason | None:
    """Raises `RequestError` where SGLang aborted the request by itself."""
    if reason is None:
        return None
    kind = reason["type"]
    if kind == "stop":
        return "stop"
    if kind == "length":
        return "length"
    status = reason.get("status_code")
    message = " ".join(str(reason.get("message") or "SGLang aborted the request").split())
    raise RequestError(_CODES.get(status or 0, "engine_failure"), message)
