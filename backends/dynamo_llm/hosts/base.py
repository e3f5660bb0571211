"""What the hosts have in common: each puts services and their public model on the wire."""

from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from typing import Any, Protocol

import numpy as np

from dynamo_llm.config import ConfigError, Dialect
from dynamo_llm.public.running import Running
from dynamo_llm.public.tensors import Face, Tensors, faces
from dynamo_llm.public_model import PublicModel
from dynamo_llm.service import Service
from kvstore.text import Tokenizer


class HostError(Exception):
    """A Triton server that cannot be started. The message is one line that says why."""


def refuse_numpy_2(version: str = np.__version__) -> None:
    """Triton's python stub dies at the first BYTES tensor where it finds numpy 2. Raises `HostError`."""
    if int(version.split(".")[0]) >= 2:
        raise HostError(
            f"numpy {version} kills Triton's python stub: pip install 'numpy<2', and give an engine that needs numpy 2 "
            "an environment of its own by the option `python`"
        )


class Host(Protocol):
    """A Triton server with the public models, `M.control` and `M.session`. `start` and `stop` block, for seconds."""

    grpc_port: int
    http_port: int
    on_death: Callable[[str], None]
    """Called, on any thread, when the server ended although nobody stopped it. Set before `start`."""

    def start(self) -> None:
        """Returns when all models are ready. Raises `HostError`; then there is nothing left to stop."""

    def stop(self) -> None:
        """End the server and remove what it left. May be called twice, and after the server's own end."""


def tokenizer_of(files: dict[str, bytes]) -> Tokenizer | None:
    """None for a model without one. Raises `ConfigError` for one that cannot be read."""
    if "tokenizer.json" not in files:
        return None
    try:
        return Tokenizer.from_files(files)
    except ValueError as error:
        raise ConfigError(str(error)) from None


class PublicModels:
    """The public model over several instances: a request goes to the one that has least to do.

    A request can be stopped by its id whichever instance it went to, and under whichever name either came in.
    """

    def __init__(
        self,
        model: str,
        services: Iterable[Service],
        tokenizer: Tokenizer | None,
        dialect: Dialect = "vllm",
        exclude_input: bool = False,
    ) -> None:
        """`dialect` and `exclude_input` as in `WorkerConfig`: `dialect`, `exclude_input_in_output`."""
        self.faces: list[Face] = faces(model, dialect)
        """What the host serves, all of them by `generate`."""
        running = Running()
        self._by_service = {
            service: PublicModel(service, tokenizer, running, exclude_input=exclude_input) for service in services
        }

    def generate(self, tensors: Mapping[str, Any], parameters: Mapping[str, Any]) -> AsyncGenerator[Tensors, None]:
        """As `PublicModel.generate`."""
        service = min(self._by_service, key=lambda service: (not service.healthy, service.in_flight))
        return self._by_service[service].generate(tensors, parameters)
