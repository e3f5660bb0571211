"""`engine_options` to SGLang's `ServerArgs`. They are its server arguments by their own names, passed untouched.

`SglangEngine` calls it once. What is added where the options say nothing is in `_defaults`, with the reasons.
"""

import json
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

import msgspec
from msgspec import Struct
from sglang.srt.server_args import ServerArgs

from dynamo_llm.engines.base import ALONE, Duty, EngineError
from dynamo_llm.engines.options import check_names

_OWN = ("bootstrap_host", "max_waiting")
"""Options of ours beside SGLang's."""
_TAKEN = frozenset({"model_path", "served_model_name", "custom_sigquit_handler"})
"""Arguments that the worker and the adapter decide."""


class SglangOptions(Struct, frozen=True, kw_only=True):
    """What the constructor needs."""

    args: dict[str, Any]
    """For `sglang.Engine`."""
    events: dict[str, Any]
    """How KV events are published; empty: they are not."""
    loras: frozenset[str]
    """Names of the adapters that requests may ask for."""
    bootstrap_host: str
    """Where decode workers reach this worker's bootstrap server."""
    max_waiting: int


def parse_options(folder: Path, options: Mapping[str, Any], scratch: str, duty: Duty = ALONE) -> SglangOptions:
    """Raises `EngineError` naming the nearest known option. `scratch` is a folder for the sockets of the KV events."""
    known = set(ServerArgs.__struct_fields__) - _TAKEN
    check_names("sglang", options, known.union(_OWN), _TAKEN)
    given = {name: _coerce(name, value) for name, value in options.items() if name not in _OWN}
    args = {**_defaults(given, scratch, duty), **given, "model_path": str(folder)}
    for name in ("dp_size", "attn_dp_size"):
        if (args.get(name) or 1) > 1:
            raise EngineError(f"{name}: start one worker per rank instead; routers balance between workers")
    try:
        events = json.loads(args.get("kv_events_config") or "{}")
        max_waiting = int(options.get("max_waiting", 1024))
    except ValueError as error:
        raise EngineError(f"sglang engine options: {error}") from None
    return SglangOptions(
        args=args,
        events=events if events.get("publisher") == "zmq" else {},
        loras=frozenset(_lora_names(args.get("lora_paths"))),
        bootstrap_host=str(options.get("bootstrap_host", duty.host)),
        max_waiting=max_waiting,
    )


def _defaults(given: Mapping[str, Any], scratch: str, duty: Duty) -> dict[str, Any]:
    defaults: dict[str, Any] = {
        "page_size": 16,  # SGLang's own may be 1: an event, a hash and a lookup for every token
        "enable_priority_scheduling": True,  # a request's priority would be ignored otherwise
        "schedule_low_priority_values_first": True,  # the wire's order
    }
    if duty.hands_over:
        # The bootstrap server of a prefill engine binds `host` (sglang/srt/managers/disagg_service.py).
        defaults |= {"disaggregation_mode": duty.role, "host": duty.host}
    if duty.role == "prefill":
        defaults["disaggregation_bootstrap_port"] = _free_port(duty.host)
    if not given.get("disable_radix_cache"):
        events = {
            "publisher": "zmq",
            "endpoint": f"ipc://{scratch}/events",
            "replay_endpoint": f"ipc://{scratch}/replay",
            "format": "dynamo",  # with the names of LoRA adapters, and hashes that tell them and salts apart
        }
        defaults["kv_events_config"] = json.dumps(events)
    return defaults


def _free_port(host: str) -> int:
    """SGLang's own, 8998, is one for all prefill engines of a machine."""
    try:
        with socket.create_server((host, 0)) as probe:
            return int(probe.getsockname()[1])
    except OSError as error:
        raise EngineError(f"SGLang's bootstrap server cannot listen on {host}: {error.strerror}") from None


def _coerce(name: str, value: Any) -> Any:
    """Numbers may be text, as command lines give them; what is a document to SGLang may be a table."""
    if name.endswith("_config") and isinstance(value, dict):
        return json.dumps(value)
    try:
        return msgspec.convert(value, get_type_hints(ServerArgs, include_extras=True)[name], strict=False)
    except msgspec.ValidationError as error:
        raise EngineError(f"sglang engine options: {name}: {error}") from None
    except (TypeError, NameError, KeyError):  # a type that only SGLang itself can read
        return value


def _lora_names(paths: Any) -> list[str]:
    """Of `lora_paths` in each of its shapes: {name: path}, ["name=path"], ["path"], [{"lora_name": name, ...}]."""
    if isinstance(paths, dict):
        return list(paths)
    return [path["lora_name"] if isinstance(path, dict) else str(path).partition("=")[0] for path in paths or ()]
