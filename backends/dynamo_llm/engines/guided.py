"""Guided decoding as requests ask for it in `extra`, the same for every engine that knows it. Pure.

`extra["structured_outputs"]` is a map of constraints; `guided_json` and its like are older names for single ones. The
adapters call it with the constraints that their engine has.
"""

from collections.abc import Collection, Mapping
from typing import Any

from dynamo_llm.engines.async_types import nearest
from dynamo_llm.engines.base import EngineRequest, RequestError

_SINGLE = {f"guided_{kind}": kind for kind in ("json", "regex", "choice", "grammar", "json_object")} | {
    "guided_whitespace_pattern": "whitespace_pattern"
}
GUIDED = ("structured_outputs", *_SINGLE)
"""The names in `extra` that are read here."""


def constraints(request: EngineRequest, known: Collection[str]) -> dict[str, Any]:
    """Constraints by name; none: the request is not guided.

    Raises `RequestError` for one that the engine does not know, and for a guided request that was begun elsewhere: an
    engine does not count the tokens of an earlier attempt as guided.
    """
    extra = request.sampling.extra
    given = extra.get("structured_outputs") or {}
    if not isinstance(given, Mapping):
        raise RequestError("invalid_request", f"structured_outputs must be a map of {', '.join(known)}")
    found = {**given, **{_SINGLE[name]: value for name, value in extra.items() if name in _SINGLE}}
    for name in found:
        if name not in known:
            near = nearest(name, known)
            raise RequestError("invalid_request", f"structured_outputs has no {name!r}; did you mean {near!r}?")
    if found and request.generated:
        message = "a request with structured outputs cannot go on from another worker's tokens: send it anew"
        raise RequestError("invalid_request", message)
    return found
