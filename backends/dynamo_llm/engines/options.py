"""Reads an engine's options (`engine_options` of the worker) into its config struct. Engines with structs call it."""

import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from dynamo_llm.engines.base import EngineError

_Config = TypeVar("_Config", bound=Struct)


def read_options(engine: str, config: type[_Config], options: Mapping[str, Any]) -> _Config:
    """Numbers may be text, as command lines give them. Raises `EngineError` naming the nearest known option."""
    known = config.__struct_fields__
    for key in options:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0)[0]
            raise EngineError(f"the {engine} engine has no option {key!r}; did you mean {near!r}?")
    try:
        return msgspec.convert(dict(options), config, strict=False)
    except msgspec.ValidationError as error:
        raise EngineError(f"{engine} engine options: {error}") from None
