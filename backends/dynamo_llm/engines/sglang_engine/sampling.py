"""From an `EngineRequest` to the arguments of SGLang's `async_generate`. Pure, but for the names that SGLang knows."""

import secrets
from typing import Any

from sglang.srt.sampling.sampling_params import SamplingParams as SglangParams

from dynamo_llm.engines.async_types import nearest, prompt_tokens, tokens_left
from dynamo_llm.engines.base import EngineInfo, EngineRequest, RequestError
from kvstore.wire import SamplingParams

_SEEDS = 1 << 63
"""SGLang takes seeds below it."""
_MAPPED = frozenset(
    {
        "max_new_tokens",
        "min_new_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "frequency_penalty",
        "presence_penalty",
        "repetition_penalty",
        "sampling_seed",
        "stop_token_ids",
        "ignore_eos",
        "logit_bias",
    }
)
"""Parameters that the wire has under names of its own."""
_REFUSED = frozenset({"n", "beam_width"})
"""A request is one sequence."""
_INTERNAL = frozenset(
    {
        "stop_strs",
        "stop_regex_strs",
        "stop_str_max_len",
        "stop_regex_max_len",
        "is_normalized",
        "ebnf_full_assistant",
    }
)
"""Fields that SGLang fills itself."""
_ARGUMENTS = frozenset({"custom_logit_processor", "require_reasoning", "session_params", "session_id"})
"""Arguments of `async_generate` that `extra` may name beside sampling parameters."""
_BOOTSTRAP = ("bootstrap_host", "bootstrap_port", "bootstrap_room", "disagg_prefill_dp_rank")


def arguments(request: EngineRequest, info: EngineInfo) -> dict[str, Any]:
    """All of `async_generate` that follows from the request alone. Raises `RequestError`."""
    sampling = request.sampling
    params, more = _split_extra(sampling.extra)
    return {
        "input_ids": prompt_tokens(request),
        "sampling_params": {**params, **_sampling(request, info)},
        "stream": True,
        "lora_path": request.lora or None,
        "cache_salt": request.cache_salt or None,
        "priority": request.priority,
        **_logprobs(sampling),
        **more,
    }


def _sampling(request: EngineRequest, info: EngineInfo) -> dict[str, Any]:
    """Every field of the wire's `SamplingParams`, by SGLang's names."""
    sampling = request.sampling
    left = tokens_left(request, info)
    return {
        "max_new_tokens": left,
        "min_new_tokens": min(max(sampling.min_tokens - request.generated, 0), left),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "min_p": sampling.min_p,
        "frequency_penalty": sampling.frequency_penalty,
        "presence_penalty": sampling.presence_penalty,
        "repetition_penalty": sampling.repetition_penalty,
        "sampling_seed": None if sampling.seed is None else sampling.seed % _SEEDS,
        "stop_token_ids": list(sampling.stop_token_ids) or None,
        "ignore_eos": sampling.ignore_eos,
        "logit_bias": {str(token): bias for token, bias in sampling.logit_bias.items()} or None,
    }


def _logprobs(sampling: SamplingParams) -> dict[str, Any]:
    """SGLang counts the likeliest tokens of prompt and output together: the larger number is asked for."""
    if sampling.logprobs is None and sampling.prompt_logprobs is None:
        return {"return_logprob": False}
    return {
        "return_logprob": True,
        "logprob_start_len": -1 if sampling.prompt_logprobs is None else 0,
        "top_logprobs_num": max(sampling.logprobs or 0, sampling.prompt_logprobs or 0),
    }


def _split_extra(extra: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sampling parameters, and arguments of the call."""
    known = set(SglangParams.__struct_fields__) - _MAPPED - _INTERNAL - _REFUSED
    for name in extra:
        if name in _MAPPED:
            raise RequestError("invalid_request", f"{name!r} is not an extra option: the request has a field for it")
        if name in _REFUSED:
            raise RequestError("invalid_request", f"{name!r} asks for several answers; send several requests")
        if name not in known and name not in _ARGUMENTS:
            near = nearest(name, known | _ARGUMENTS)
            raise RequestError("invalid_request", f"SGLang has no sampling option {name!r}; did you mean {near!r}?")
    params = {name: value for name, value in extra.items() if name in known}
    return params, {name: value for name, value in extra.items() if name in _ARGUMENTS}


def bootstrap(given: dict[str, Any] | None, mode: str, host: str, port: int) -> dict[str, Any]:
    """The bootstrap arguments of a request. `mode` is the engine's `disaggregation_mode`, `host` and `port` are where a
    prefill engine's bootstrap server is reached. Raises `RequestError`.

    A prefill engine draws the room where nobody chose one, as a router does that sends to both sides at once.
    """
    params = given or {}
    found = {name: params[name] for name in _BOOTSTRAP if params.get(name) is not None}
    if mode == "null":
        if found or params.get("do_remote_decode") or params.get("do_remote_prefill"):
            raise RequestError(
                "invalid_request", "this engine neither takes nor gives KV blocks; start it with disaggregation_mode"
            )
        return {}
    if mode == "prefill":
        return {"bootstrap_host": host, "bootstrap_port": port, "bootstrap_room": secrets.randbits(63), **found}
    if not {"bootstrap_host", "bootstrap_room"} <= found.keys():
        raise RequestError(
            "invalid_request",
            "a decode engine needs bootstrap_host and bootstrap_room of the prefill engine in kv_transfer_params",
        )
    return found
