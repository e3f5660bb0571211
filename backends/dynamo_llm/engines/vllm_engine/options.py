"""`engine_options` to vLLM's `AsyncEngineArgs`. They are vLLM's engine arguments by their own names, passed untouched.

`VllmEngine` calls it once. What is added where the options say nothing is in `_defaults`, with the reasons.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
from msgspec import Struct
from vllm.config import KVEventsConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform

from dynamo_llm.engines.async_types import one_line
from dynamo_llm.engines.base import ALONE, Duty, EngineError
from dynamo_llm.engines.options import check_names, lora_folders
from dynamo_llm.engines.vllm_engine.coerce import coerce
from dynamo_llm.engines.vllm_engine.transfer import connector

_OWN = ("lora_modules", "max_waiting")
"""Options of ours beside vLLM's."""
_TAKEN = frozenset({"model", "served_model_name"})
"""Arguments that the worker decides."""
_CPU_KV_SHARE = 0.1
"""Of the free memory, for the KV cache on a CPU."""


class VllmOptions(Struct, frozen=True):
    """What the constructor needs."""

    args: AsyncEngineArgs
    loras: dict[str, LoRARequest]
    """Adapters by the name that requests give."""
    max_waiting: int


def parse_options(
    folder: Path,
    options: Mapping[str, Any],
    events: KVEventsConfig,
    duty: Duty = ALONE,
) -> VllmOptions:
    """Raises `EngineError` naming the nearest known option. `events` is used unless the options bring their own."""
    known = {field.name for field in dataclasses.fields(AsyncEngineArgs) if field.init} - _TAKEN
    check_names("vllm", options, known.union(_OWN), _TAKEN)
    folders = lora_folders(options.get("lora_modules"))
    loras = {name: LoRARequest(name, number, path) for number, (name, path) in enumerate(folders.items(), 1)}
    given = {name: value for name, value in options.items() if name not in _OWN}
    values = {**_defaults(given, events, len(loras), duty), **given}
    try:
        arguments = {name: coerce(AsyncEngineArgs, name, value) for name, value in values.items()}
        max_waiting = int(options.get("max_waiting", 1024))
        args = AsyncEngineArgs(model=str(folder), **arguments)
    except (ValueError, TypeError) as error:
        raise EngineError(f"vllm engine options: {one_line(error)}") from None
    if args.data_parallel_size > 1:
        raise EngineError("data_parallel_size: start one worker per rank instead; routers balance between workers")
    return VllmOptions(args, loras, max_waiting)


def _defaults(given: Mapping[str, Any], events: KVEventsConfig, loras: int, duty: Duty) -> dict[str, Any]:
    defaults: dict[str, Any] = {
        "scheduling_policy": "priority",  # a request's priority would be ignored; equal ones are served as they come
        "max_logprobs": 100,  # as many as the wire allows
        "disable_log_stats": True,  # vLLM's own lines in the log: the worker has metrics
    }
    if given.get("enable_prefix_caching", True):
        defaults["kv_events_config"] = events
    if "kv_transfer_config" not in given and (config := connector(duty)) is not None:
        defaults["kv_transfer_config"] = config
    if loras:
        defaults["enable_lora"] = True
        if current_platform.is_cpu():
            # To a request without an adapter, in a batch with one that has, vLLM's CPU kernels add the weights in the
            # last place (0.32.0; vllm-project/vllm#48421). With a place more than there are adapters it is empty.
            defaults["max_loras"] = loras + 1
    says_memory = {"gpu_memory_utilization", "kv_cache_memory_bytes"} & given.keys()
    if current_platform.is_cpu() and not says_memory and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        # vLLM would take 92 % of the machine's memory, and not start where something else runs on it.
        defaults["kv_cache_memory_bytes"] = int(psutil.virtual_memory().available * _CPU_KV_SHARE)
    return defaults
