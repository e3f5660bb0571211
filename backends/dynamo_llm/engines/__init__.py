"""Engines, by name. An engine's package is imported when that engine is chosen, and not before."""

import difflib
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from dynamo_llm.engines.base import Engine, EngineError

_ENGINES = {
    "torch": ("dynamo_llm.engines.torch_engine.engine", "TorchEngine", "worker"),
    "mock": ("dynamo_llm.engines.mock_engine.engine", "MockEngine", "worker"),
    "vllm": ("dynamo_llm.engines.vllm_engine.engine", "VllmEngine", "vllm"),
    "sglang": ("dynamo_llm.engines.sglang_engine.engine", "SglangEngine", "sglang"),
    "trtllm": ("dynamo_llm.engines.trtllm_engine.engine", "TrtllmEngine", "trtllm"),
}
"""Name: module, class, and the extra that installs what the module imports."""


def check_engine(name: str) -> None:
    """Raises `EngineError` for a name that no engine has. Imports nothing."""
    if name not in _ENGINES:
        near = difflib.get_close_matches(name, _ENGINES, n=1, cutoff=0)[0]
        raise EngineError(f"there is no engine {name!r}; did you mean {near!r}?")


def create_engine(name: str, model_path: str | Path, model_name: str, options: Mapping[str, Any]) -> Engine:
    """Load a model into an engine; seconds to minutes. `start` it afterwards.

    Raises `EngineError` for an unknown engine or option, a package that is not installed, and a model that it cannot
    run.
    """
    check_engine(name)
    module, factory, extra = _ENGINES[name]
    try:
        make = getattr(import_module(module), factory)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("dynamo_llm"):
            raise
        message = f"the {name} engine needs the package {error.name}: pip install 'dynamo-llm[{extra}]'"
        raise EngineError(message) from None
    engine: Engine = make(Path(model_path), model_name, dict(options))
    return engine
