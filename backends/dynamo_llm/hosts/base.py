"""What the hosts have in common: each puts services and their public model on the wire."""

from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any, Protocol

from dynamo_llm.public_model import PublicModel, Tensors
from dynamo_llm.service import Service


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


class PublicModels:
    """The public model over several instances: a request goes to the one that has least to do."""

    def __init__(self, by_service: Mapping[Service, PublicModel]) -> None:
        self._by_service = by_service

    def generate(self, tensors: Mapping[str, Any], parameters: Mapping[str, Any]) -> AsyncGenerator[Tensors, None]:
        """As `PublicModel.generate`."""
        service = min(self._by_service, key=lambda service: (not service.healthy, service.in_flight))
        return self._by_service[service].generate(tensors, parameters)
