"""Reads a recording of `record_api.py`, and refuses what the recorded package would refuse.

The adapters' tests build their stand-ins from it: below the package's own boundary, with its names and signatures.
"""

import inspect
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest


class Recording:
    """One package at one version."""

    def __init__(self, path: Path) -> None:
        data = json.loads(path.read_text())
        self.version: str = data["version"]
        self.fields: dict[str, list[str]] = data["fields"]
        self.attributes: dict[str, list[str]] = data["attributes"]
        self.keys: dict[str, list[str]] = data.get("keys", {})
        """Of maps that functions write, by the function."""
        self._functions: dict[str, Any] = data["functions"]

    def bind(self, function: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The arguments by name, without defaults. Raises `TypeError` for a call that the signature does not allow."""
        return dict(self.signature(function).bind(*args, **kwargs).arguments)

    def signature(self, function: str) -> inspect.Signature:
        parameters = [
            inspect.Parameter(
                name, getattr(inspect.Parameter, kind), default=None if optional else inspect.Parameter.empty
            )
            for name, kind, optional in self._functions[function]["parameters"]
        ]
        return inspect.Signature(parameters)

    def struct(self, name: str, **more: Any) -> Any:
        """A class with the recorded fields, all of them optional, and no others."""
        return msgspec.defstruct(name, [(field, Any, None) for field in self.fields[name]], kw_only=True, **more)


def install(monkeypatch: pytest.MonkeyPatch, modules: dict[str, dict[str, Any]]) -> None:
    """Make modules importable by name for one test, and forget the adapters that were imported over others."""
    for name, content in modules.items():
        module = ModuleType(name)
        module.__path__ = []
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)


def forget(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """Let a package of ours be imported anew, now and after the test."""
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
