"""A request's sampling parameters in vLLM's terms, or the reason why they cannot be. No I/O.

`VllmEngine.prepare` calls it on the caller's thread, so that what can never be served is refused at once.
"""

from collections import Counter
from typing import Any

import numpy as np
from vllm.exceptions import VLLMClientError
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

from dynamo_llm.engines.async_types import nearest, one_line, tokens_left
from dynamo_llm.engines.base import EngineInfo, EngineRequest, RequestError
from dynamo_llm.engines.guided import GUIDED, constraints
from dynamo_llm.engines.vllm_engine.coerce import coerce
from kvstore import wire

_MAX_BIAS = 10_000
"""Far beyond any logit, and far from where float32 ends."""
_TEXT = frozenset(
    {"stop", "include_stop_str_in_output", "skip_special_tokens", "spaces_between_special_tokens", "detokenize"}
)
"""vLLM's options for the text, which is made from the tokens elsewhere: by the router or the public model."""
_FIXED = frozenset({"n", "output_kind", "skip_clone", "output_text_buffer_length"})
"""Not a request's to choose: one sequence, its new tokens at each step."""
_OURS = ("truncate_prompt_tokens", "vllm_xargs", *GUIDED)

_WIRE = frozenset(wire.SamplingParams.__struct_fields__)
_EXTRA = sorted(
    {name for name in SamplingParams.__struct_fields__ if not name.startswith("_")}.difference(
        _TEXT, _FIXED, _WIRE, _OURS
    )
)
"""Fields of vLLM's that pass through as they are."""
_CONSTRAINTS = sorted(name for name in StructuredOutputsParams.__dataclass_fields__ if not name.startswith("_"))


def to_vllm(request: EngineRequest, info: EngineInfo) -> SamplingParams:
    """Raises `RequestError`. vLLM has its say on the combination when it takes the request."""
    p = request.sampling
    try:
        return SamplingParams(
            **_counts(request, info),
            **_penalties(request),
            **_extras(request),
            temperature=p.temperature,
            top_p=p.top_p,
            top_k=p.top_k,
            min_p=p.min_p,
            # An earlier attempt has used up the first random numbers.
            seed=None if p.seed is None else (p.seed + request.generated) % 2**63,
            stop_token_ids=list(p.stop_token_ids),
            ignore_eos=p.ignore_eos,
            logprobs=p.logprobs,
            prompt_logprobs=p.prompt_logprobs,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            skip_clone=True,
        )
    except (ValueError, TypeError, VLLMClientError) as error:
        raise RequestError("invalid_request", one_line(error)) from None


def prompt_ids(request: EngineRequest) -> list[int]:
    """The prompt, cut to its last `truncate_prompt_tokens` where the request says so; an earlier attempt's tokens stay.

    Raises `RequestError`.
    """
    tokens = np.frombuffer(request.token_ids, dtype="<u4")
    keep = request.sampling.extra.get("truncate_prompt_tokens")
    if keep is not None:
        if not isinstance(keep, int) or keep < 1:
            raise RequestError("invalid_request", f"truncate_prompt_tokens must be at least 1, not {keep!r}")
        tokens = tokens[-(keep + request.generated) :]
    ids: list[int] = tokens.tolist()
    return ids


def _counts(request: EngineRequest, info: EngineInfo) -> dict[str, int]:
    """How many tokens are to come. What an earlier attempt generated is part of vLLM's prompt, so it is taken off."""
    p = request.sampling
    max_tokens = tokens_left(request, info)
    min_tokens = max(p.min_tokens - request.generated, 0)
    if p.ignore_eos and not p.stop_token_ids:
        min_tokens = 0  # nothing ends the sequence early; vLLM would bar end-of-sequence all the same
    return {"max_tokens": max_tokens, "min_tokens": min(min_tokens, max_tokens)}


def _penalties(request: EngineRequest) -> dict[str, Any]:
    """Penalties, and logit bias. vLLM counts only what it generated itself as output: the penalties on what an earlier
    attempt generated are added as a bias. That is exact for `frequency_penalty`; `presence_penalty` falls on a token
    a second time when it comes again."""
    p = request.sampling
    # Not `any(... > ...)`: a NaN is no number within the bounds either.
    if not all(abs(bias) <= _MAX_BIAS for bias in p.logit_bias.values()):
        raise RequestError("invalid_request", f"logit_bias must be finite numbers from -{_MAX_BIAS} to {_MAX_BIAS}")
    bias = dict(p.logit_bias)
    if request.generated and (p.presence_penalty or p.frequency_penalty):
        output = np.frombuffer(request.token_ids, dtype="<u4")[-request.generated :].tolist()
        for token, count in Counter(output).items():
            bias[token] = bias.get(token, 0.0) - p.presence_penalty - p.frequency_penalty * count
    return {
        "logit_bias": bias or None,
        "presence_penalty": p.presence_penalty,
        "frequency_penalty": p.frequency_penalty,
        "repetition_penalty": p.repetition_penalty,
    }


def _extras(request: EngineRequest) -> dict[str, Any]:
    """vLLM's options beyond the wire's own, and what rides in its `extra_args`."""
    extra = dict(request.sampling.extra)
    for name in extra:
        _check_name(name)
    values = {name: coerce(SamplingParams, name, value) for name, value in extra.items() if name in _EXTRA}
    guided = constraints(request, _CONSTRAINTS)
    if guided:
        values["structured_outputs"] = coerce(SamplingParams, "structured_outputs", guided)
    arguments = {**(values.pop("extra_args", None) or {}), **(extra.get("vllm_xargs") or {})}
    if request.kv_transfer_params is not None:
        arguments["kv_transfer_params"] = request.kv_transfer_params
    return {**values, "extra_args": arguments or None}


def _check_name(name: str) -> None:
    if name in _EXTRA or name in _OURS:
        return
    if name in _TEXT or name in _FIXED:
        raise RequestError("invalid_request", f"the sampling option {name!r} does not concern the engine: drop it")
    near = nearest(name, (*_EXTRA, *_OURS, *_WIRE))
    raise RequestError("invalid_request", f"unknown sampling option {name!r}; did you mean {near!r}?")
