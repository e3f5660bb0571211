"""What a worker and its engine's process say to each other, in msgpack: orders one way, reports the other.

A request travels as `EngineRequest`, a step as `StepResult`: the structs of `engines/base.py`.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import msgspec
from msgspec import Raw, Struct

from dynamo_llm.engines.base import Duty, EngineInfo, EngineRequest, StepResult
from kvstore.wire import Load

PROTOCOL = 2
"""Grows with each change of these messages that the other side would not understand."""


class Create(Struct, frozen=True, array_like=True, tag="create"):
    """First order: load this model into this engine."""

    engine: str
    folder: str
    model: str
    options: dict[str, Any]
    duty: Duty


class Submit(Struct, frozen=True, array_like=True, tag="submit"):
    key: int
    request: Raw
    """An `EngineRequest`, decoded by itself: one that is wrong ends that request and nothing else."""


class Cancel(Struct, frozen=True, array_like=True, tag="cancel"):
    key: int


class Close(Struct, frozen=True, array_like=True, tag="close"):
    """Last order; answered by `Closed` when the engine has ended its requests."""


Order = Create | Submit | Cancel | Close


class Hello(Struct, frozen=True, array_like=True, tag="hello"):
    """First report, before anything heavy is imported."""

    protocol: int
    version: str


class Failed(Struct, frozen=True, array_like=True, tag="failed"):
    """The engine could not be made; the process ends. `message` is one line that says what to do."""

    message: str


class Ready(Struct, frozen=True, array_like=True, tag="ready"):
    """The model is loaded and the engine steps from now on."""

    info: EngineInfo
    load: Load


class Stepped(Struct, frozen=True, array_like=True, tag="step"):
    result: StepResult
    taken: int
    """Submits that the engine had been given when `load` was read."""
    load: Load
    """What the engine's `load()` says: `result.load`, with what was queued since."""


class Died(Struct, frozen=True, array_like=True, tag="died"):
    """The engine called `on_death`; nothing follows."""

    reason: str


class Closed(Struct, frozen=True, array_like=True, tag="closed"):
    """The engine is closed; nothing follows."""


Report = Hello | Failed | Ready | Stepped | Died | Closed

encode = msgspec.msgpack.Encoder().encode
decode_order = msgspec.msgpack.Decoder(Order).decode
decode_report = msgspec.msgpack.Decoder(Report).decode
decode_request = msgspec.msgpack.Decoder(EngineRequest).decode


def own_version() -> str:
    """Of the dynamo-llm that runs here; empty where it is not installed but found on a path."""
    try:
        return version("dynamo-llm")
    except PackageNotFoundError:
        return ""
