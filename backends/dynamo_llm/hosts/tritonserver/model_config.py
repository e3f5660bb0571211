"""What Triton is told of our models: tensors and transaction policy. `auto_complete` and `worker_model.py` call it."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from dynamo_llm.public_model import INPUTS, OUTPUTS
from kvstore.wire import CONTROL_SUFFIX, PAYLOAD, SESSION_SUFFIX

BACKEND = "dynamo_llm"
EXECUTION_ENV = "EXECUTION_ENV_PATH"
"""Parameter of the python backend: the Python environment of a model's stub."""
_PAYLOAD = [(PAYLOAD, np.uint8, (-1,))]
_TYPES = {"float32": "FP32", "bytes_": "STRING", "bool_": "BOOL"}


def complete(config: Any) -> Any:
    """Fill in Triton's `pb_utils.ModelConfig`, by the model's name."""
    name = config.as_dict()["name"]
    unary, wire = name.endswith(CONTROL_SUFFIX), name.endswith((CONTROL_SUFFIX, SESSION_SUFFIX))
    config.set_max_batch_size(0)
    config.set_model_transaction_policy({"decoupled": not unary})
    for tensor in _tensors(_PAYLOAD if wire else INPUTS, optional=not wire):
        config.add_input(tensor)
    for tensor in _tensors(_PAYLOAD if wire else OUTPUTS):
        config.add_output(tensor)
    return config


def companion(parameters: dict[str, Any]) -> dict[str, Any]:
    """The config of a companion of a model with these `parameters`: `complete` fills in the rest."""
    kept = {key: value for key, value in parameters.items() if key == EXECUTION_ENV}
    return {"backend": BACKEND, "instance_group": [{"kind": "KIND_CPU", "count": 1}], "parameters": kept}


def _tensors(specs: Iterable[tuple[str, Any, tuple[int, ...]]], **more: Any) -> list[dict[str, Any]]:
    return [
        {"name": name, "data_type": f"TYPE_{_type(dtype)}", "dims": list(shape), **more} for name, dtype, shape in specs
    ]


def _type(dtype: Any) -> str:
    name: str = dtype.__name__
    return _TYPES.get(name) or name.upper()
