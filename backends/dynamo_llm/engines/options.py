"""Reads an engine's options (`engine_options` of the worker). Engines with a config struct of their own call
`read_options`; the adapters of others' engines take those engines' own arguments, and call the rest."""

import difflib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from dynamo_llm.engines.base import EngineError

_Config = TypeVar("_Config", bound=Struct)


def read_options(engine: str, config: type[_Config], options: Mapping[str, Any]) -> _Config:
    """Numbers may be text, as command lines give them. Raises `EngineError` naming the nearest known option."""
    check_names(engine, options, config.__struct_fields__)
    try:
        return msgspec.convert(dict(options), config, strict=False)
    except msgspec.ValidationError as error:
        raise EngineError(f"{engine} engine options: {error}") from None


def check_names(engine: str, options: Mapping[str, Any], known: Collection[str], taken: Collection[str] = ()) -> None:
    """Raises `EngineError` for an option that is not `known`, naming the nearest, or is `taken`: not the user's."""
    for name in options:
        if name in taken:
            raise EngineError(f"the {engine} engine's option {name!r} is the worker's to set")
        if name not in known:
            near = difflib.get_close_matches(name, sorted(set(known) - set(taken)), n=1, cutoff=0)[0]
            raise EngineError(f"the {engine} engine has no option {name!r}; did you mean {near!r}?")


def lora_folders(modules: Any) -> dict[str, str]:
    """The option `lora_modules`: `{"name": "folder", …}`, or `name=folder` texts as vLLM's own server takes them.

    Raises `EngineError` for what is no folder.
    """
    if isinstance(modules, str):
        modules = modules.split()
    if not isinstance(modules, Mapping):
        pairs = [str(module).partition("=") for module in modules or ()]
        modules = {name: path for name, _, path in pairs}
    for name, path in modules.items():
        if not name or not Path(str(path)).is_dir():
            raise EngineError(f"lora_modules: {path!r} of the adapter {name!r} is no folder")
    return {str(name): str(path) for name, path in modules.items()}
