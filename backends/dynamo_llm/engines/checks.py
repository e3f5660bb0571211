"""What every engine refuses alike, told from `EngineInfo` alone. Engines call it at the start of `submit`."""

from collections.abc import Iterable

import numpy as np

from dynamo_llm.engines.base import EngineInfo, EngineRequest, RequestError


def check_request(request: EngineRequest, info: EngineInfo) -> None:
    """Raises `RequestError` for a prompt or token ids that no model of this vocabulary and context can take."""
    _check_prompt(request.token_ids, info)
    tokens = len(request.token_ids) // 4
    if not 0 <= request.generated < tokens:
        raise RequestError(
            "invalid_request", f"generated is {request.generated} of {tokens} tokens: some must be prompt"
        )
    check_ids("logit_bias", request.sampling.logit_bias, info)
    check_ids("stop_token_ids", request.sampling.stop_token_ids, info)


def check_ids(field: str, ids: Iterable[int], info: EngineInfo) -> None:
    for token in ids:
        if not 0 <= token < info.vocab_size:
            raise RequestError(
                "invalid_request", f"{field} names token {token}, outside the vocabulary of {info.vocab_size}"
            )


def _check_prompt(token_ids: bytes, info: EngineInfo) -> None:
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
