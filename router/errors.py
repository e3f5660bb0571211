"""The router's errors, as a tree, and nothing else. Each API turns them into its own form by one table of its own.

RouterError
├── InvalidRequest          400  the client sent what can never be served; `param` names the field
│   └── ContextLengthExceeded
├── ModelNotFound           404
├── TooLarge                413
├── Overloaded              429  every worker refuses more; `retry_after_s` says when to come back
├── Unavailable             503  no worker of the model is there (yet, or any more)
├── DeadlineExceeded        504
└── WorkerFailed            500  every attempt failed; the last reason is the message
"""


class RouterError(Exception):
    """Base. `message` is one line for the client and says what to do."""

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class InvalidRequest(RouterError):
    """Wrong values; the same request will never be served."""


class ContextLengthExceeded(InvalidRequest):
    """Prompt and `max_tokens` do not fit the model's context."""


class ModelNotFound(RouterError):
    """No instance serves a model of this name."""


class TooLarge(RouterError):
    """The body is larger than the limit."""


class Overloaded(RouterError):
    """Every worker refuses more at the moment."""


class Unavailable(RouterError):
    """No healthy worker is there for the model."""


class DeadlineExceeded(RouterError):
    """The request's own deadline passed."""


class WorkerFailed(RouterError):
    """Every attempt to serve an accepted request failed."""
