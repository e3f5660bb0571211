"""One table that turns the router's errors into KServe's two forms. `http.py` and `grpc.py` are the only callers."""

import grpc

from router.errors import (
    DeadlineExceeded,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    RouterError,
    TooLarge,
    Unavailable,
)


class Unimplemented(RouterError):
    """A part of the protocol that this router does not offer."""


class NotFound(RouterError):
    """A model version, path or tensor region that does not exist."""


_TABLE: tuple[tuple[type[RouterError], int, grpc.StatusCode], ...] = (
    (InvalidRequest, 400, grpc.StatusCode.INVALID_ARGUMENT),
    (ModelNotFound, 404, grpc.StatusCode.NOT_FOUND),
    (NotFound, 404, grpc.StatusCode.NOT_FOUND),
    (TooLarge, 413, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (Overloaded, 429, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (Unimplemented, 501, grpc.StatusCode.UNIMPLEMENTED),
    (Unavailable, 503, grpc.StatusCode.UNAVAILABLE),
    (DeadlineExceeded, 504, grpc.StatusCode.DEADLINE_EXCEEDED),
    (RouterError, 500, grpc.StatusCode.INTERNAL),
)
"""(error, HTTP status, gRPC status); the first row that fits counts."""


def http_status(error: RouterError) -> int:
    """The HTTP status of an error."""
    return next(status for kind, status, _ in _TABLE if isinstance(error, kind))


def grpc_status(error: RouterError) -> grpc.StatusCode:
    """The gRPC status of an error."""
    return next(code for kind, _, code in _TABLE if isinstance(error, kind))
