"""Turns an `EngineRequest` into a `Sequence`, or refuses it at once with the reason."""

import secrets
from collections.abc import Iterable

import numpy as np

from dynamo_llm.engines.base import EngineInfo, EngineRequest, RequestError
from dynamo_llm.engines.torch_engine.sequence import Sequence
from kvstore.wire import SamplingParams

_MAX_BIAS = 10_000
"""Far beyond any logit, and far from where float32 ends."""


def make_sequence(request: EngineRequest, info: EngineInfo, submitted_s: float) -> Sequence:
    """Raises `RequestError` for what can never be served."""
    sampling = request.sampling
    if request.lora:
        raise RequestError(
            "invalid_request", f"this engine holds no LoRA adapter {request.lora!r}; ask for the base model"
        )
    if request.kv_transfer_params is not None:
        raise RequestError(
            "invalid_request", "this engine does not take KV blocks from elsewhere; drop kv_transfer_params"
        )
    if sampling.extra:
        raise RequestError(
            "invalid_request",
            f"unknown sampling option {next(iter(sampling.extra))!r}; this engine has none of its own",
        )
    _check_ids("logit_bias", sampling.logit_bias, info)
    _check_ids("stop_token_ids", sampling.stop_token_ids, info)
    # Not `any(... > ...)`: a NaN is no number within the bounds either.
    if not all(abs(bias) <= _MAX_BIAS for bias in sampling.logit_bias.values()):
        raise RequestError("invalid_request", f"logit_bias must be finite numbers from -{_MAX_BIAS} to {_MAX_BIAS}")
    tokens = _prompt(request.token_ids, info)
    prompt_tokens = len(tokens) - request.generated
    return Sequence(
        request.key,
        tokens,
        sampling,
        prompt_tokens=prompt_tokens,
        max_tokens=min(prompt_tokens + (sampling.max_tokens or info.max_context), info.max_context),
        stop_ids=_stop_ids(sampling, info),
        root=(request.lora, request.cache_salt),
        seed=secrets.randbits(64) if sampling.seed is None else sampling.seed % 2**64,
        priority=request.priority,
        submitted_s=submitted_s,
    )


def _prompt(token_ids: bytes, info: EngineInfo) -> list[int]:
    if not token_ids or len(token_ids) % 4:
        raise RequestError("invalid_request", "token_ids must be one or more little-endian uint32")
    tokens = np.frombuffer(token_ids, dtype="<u4")
    if int(tokens.max()) >= info.vocab_size:
        raise RequestError(
            "invalid_request", f"token id {int(tokens.max())} is outside the vocabulary of {info.vocab_size}"
        )
    if len(tokens) >= info.max_context:
        message = f"the prompt has {len(tokens)} tokens; with the answer at most {info.max_context} fit"
        raise RequestError("context_length_exceeded", message)
    return tokens.tolist()


def _stop_ids(sampling: SamplingParams, info: EngineInfo) -> set[int]:
    return {*sampling.stop_token_ids, *(() if sampling.ignore_eos else info.eos_token_ids)}


def _check_ids(field: str, ids: Iterable[int], info: EngineInfo) -> None:
    for token in ids:
        if not 0 <= token < info.vocab_size:
            raise RequestError(
                "invalid_request", f"{field} names token {token}, outside the vocabulary of {info.vocab_size}"
            )
