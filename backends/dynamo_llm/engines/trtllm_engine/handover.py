"""A context from one engine to another: our `kv_transfer_params` and TensorRT-LLM's `DisaggregatedParams`. Pure.

A prefill engine is asked with `{"do_remote_decode": true}`, and its last output carries what the decode engine needs.
The KV blocks themselves go from engine to engine, by TensorRT-LLM's cache transceiver.
"""

import base64
import binascii
from typing import Any

from dynamo_llm.engines.base import RequestError
from dynamo_llm.engines.trtllm_engine.vendor import DisaggregatedParams

_FIELDS = ("first_gen_tokens", "ctx_request_id", "draft_tokens")
"""They are JSON as they are; `opaque_state` is bytes."""


def to_disaggregated(given: dict[str, Any] | None, *, enabled: bool) -> DisaggregatedParams | None:
    """`enabled`: the engine has a cache transceiver. Raises `RequestError`."""
    params = given or {}
    takes = params.get("ctx_request_id") is not None
    if params.get("do_remote_prefill") and not takes:
        raise RequestError("invalid_request", "kv_transfer_params name no context: ctx_request_id is missing")
    if not takes and not params.get("do_remote_decode"):
        return None
    if not enabled:
        message = "this engine neither takes nor gives KV blocks; start it with cache_transceiver_config"
        raise RequestError("invalid_request", message)
    if not takes:
        return DisaggregatedParams(request_type="context_only")
    try:
        state = base64.b64decode(params.get("opaque_state") or "", validate=True)
    except (binascii.Error, ValueError, TypeError):
        raise RequestError("invalid_request", "opaque_state in kv_transfer_params is no base64") from None
    fields = {name: params.get(name) for name in _FIELDS}
    return DisaggregatedParams(request_type="generation_only", opaque_state=state or None, **fields)


def to_transfer(params: DisaggregatedParams | None) -> dict[str, Any] | None:
    """What the decode engine's request needs, of a context that is done. None for any other request."""
    if params is None or params.request_type != "context_only" or params.ctx_request_id is None:
        return None
    state = base64.b64encode(params.opaque_state or b"").decode()
    return {"do_remote_prefill": True, "opaque_state": state, **{name: getattr(params, name) for name in _FIELDS}}
