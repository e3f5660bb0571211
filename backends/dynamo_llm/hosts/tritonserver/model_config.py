"""What Triton is told of our models: tensors and transaction policy. `auto_complete` and `deployment.py` call it."""

from collections.abc import Iterable
from typing import Any, get_args

import numpy as np

from dynamo_llm.config import Dialect
from dynamo_llm.public.tensors import Spec, faces
from kvstore.wire import CONTROL_SUFFIX, PAYLOAD, SESSION_SUFFIX

BACKEND = "dynamo_llm"
COMPANION_OF = "companion_of"
"""Parameter of a companion: the name that its own begins with."""
_EXECUTION_ENV = "EXECUTION_ENV_PATH"
"""Parameter of the python backend: the Python environment of a model's stub."""
_PAYLOAD: tuple[Spec, ...] = ((PAYLOAD, np.uint8, (-1,)),)
_TYPES = {"float32": "FP32", "bytes_": "STRING", "bool_": "BOOL"}


def parameter(config: dict[str, Any], name: str) -> str:
    """Empty where it is not given."""
    return str(config.get("parameters", {}).get(name, {}).get("string_value", ""))


def complete(config: Any) -> Any:
    """Fill in Triton's `pb_utils.ModelConfig`."""
    given = config.as_dict()
    name, owner = given["name"], parameter(given, COMPANION_OF)
    if owner and name.removeprefix(owner) in (CONTROL_SUFFIX, SESSION_SUFFIX):
        decoupled, batch, inputs, outputs = name.endswith(SESSION_SUFFIX), 0, _PAYLOAD, _PAYLOAD
    else:
        wanted = parameter(given, "dialect")
        dialect: Dialect = wanted if wanted in get_args(Dialect) else "vllm"  # type: ignore[assignment]  # just tested
        known = {face.model: face for face in faces(owner or name, dialect)}
        if name not in known:
            raise ValueError(f"{name} is no companion of {owner}: there are {', '.join(companions(owner, dialect))}")
        decoupled, batch, inputs, outputs = True, known[name].max_batch_size, known[name].inputs, known[name].outputs
    config.set_max_batch_size(batch)
    config.set_model_transaction_policy({"decoupled": decoupled})
    for tensor in _tensors(inputs, optional=inputs is not _PAYLOAD):
        config.add_input(tensor)
    for tensor in _tensors(outputs):
        config.add_output(tensor)
    return config


def companions(owner: str, dialect: Dialect) -> list[str]:
    """Those that routers need come first."""
    others = [face.model for face in faces(owner, dialect) if face.model != owner]
    return [owner + CONTROL_SUFFIX, owner + SESSION_SUFFIX, *others]


def companion(owner: str, config: dict[str, Any]) -> dict[str, Any]:
    """The config of a companion, beside its owner's: `complete` fills in the rest."""
    kept = {name: {"string_value": parameter(config, name)} for name in (_EXECUTION_ENV, "dialect")}
    parameters = {name: value for name, value in kept.items() if value["string_value"]}
    return {
        "backend": BACKEND,
        "instance_group": [{"kind": "KIND_CPU", "count": 1}],
        "parameters": {COMPANION_OF: {"string_value": owner}, **parameters},
    }


def _tensors(specs: Iterable[Spec], **more: Any) -> list[dict[str, Any]]:
    return [
        {"name": name, "data_type": f"TYPE_{_type(dtype)}", "dims": list(shape), **more} for name, dtype, shape in specs
    ]


def _type(dtype: Any) -> str:
    name: str = dtype.__name__
    return _TYPES.get(name) or name.upper()
