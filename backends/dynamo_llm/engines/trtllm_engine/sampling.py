"""A request's sampling parameters in TensorRT-LLM's terms, or the reason why they cannot be. No I/O.

`TrtllmEngine.prepare` calls it on the caller's thread, so that what can never be served is refused at once. In 1.2.1
TensorRT-LLM's sampler in torch leaves out in silence what it does not know, and so does its other one: here it is
refused.
"""

from typing import Any

import numpy as np

from dynamo_llm.engines.async_types import nearest, one_line, tokens_left
from dynamo_llm.engines.base import EngineInfo, EngineRequest, RequestError
from dynamo_llm.engines.guided import GUIDED, constraints
from dynamo_llm.engines.trtllm_engine.vendor import GuidedDecodingParams, SamplingParams
from kvstore import wire

_NATIVE_ONLY = frozenset({"bad_token_ids", "no_repeat_ngram_size", "top_p_decay", "top_p_min", "top_p_reset_ids"})
"""Fields that pass through as they are, and that the sampler in torch ignores."""
_EXTRA = _NATIVE_ONLY | {"apply_batched_logits_processor"}
"""Fields that pass through as they are. The others are for text, for several sequences or for results that have no
place on the wire."""
_CONSTRAINTS = ("json", "regex", "grammar", "json_object", "structural_tag")
_WIRE = frozenset(wire.SamplingParams.__struct_fields__)


def to_trtllm(request: EngineRequest, info: EngineInfo, *, in_torch: bool) -> SamplingParams:
    """Raises `RequestError`. `in_torch`: which of TensorRT-LLM's two samplers the engine uses."""
    _check(request, in_torch)
    guided = constraints(request, _CONSTRAINTS)
    try:
        return SamplingParams(
            **_ends(request, info),
            **_choice(request, info),
            **({} if in_torch else _penalties(request)),
            **{name: value for name, value in request.sampling.extra.items() if name in _EXTRA},
            # It counts no token as none wanted, and 0 as well.
            logprobs=None if request.sampling.logprobs is None else max(request.sampling.logprobs, 1),
            guided_decoding=GuidedDecodingParams(**guided) if guided else None,
            detokenize=False,
        )
    except (ValueError, TypeError) as error:
        raise RequestError("invalid_request", one_line(error)) from None


def _ends(request: EngineRequest, info: EngineInfo) -> dict[str, Any]:
    """When the answer ends. An engine without a tokenizer does not know the end-of-sequence tokens by itself, and takes
    one; further ones are stop tokens."""
    p = request.sampling
    end, *more = info.eos_token_ids or (-1,)
    stops = [*([] if p.ignore_eos else more), *p.stop_token_ids]
    left = tokens_left(request, info)
    least = min(max(p.min_tokens - request.generated, 0), left)
    if least and stops:
        # TensorRT-LLM bars the one end-of-sequence token, and no stop token.
        what = "stop_token_ids" if p.stop_token_ids else "a model of several end-of-sequence tokens"
        raise RequestError("invalid_request", f"TensorRT-LLM cannot keep min_tokens with {what}")
    return {
        "end_id": end,
        "pad_id": max(end, 0),
        "ignore_eos": p.ignore_eos,
        "stop_token_ids": stops or None,
        "include_stop_str_in_output": True,  # else it takes the stop token off the answer
        "max_tokens": left,
        "min_tokens": None if p.ignore_eos else least or None,
    }


def _choice(request: EngineRequest, info: EngineInfo) -> dict[str, Any]:
    """How a token is chosen."""
    p = request.sampling
    bias = None
    if p.logit_bias:
        bias = np.zeros(info.vocab_size, dtype=np.float32)
        bias[list(p.logit_bias)] = list(p.logit_bias.values())
    if p.temperature == 0:
        return {"top_k": 1, "embedding_bias": bias}
    return {
        "temperature": p.temperature,
        "top_p": p.top_p,
        "top_k": p.top_k,
        "min_p": p.min_p or None,
        # An earlier attempt has used up the first random numbers.
        "seed": None if p.seed is None else (p.seed + request.generated) % 2**63,
        "embedding_bias": bias,
    }


def _penalties(request: EngineRequest) -> dict[str, Any]:
    p = request.sampling
    return {
        "repetition_penalty": p.repetition_penalty,
        "presence_penalty": p.presence_penalty,
        "frequency_penalty": p.frequency_penalty,
        # Two of the three are over the output only, that of an earlier attempt included.
        "prompt_ignore_length": len(request.token_ids) // 4 - request.generated,
    }


def _check(request: EngineRequest, in_torch: bool) -> None:
    p = request.sampling
    for name in p.extra:
        if name not in _EXTRA and name not in GUIDED:
            near = nearest(name, (*_EXTRA, *GUIDED, *_WIRE))
            raise RequestError("invalid_request", f"unknown sampling option {name!r}; did you mean {near!r}?")
    if p.prompt_logprobs is not None:
        raise RequestError("invalid_request", "TensorRT-LLM gives no prompt_logprobs for the prompt's own tokens")
    if request.priority:
        raise RequestError("invalid_request", "TensorRT-LLM knows no priority of requests")
    unknown = _ignored_in_torch(p) if in_torch else (["logprobs"] if p.logprobs is not None else [])
    if unknown:
        other = "TRTLLMSampler" if in_torch else "TorchSampler"
        message = f"{', '.join(unknown)}: not known to this engine's sampler; start it with sampler_type={other}"
        raise RequestError("invalid_request", message)


def _ignored_in_torch(p: wire.SamplingParams) -> list[str]:
    """Names of what is asked for and would have no effect."""
    asked = {
        "repetition_penalty": p.repetition_penalty != 1,
        "presence_penalty": p.presence_penalty != 0,
        "frequency_penalty": p.frequency_penalty != 0,
        "min_p": p.min_p != 0 and p.temperature != 0,
        "seed": p.seed is not None and p.temperature != 0,
    }
    return [name for name, is_asked in asked.items() if is_asked] + sorted(p.extra.keys() & _NATIVE_ONLY)
