"""How an operator tells a model on a tritonserver what to run: `parameters` of its config.pbtxt, and `1/model.json`."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from dynamo_llm.config import ConfigError, WorkerConfig, by_field

REDIS_VARIABLE = "DYNAMO_LLM_REDIS"
GRPC_PORT = 8001
_DEFAULT_PORTS = {"http": 8000, "grpc": GRPC_PORT, "metrics": 8002}
_NOT_HERE = {"instances": "load the model under several names instead"}


def read(model: str, folder: Path, parameters: Mapping[str, str], server: Mapping[str, str]) -> WorkerConfig:
    """Parameters over the file over the defaults; the address of Redis in the environment over all of them.

    `folder` is the version's, with `model.json` and the default for `model`, `model/`; `server` are the flags of the
    tritonserver. Raises `ConfigError`.
    """
    values = {**_defaults(server), **_file(folder / "model.json"), **_parameters(parameters)}
    if redis := os.environ.get(REDIS_VARIABLE):
        values["redis_url"] = redis
    for key, instead in _NOT_HERE.items():
        if values.pop(key, None) is not None:
            raise ConfigError(f"{key} cannot be set on a tritonserver: {instead}")
    path = values.get("model_path", "model")
    if not isinstance(path, str):
        raise ConfigError(f"model must be a text, the path of a folder, not {path!r}")
    values["model_path"] = str(folder / path)
    values.setdefault("model_name", model)
    return WorkerConfig.from_dict(values, strict=False)  # a parameter is always a string


def flags_of(command: bytes) -> dict[str, str]:
    """The flags of a tritonserver by name, from its /proc/PID/cmdline; `--a=b`, `--a b` or `--a`; the last one wins."""
    flags: dict[str, str] = {}
    bare = ""
    for argument in command.decode(errors="replace").rstrip("\0").split("\0")[1:]:
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            flags[name] = value
            bare = "" if equals else name
        elif bare:
            flags[bare], bare = argument, ""
    return flags


def _defaults(server: Mapping[str, str]) -> dict[str, Any]:
    """What the server itself was told; each may be set otherwise, for a proxy or a mapped port."""
    ports = {f"{kind}_port": _port(server, f"{kind}-port") or port for kind, port in _DEFAULT_PORTS.items()}
    return {**ports, "host": server.get("grpc-address") or "0.0.0.0"}


def _port(server: Mapping[str, str], flag: str) -> int:
    value = server.get(flag, "")
    if value and not value.isdecimal():
        raise ConfigError(f"--{flag}={value} of the tritonserver is no port")
    return int(value or 0)


def _file(path: Path) -> dict[str, Any]:
    try:
        values = msgspec.json.decode(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path.name} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path.name} must hold an object of options")
    return by_field(values)


def _parameters(parameters: Mapping[str, str]) -> dict[str, Any]:
    """Those in capitals are the python backend's own."""
    values: dict[str, Any] = by_field({key: value for key, value in parameters.items() if not key.isupper()})
    if "engine_options" in values:
        try:
            values["engine_options"] = json.loads(values["engine_options"])
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"the parameter engine_options is no JSON: {error}") from None
    return values
