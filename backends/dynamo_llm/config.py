"""What a worker is told: read once, at the entry points, and validated here and nowhere else."""

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from kvstore.cards import Role

MODEL_NAME_LIMIT = 48
"""Unix sockets of the Triton host carry the model's name, and a socket's path holds 107 bytes."""

Dialect = Literal["vllm", "tensorrtllm"]
"""Whose clients a public model is for: vllm_backend's or tensorrtllm_backend's."""

_Port = Annotated[int, Meta(ge=0, le=65535)]
_Seconds = Annotated[float, Meta(gt=0)]
_MODEL_NAME = re.compile(r"[A-Za-z0-9._-]+")


_OPTIONS = {
    "model": "model_path",
    "name": "model_name",
    "redis": "redis_url",
    "lease_ttl": "lease_ttl_s",
    "drain_timeout": "drain_timeout_s",
}
"""What the command line calls otherwise than `WorkerConfig`; a file may use both."""


class ConfigError(ValueError):
    """A worker cannot be started like this. The message is one line that says what to change."""


class WorkerConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One worker: one engine (or several) behind one Triton server."""

    model_path: str
    """A Hugging Face folder, or an entry of a Triton model repository (see `resolve_model`)."""
    model_name: str = ""
    """Name that clients use; empty: the folder's."""
    dialect: Dialect = "vllm"
    """The one that the model itself speaks; the other one is served as its companion (see `public.tensors.faces`)."""
    exclude_input_in_output: bool = False
    """Whether tensorrtllm_backend's clients get the answer without the prompt where they do not say, as Triton's OpenAI
    frontend does not for chats. Called as in that backend's configuration."""
    engine: str = "torch"
    engine_options: dict[str, Any] = {}
    """Passed to the engine untouched."""
    python: str = ""
    """Interpreter of the environment that the engine lives in, in a process of its own; empty: this process."""
    instances: Annotated[int, Meta(ge=1, le=256)] = 1
    """Engines in this worker, each an instance of its own to routers."""
    engine_restarts: Annotated[int, Meta(ge=0)] = 5
    """How often in a row an engine that died is started again before the worker is given up."""
    role: Role = "agg"
    namespace: str = "default"
    component: str = "worker"
    endpoint: str = "generate"
    redis_url: str = "redis://127.0.0.1:6379"
    key_prefix: str = "dynamo"
    host: str = "127.0.0.1"
    """IPv4 address or name that Triton and the metrics server bind."""
    advertise_host: str = ""
    """Address that routers are told; empty: `host`, or this machine's address where `host` is 0.0.0.0."""
    grpc_port: _Port = 0
    http_port: _Port = 0
    metrics_port: _Port = 0
    """0, for each port: a free one."""
    lease_ttl_s: _Seconds = 10.0
    heartbeat_s: _Seconds = 1.0
    """Between digests on the event stream."""
    session_timeout_s: _Seconds = 5.0
    """A router that sends no control batch for so long is gone; its requests are cancelled."""
    drain_timeout_s: Annotated[float, Meta(ge=0)] = 30.0
    """How long requests in flight may go on after SIGTERM before they are cancelled."""
    max_inflight: Annotated[int, Meta(ge=1)] = 1024
    """Requests admitted at once, waiting and running; more are refused with `overloaded`."""
    max_payload_bytes: Annotated[int, Meta(ge=1024)] = 32 << 20
    """Largest control batch."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, strict: bool = True) -> "WorkerConfig":
        """Raises `ConfigError` for a wrong value, and for an unknown key with the nearest known one.

        Not `strict`: numbers may be strings."""
        for key in values:
            if key not in cls.__struct_fields__:
                near = difflib.get_close_matches(key, cls.__struct_fields__, n=1)
                raise ConfigError(f"unknown option {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        try:
            config = msgspec.convert(dict(values), cls, strict=strict)
        except msgspec.ValidationError as error:
            raise ConfigError(f"worker options: {error}") from None
        if ":" in config.host:
            raise ConfigError(f"host {config.host!r} cannot be bound: a worker listens on IPv4 only, like 0.0.0.0")
        return config


def by_field(values: Mapping[str, Any]) -> dict[str, Any]:
    """A file's options by the names of `WorkerConfig`'s fields."""
    return {_OPTIONS.get(key, key): value for key, value in values.items()}


def resolve_model(path: str, name: str = "") -> tuple[Path, str]:
    """The Hugging Face folder behind `path`, and the model's name.

    `path` is such a folder (it holds `config.json`) or an entry of a Triton model repository:
    `DIR/1/model/config.json`, where the highest version counts. Raises `ConfigError`.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        raise ConfigError(f"model folder {path!r} does not exist")
    folder = root if (root / "config.json").is_file() else _repository_model(root)
    if folder is None:
        raise ConfigError(f"{path!r} is no model: it holds neither config.json nor 1/model/config.json")
    name = name or root.resolve().name
    if not _MODEL_NAME.fullmatch(name) or len(name) > MODEL_NAME_LIMIT:
        raise ConfigError(
            f"model name {name!r} cannot be served: use at most {MODEL_NAME_LIMIT} letters, digits, '.', '_' and '-'"
        )
    return folder, name


def _repository_model(root: Path) -> Path | None:
    versions = sorted((int(entry.name) for entry in root.iterdir() if entry.name.isdecimal()), reverse=True)
    folders = (root / str(version) / "model" for version in versions)
    return next((folder for folder in folders if (folder / "config.json").is_file()), None)
