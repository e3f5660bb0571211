"""The backend's `model.py` with the engines of `worker_process.py`."""

from typing import Any

import triton_python_backend_utils as pb_utils
from worker_process import create

from dynamo_llm import model
from dynamo_llm.hosts import tritonserver


class TritonPythonModel(model.TritonPythonModel):
    def initialize(self, args: dict[str, Any]) -> None:
        self._model = tritonserver.open_model(args, pb_utils, create)
