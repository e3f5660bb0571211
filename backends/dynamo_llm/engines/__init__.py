"""Engines, by name. An engine's package is imported when that engine is chosen, and not before."""

import difflib
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from dynamo_llm.engines.base import ALONE, Duty, Engine, EngineError


class _Kind(NamedTuple):
    """Where an engine is found."""

    module: str
    factory: str
    package: str
    """What it imports of others; empty: nothing."""
    extra: str
    """Installs that."""
    moves_blocks: bool = False
    """Its KV blocks move by its own means, which its role decides: it is made with its `Duty`."""


_ENGINES = {
    "torch": _Kind("dynamo_llm.engines.torch_engine.engine", "TorchEngine", "torch", "worker"),
    "mock": _Kind("dynamo_llm.engines.mock_engine.engine", "MockEngine", "", ""),
    "vllm": _Kind("dynamo_llm.engines.vllm_engine.engine", "VllmEngine", "vllm", "vllm", True),
    "sglang": _Kind("dynamo_llm.engines.sglang_engine.engine", "SglangEngine", "sglang", "sglang", True),
    "trtllm": _Kind("dynamo_llm.engines.trtllm_engine.engine", "TrtllmEngine", "tensorrt_llm", "trtllm", True),
}


def check_engine(name: str) -> None:
    """Raises `EngineError` for a name that no engine has. Imports nothing."""
    if name not in _ENGINES:
        near = difflib.get_close_matches(name, _ENGINES, n=1, cutoff=0)[0]
        raise EngineError(f"there is no engine {name!r}; did you mean {near!r}?")


def create_engine(
    name: str,
    model_path: str | Path,
    model_name: str,
    options: Mapping[str, Any],
    python: str = "",
    duty: Duty = ALONE,
) -> Engine:
    """Load a model into an engine; seconds to minutes. `start` it afterwards.

    `python`: an interpreter, in whose environment the engine lives in a process of its own; empty: here. Raises
    `EngineError` for an unknown engine or option, a package that is not installed, and a model that it cannot run.
    """
    check_engine(name)
    kind = _ENGINES[name]
    if python:
        return _create_isolated(name, kind, Path(model_path), model_name, dict(options), python, duty)
    try:
        make = getattr(import_module(kind.module), kind.factory)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("dynamo_llm"):
            raise
        raise EngineError(_how_to_install(name, kind, error.name or kind.package)) from None
    more = {"duty": duty} if kind.moves_blocks else {}
    engine: Engine = make(Path(model_path), model_name, dict(options), **more)
    return engine


def _create_isolated(
    name: str, kind: _Kind, folder: Path, model: str, options: dict[str, Any], python: str, duty: Duty
) -> Engine:
    from dynamo_llm.engines.isolated.engine import IsolatedEngine
    from dynamo_llm.engines.isolated.interpreter import check_interpreter

    return IsolatedEngine(name, folder, model, options, check_interpreter(python, kind.extra, kind.package), duty)


def _how_to_install(name: str, kind: _Kind, missing: str) -> str:
    """One line. The worker's own packages go here; an engine of others into an environment of its own."""
    install = f"pip install 'dynamo-llm[{kind.extra}]'"
    where = "" if kind.extra == "worker" else " in an environment of its own, and name that by python=DIR/bin/python"
    return f"the {name} engine needs the package {missing}: {install}{where}"
