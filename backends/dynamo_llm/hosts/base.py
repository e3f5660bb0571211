"""What every host offers to `worker.py`: it puts a `Service` and its public model on the wire."""

from collections.abc import Callable
from typing import Protocol


class HostError(Exception):
    """A Triton server that cannot be started. The message is one line that says why."""


class Host(Protocol):
    """A Triton server with the models `M`, `M.control` and `M.session`. `start` and `stop` block, for seconds."""

    grpc_port: int
    http_port: int
    on_death: Callable[[str], None]
    """Called, on any thread, when the server ended although nobody stopped it. Set before `start`."""

    def start(self) -> None:
        """Returns when all models are ready. Raises `HostError`; then there is nothing left to stop."""

    def stop(self) -> None:
        """End the server and remove what it left. May be called twice, and after the server's own end."""
