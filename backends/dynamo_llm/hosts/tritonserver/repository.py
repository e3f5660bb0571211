"""Models of the server that a stub process lives in: asked over its gRPC port, as an operator would.

Not through `pb_utils`: in Triton 2.51 a stub's question about models holds up its responses until it is answered, and
now and then makes the server abort (it waits on memory that the stub has freed).
"""

import json
from contextlib import closing
from typing import Any

from tritonclient.grpc import InferenceServerClient, InferenceServerException

_ANSWER_S = 10.0
"""For a question."""
_CHANGE_S = 300.0
"""For a load or an unload, which ends what the model has in flight."""


class RepositoryError(Exception):
    """What the server did not do. The message is its own."""


class Repository:
    """Its methods block, and raise `RepositoryError`."""

    def __init__(self, address: str) -> None:
        self._address = address

    def is_ready(self, model: str, version: str = "") -> bool | None:
        """None while the server takes no calls."""
        try:
            with closing(InferenceServerClient(self._address)) as client:
                return bool(client.is_model_ready(model, version, client_timeout=_ANSWER_S))
        except InferenceServerException as error:
            return False if "NOT_FOUND" in str(error.status()) else None

    def load(self, model: str, config: dict[str, Any]) -> None:
        """A model that is nowhere on a disk: its config, and an empty version 1."""
        try:
            with closing(InferenceServerClient(self._address)) as client:
                client.load_model(
                    model, config=json.dumps(config), files={"file:1/empty": b""}, client_timeout=_CHANGE_S
                )
        except InferenceServerException as error:
            raise RepositoryError(error.message()) from None

    def unload(self, model: str) -> None:
        try:
            with closing(InferenceServerClient(self._address)) as client:
                client.unload_model(model, client_timeout=_CHANGE_S)
        except InferenceServerException as error:
            raise RepositoryError(error.message()) from None
