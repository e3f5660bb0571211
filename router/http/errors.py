"""The router's errors in OpenAI's form."""

import math
from typing import Any

import msgspec

from router import errors

_Kind = tuple[int, str, str | None]

TABLE: dict[type[errors.RouterError], _Kind] = {
    errors.InvalidRequest: (400, "invalid_request_error", None),
    errors.ContextLengthExceeded: (400, "invalid_request_error", "context_length_exceeded"),
    errors.ModelNotFound: (404, "invalid_request_error", "model_not_found"),
    errors.TooLarge: (413, "invalid_request_error", "body_too_large"),
    errors.Overloaded: (429, "overloaded_error", "overloaded"),
    errors.Unavailable: (503, "service_unavailable_error", "unavailable"),
    errors.DeadlineExceeded: (504, "timeout_error", "deadline_exceeded"),
    errors.WorkerFailed: (500, "server_error", "worker_failed"),
}
"""Error -> (status, type, code)."""


def kind_of(error: errors.RouterError) -> _Kind:
    """Status, type and code, by the nearest class in the table."""
    for cls in type(error).__mro__:
        if cls in TABLE:
            return TABLE[cls]
    return 500, "server_error", None


def body_of(error: errors.RouterError) -> dict[str, Any]:
    """`{"error": {"message", "type", "param", "code"}}`."""
    _, type_, code = kind_of(error)
    return error_body(error.message, type_, error.param, code)


def error_body(message: str, type_: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": type_, "param": param, "code": code}}


def encoded(error: errors.RouterError) -> tuple[int, bytes, list[tuple[bytes, bytes]]]:
    """Status, body and extra headers."""
    headers = []
    if error.retry_after_s is not None:
        headers.append((b"retry-after", str(max(math.ceil(error.retry_after_s), 1)).encode()))
    return kind_of(error)[0], msgspec.json.encode(body_of(error)), headers
