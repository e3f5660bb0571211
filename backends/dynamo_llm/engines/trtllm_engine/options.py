"""`engine_options` to the arguments of TensorRT-LLM's `LLM` (PyTorch backend), by its own names, passed untouched.

`TrtllmEngine` calls it once. What is added where the options say nothing is in `_defaults`, with the reasons.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct

from dynamo_llm.engines.base import ALONE, Duty, EngineError
from dynamo_llm.engines.options import check_names, lora_folders
from dynamo_llm.engines.trtllm_engine.vendor import LoRARequest, TorchLlmArgs

_OWN = ("lora_modules", "max_waiting")
"""Options of ours beside TensorRT-LLM's."""
_TAKEN = frozenset({"model"})
"""Arguments that the worker decides."""
_EVENTS = 65536
"""KV events that TensorRT-LLM keeps for us; we fetch them ten times a second."""


class TrtllmOptions(Struct, frozen=True, kw_only=True):
    """What the constructor needs."""

    args: dict[str, Any]
    """For `LLM`."""
    loras: dict[str, LoRARequest]
    """Adapters by the name that requests give."""
    max_waiting: int

    @property
    def publishes_events(self) -> bool:
        return bool(self.args["kv_cache_config"]["event_buffer_max_size"] and self.reuses_blocks)

    @property
    def reuses_blocks(self) -> bool:
        return bool(self.args["kv_cache_config"].get("enable_block_reuse", True))

    @property
    def samples_in_torch(self) -> bool:
        """TensorRT-LLM has two samplers; its own default, in torch, can do less."""
        return bool(self.args.get("sampler_type") != "TRTLLMSampler")


def parse_options(folder: Path, options: Mapping[str, Any], duty: Duty = ALONE) -> TrtllmOptions:
    """Raises `EngineError` naming the nearest known option."""
    check_names("trtllm", options, {*TorchLlmArgs.model_fields, *_OWN}, _TAKEN)
    folders = lora_folders(options.get("lora_modules"))
    given = {name: _table(value) for name, value in options.items() if name not in _OWN}
    args = {**_defaults(given, folders, duty), **given, "model": str(folder)}
    cache = args.get("kv_cache_config", {})
    if not isinstance(cache, Mapping):
        raise EngineError("trtllm engine options: kv_cache_config must be a table of KvCacheConfig's fields")
    reuses = cache.get("enable_block_reuse", True)
    args["kv_cache_config"] = {"event_buffer_max_size": _EVENTS if reuses else 0, **cache}
    if args.get("enable_attention_dp"):
        raise EngineError("enable_attention_dp: start one worker per rank instead; routers balance between workers")
    try:
        loras = {
            name: LoRARequest(lora_name=name, lora_int_id=number, lora_path=path)
            for number, (name, path) in enumerate(folders.items(), 1)
        }
        max_waiting = int(options.get("max_waiting", 1024))
    except ValueError as error:
        raise EngineError(f"trtllm engine options: {error}") from None
    return TrtllmOptions(args=args, loras=loras, max_waiting=max_waiting)


def _defaults(given: Mapping[str, Any], folders: Mapping[str, str], duty: Duty) -> dict[str, Any]:
    defaults: dict[str, Any] = {
        "enable_iter_perf_stats": True,  # the size of the KV cache and the load come with them
        # Prompts and answers are tokens; guided decoding alone has to know how they are spelt.
        "skip_tokenizer_init": not given.get("guided_decoding_backend"),
    }
    if duty.hands_over:
        defaults["cache_transceiver_config"] = {"backend": "DEFAULT"}
    if duty.role == "prefill":
        # Contexts for others cannot be computed with it (docs/source/features/disagg-serving.md of TensorRT-LLM).
        defaults["disable_overlap_scheduler"] = True
    if folders:
        defaults["lora_config"] = {
            "lora_dir": list(folders.values())[:1],  # it takes one, and reads off it which layers adapters change
            "max_loras": len(folders),
            "max_cpu_loras": len(folders),
        }
    return defaults


def _table(value: Any) -> Any:
    """A command line gives tables and lists as JSON; what else is text, TensorRT-LLM reads itself."""
    if not isinstance(value, str) or value[:1] not in ("{", "["):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise EngineError(f"trtllm engine options: {value!r} is no JSON: {error}") from None
