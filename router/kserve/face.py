"""A model as KServe clients see it: its inputs, outputs, metadata and config, the same for every model.

Names and meanings are those of vllm_backend, with the inputs of tensorrtllm_backend's ensemble beside them, so clients
of either find what they expect. `request.py` reads the inputs, `http.py` and `grpc.py` serve metadata and config.
"""

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

from router.errors import ModelNotFound
from router.kserve.errors import NotFound
from router.models import Model, Models

SERVER_NAME = "dynamo-llm"
MODEL_VERSION = "1"
EXTENSIONS = ("binary_tensor_data", "generate", "model_configuration", "parameters")
"""Of Triton's protocol extensions, those that are served."""

DEFAULT_MAX_TOKENS = 16
"""Where a client names no `max_tokens`, as in vLLM; an explicit null in `sampling_parameters` lifts the limit."""
MAX_STOP_WORDS = 64
_BYTES = frozenset({"BYTES"})
_BOOL = frozenset({"BOOL"})
_INTS = frozenset({"INT32", "INT64", "UINT32", "UINT64"})
_FLOATS = frozenset({"FP32", "FP64"})


Ready = Callable[[str | None], bool]
"""Whether requests for a model (None: for any) can be served now."""


class InputSpec(NamedTuple):
    """One input tensor that requests may carry."""

    name: str
    datatype: str
    """As the metadata announces it."""
    accepted: frozenset[str]
    """Datatypes that are taken."""
    sampling: str | None = None
    """The sampling parameter that it sets."""
    max_elements: int | None = 1
    """None: as many as the model's context has tokens."""

    @property
    def dims(self) -> list[int]:
        """-1: any number of elements."""
        return [1 if self.max_elements == 1 else -1]


class OutputSpec(NamedTuple):
    """One output tensor."""

    name: str
    datatype: str
    dims: list[int]
    flag: str | None
    """The input that asks for it; None: answers carry it by themselves, or only when the request's outputs name it."""


INPUTS = {
    spec.name: spec
    for spec in (
        InputSpec("text_input", "BYTES", _BYTES),
        InputSpec("input_ids", "INT32", frozenset({"INT32", "INT64", "UINT32"}), max_elements=None),
        InputSpec("stream", "BOOL", _BOOL),
        InputSpec("sampling_parameters", "BYTES", _BYTES),
        InputSpec("exclude_input_in_output", "BOOL", _BOOL),
        InputSpec("return_finish_reason", "BOOL", _BOOL),
        InputSpec("return_cumulative_logprob", "BOOL", _BOOL),
        InputSpec("return_logprobs", "BOOL", _BOOL),
        InputSpec("return_num_input_tokens", "BOOL", _BOOL),
        InputSpec("return_num_output_tokens", "BOOL", _BOOL),
        InputSpec("max_tokens", "INT32", _INTS, "max_tokens"),
        InputSpec("min_tokens", "INT32", _INTS, "min_tokens"),
        InputSpec("temperature", "FP32", _FLOATS, "temperature"),
        InputSpec("top_k", "INT32", _INTS, "top_k"),
        InputSpec("top_p", "FP32", _FLOATS, "top_p"),
        InputSpec("min_p", "FP32", _FLOATS, "min_p"),
        InputSpec("seed", "UINT64", _INTS, "seed"),
        InputSpec("repetition_penalty", "FP32", _FLOATS, "repetition_penalty"),
        InputSpec("presence_penalty", "FP32", _FLOATS, "presence_penalty"),
        InputSpec("frequency_penalty", "FP32", _FLOATS, "frequency_penalty"),
        InputSpec("ignore_eos", "BOOL", _BOOL, "ignore_eos"),
        InputSpec("stop_words", "BYTES", _BYTES, max_elements=MAX_STOP_WORDS),
        InputSpec("bad_words", "BYTES", _BYTES, max_elements=MAX_STOP_WORDS),
        InputSpec("end_id", "INT32", _INTS),
        InputSpec("pad_id", "INT32", _INTS),
    )
}

OUTPUTS = {
    spec.name: spec
    for spec in (
        OutputSpec("text_output", "BYTES", [1], None),
        OutputSpec("output_ids", "INT32", [-1], None),
        OutputSpec("finish_reason", "BYTES", [1], "return_finish_reason"),
        OutputSpec("cumulative_logprob", "FP32", [1], "return_cumulative_logprob"),
        OutputSpec("logprobs", "BYTES", [1], "return_logprobs"),
        OutputSpec("num_input_tokens", "UINT32", [1], "return_num_input_tokens"),
        OutputSpec("num_output_tokens", "UINT32", [1], "return_num_output_tokens"),
    )
}


def server_metadata() -> dict[str, Any]:
    """Answer of `GET /v2` and `ServerMetadata`."""
    try:
        release = version("dynamo-llm")
    except PackageNotFoundError:  # run from a source tree that was never installed
        release = "0"
    return {"name": SERVER_NAME, "version": release, "extensions": list(EXTENSIONS)}


def find_model(models: Models, name: str, model_version: str = "") -> Model:
    """The model of that name and version. Raises `ModelNotFound` or `NotFound`, worded as Triton does."""
    try:
        model = models.get(name)
    except ModelNotFound:
        raise ModelNotFound(f"Request for unknown model: '{name}' is not found", param="model") from None
    if model_version not in ("", MODEL_VERSION):
        raise NotFound(f"Request for unknown model: '{name}' version {model_version} is not found")
    return model


def model_metadata(model: Model) -> dict[str, Any]:
    """Answer of `GET /v2/models/M` and `ModelMetadata`."""
    return {
        "name": model.name,
        "versions": [MODEL_VERSION],
        "platform": SERVER_NAME,
        "inputs": [{"name": i.name, "datatype": i.datatype, "shape": i.dims} for i in INPUTS.values()],
        "outputs": [{"name": o.name, "datatype": o.datatype, "shape": o.dims} for o in OUTPUTS.values()],
    }


def model_config(model: Model) -> dict[str, Any]:
    """Answer of `GET /v2/models/M/config` and `ModelConfig`: Triton's `ModelConfig` message as JSON."""
    figures = {"block_size": model.block_size, "max_context": model.max_context, "instances": len(model.cards)}
    return {
        "name": model.name,
        "platform": "",
        "backend": "dynamo_llm",
        "version_policy": {"latest": {"num_versions": 1}},
        "max_batch_size": 0,
        "input": [
            {"name": i.name, "data_type": _config_type(i.datatype), "dims": i.dims, "optional": True}
            for i in INPUTS.values()
        ],
        "output": [{"name": o.name, "data_type": _config_type(o.datatype), "dims": o.dims} for o in OUTPUTS.values()],
        "model_transaction_policy": {"decoupled": True},
        "parameters": {name: {"string_value": str(value)} for name, value in figures.items()},
    }


def _config_type(datatype: str) -> str:
    return "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"
