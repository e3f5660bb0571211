"""KServe's protobuf messages to `InferRequest` and from `Response`. `grpc.py` is the only caller."""

from typing import Any

from tritonclient.grpc import service_pb2 as pb

from router.errors import InvalidRequest, RouterError
from router.kserve.face import MODEL_VERSION
from router.kserve.outbox import Item
from router.kserve.request import InferRequest, find_input
from router.kserve.response import Parameters, Response
from router.kserve.tensors import Values, check_shape, from_raw, from_values, invalid, refuse_shared_memory, to_raw
from router.models import Model

_CONTENTS = {
    "BOOL": "bool_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
"""Field of `InferTensorContents` for each datatype."""


def request(message: pb.ModelInferRequest, model: Model) -> InferRequest:
    """Decode a request. Raises `InvalidRequest`, naming the tensor."""
    raw = message.raw_input_contents
    if raw and len(raw) != len(message.inputs):
        raise InvalidRequest(f"raw_input_contents has {len(raw)} entries for {len(message.inputs)} inputs")
    inputs: dict[str, Values] = {}
    for index, tensor in enumerate(message.inputs):
        spec = find_input(model.name, tensor.name)
        if tensor.name in inputs:
            raise invalid(tensor.name, "is given twice")
        refuse_shared_memory("input", tensor.name, tensor.parameters)
        count = check_shape(spec, tensor.datatype, tensor.shape, model.max_context)
        inputs[tensor.name] = _values(tensor, count, raw[index] if raw else None)
    for output in message.outputs:
        refuse_shared_memory("output", output.name, output.parameters)
    return InferRequest(
        model=model.name,
        id=message.id,
        inputs=inputs,
        parameters={name: _parameter(name, value) for name, value in message.parameters.items()},
        outputs=[output.name for output in message.outputs] or None,
    )


def response(answer: Response, model: str, request_id: str) -> pb.ModelInferResponse:
    """Encode a response; all outputs are raw."""
    message = pb.ModelInferResponse()
    _fill(message, answer, model, request_id)
    return message


def stream_response(item: Item) -> pb.ModelStreamInferResponse:
    """Encode an item of a stream: a response that says whether it is the last, or an error in band."""
    message, answer = pb.ModelStreamInferResponse(), item.response
    inner = message.infer_response
    if isinstance(answer, RouterError):
        message.error_message = answer.message
        inner.id = item.run.request_id
    else:
        _fill(inner, answer, item.run.model, item.run.request_id)
        inner.parameters["triton_final_response"].bool_param = answer.final
    return message


def _fill(message: pb.ModelInferResponse, answer: Response, model: str, request_id: str) -> None:
    """In place and field by field: nested messages that are passed to a constructor are copied, at twice the cost."""
    message.model_name = model
    message.model_version = MODEL_VERSION
    message.id = request_id
    for tensor in answer.outputs:
        output = message.outputs.add()
        output.name = tensor.name
        output.datatype = tensor.datatype
        output.shape.append(len(tensor.values))
        message.raw_output_contents.append(to_raw(tensor))
    _set_parameters(message, answer.parameters)


def _values(tensor: pb.ModelInferRequest.InferInputTensor, count: int, raw: bytes | None) -> Values:
    if raw is None:
        contents = getattr(tensor.contents, _CONTENTS[tensor.datatype])
        if len(contents) != count:
            raise invalid(
                tensor.name, f"got {len(contents)} elements in {_CONTENTS[tensor.datatype]}, expected {count}"
            )
        return from_values(tensor.name, tensor.datatype, count, list(contents))
    if tensor.HasField("contents"):
        raise invalid(tensor.name, "has 'contents' although the request has raw_input_contents")
    return from_raw(tensor.name, tensor.datatype, count, raw)


def _parameter(name: str, value: pb.InferParameter) -> Any:
    choice = value.WhichOneof("parameter_choice")
    if choice is None:
        raise InvalidRequest(f"parameter '{name[:64]}' has no value", param=name[:64])
    return getattr(value, choice)


def _set_parameters(message: pb.ModelInferResponse, parameters: Parameters) -> None:
    for name, value in parameters.items():
        target = message.parameters[name]
        if isinstance(value, bool):
            target.bool_param = value
        elif isinstance(value, int):
            target.int64_param = value
        elif isinstance(value, float):
            target.double_param = value
        else:
            target.string_param = value
