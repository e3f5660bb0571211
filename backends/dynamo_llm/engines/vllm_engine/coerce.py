"""Values from JSON and command lines, turned into the types that vLLM's own classes declare for them.

`options.py` uses it for engine arguments, `sampling.py` for sampling parameters: both go to vLLM by vLLM's names, and
vLLM's annotations decide what they may be.
"""

import json
import sys
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError, PydanticUserError


@lru_cache
def _adapter(owner: type, name: str) -> "TypeAdapter[Any] | None":
    """None where the annotation is of a kind that only vLLM itself can check."""
    try:
        return TypeAdapter(_hint(owner, name))
    except (PydanticSchemaGenerationError, PydanticUserError, KeyError, NameError):
        return None


def _hint(owner: type, name: str) -> Any:
    """One name by itself: vLLM's classes also name types that exist for type checkers only. Raises `KeyError` for a
    name without an annotation, and `NameError`."""
    base = next((base for base in owner.__mro__ if name in vars(base).get("__annotations__", {})), owner)
    single = SimpleNamespace(__annotations__={name: base.__annotations__[name]})
    return get_type_hints(single, vars(sys.modules[base.__module__]), include_extras=True)[name]


def coerce(owner: type, name: str, value: Any) -> Any:
    """`value` as the field `name` of `owner` wants it; text that is JSON is read where the field holds no text.

    Raises `ValueError`, in one line that names the field.
    """
    adapter = _adapter(owner, name)
    if adapter is None or value is None:
        return value
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        reason = _first(error)
    if isinstance(value, str):
        try:
            return adapter.validate_python(json.loads(value))
        except (ValidationError, ValueError):
            pass  # the text itself was wrong, and `reason` says how
    raise ValueError(f"{name}: {reason}")


def _first(error: ValidationError) -> str:
    """pydantic lists what is wrong with each branch of a union; the first says enough, and where."""
    entry = error.errors(include_url=False, include_context=False)[0]
    return f"{entry['msg']}, not {entry['input']!r}"
