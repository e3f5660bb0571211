"""What Triton's python backend loads for a model with `backend: "dynamo_llm"`. All else is in `hosts/tritonserver`.

Triton's stub imports this file by itself, as `model`: copy it into the folder `dynamo_llm` of a backend directory, and
have the package dynamo-llm in the Python that the stub runs.
"""

from typing import Any

import triton_python_backend_utils as pb_utils

from dynamo_llm.hosts import tritonserver


class TritonPythonModel:
    """See Triton's python backend for the methods."""

    @staticmethod
    def auto_complete_config(auto_complete_model_config: Any) -> Any:
        return tritonserver.auto_complete(auto_complete_model_config)

    def initialize(self, args: dict[str, str]) -> None:
        self._model = tritonserver.open_model(args, pb_utils)

    def execute(self, requests: list[Any]) -> list[Any] | None:
        return self._model.execute(requests)

    def is_ready(self) -> bool:
        return self._model.is_ready()

    def finalize(self) -> None:
        self._model.close()
