"""Turns an `EngineRequest` into a `Sequence`, or refuses it at once with the reason."""

import secrets

import numpy as np

from dynamo_llm.engines.base import EngineInfo, EngineRequest, RequestError
from dynamo_llm.engines.checks import check_request
from dynamo_llm.engines.torch_engine.handover import check_params
from dynamo_llm.engines.torch_engine.sequence import Sequence
from kvstore.wire import SamplingParams

_MAX_BIAS = 10_000
"""Far beyond any logit, and far from where float32 ends."""


def make_sequence(request: EngineRequest, info: EngineInfo, submitted_s: float) -> Sequence:
    """Raises `RequestError` for what can never be served."""
    check_request(request, info)
    sampling = request.sampling
    if request.lora:
        raise RequestError(
            "invalid_request", f"this engine holds no LoRA adapter {request.lora!r}; ask for the base model"
        )
    exports = _exports(request)
    if sampling.extra:
        raise RequestError(
            "invalid_request",
            f"unknown sampling option {next(iter(sampling.extra))!r}; this engine has none of its own",
        )
    # Not `any(... > ...)`: a NaN is no number within the bounds either.
    if not all(abs(bias) <= _MAX_BIAS for bias in sampling.logit_bias.values()):
        raise RequestError("invalid_request", f"logit_bias must be finite numbers from -{_MAX_BIAS} to {_MAX_BIAS}")
    tokens = np.frombuffer(request.token_ids, dtype="<u4").tolist()
    prompt_tokens = len(tokens) - request.generated
    sequence = Sequence(
        request.key,
        tokens,
        sampling,
        prompt_tokens=prompt_tokens,
        max_tokens=len(tokens) + 1
        if exports
        else min(prompt_tokens + (sampling.max_tokens or info.max_context), info.max_context),
        stop_ids=_stop_ids(sampling, info),
        root=(request.lora, request.cache_salt),
        seed=secrets.randbits(64) if sampling.seed is None else sampling.seed % 2**64,
        priority=request.priority,
        submitted_s=submitted_s,
    )
    sequence.exports = exports
    if not exports:
        sequence.remote = request.kv_transfer_params
    return sequence


def _exports(request: EngineRequest) -> bool:
    """Whether it is a prefill for another worker."""
    if request.kv_transfer_params is None:
        return False
    try:
        return check_params(request.kv_transfer_params)
    except ValueError as error:
        raise RequestError("invalid_request", str(error)) from None


def _stop_ids(sampling: SamplingParams, info: EngineInfo) -> set[int]:
    return {*sampling.stop_token_ids, *(() if sampling.ignore_eos else info.eos_token_ids)}
