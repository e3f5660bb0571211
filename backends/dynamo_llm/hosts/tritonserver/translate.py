"""Between Triton's objects in a stub and ours: requests to tensors and parameters, answers to responses."""

import json
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct

from dynamo_llm.public.request import REQUEST_ID
from dynamo_llm.public.tensors import Tensors
from kvstore.wire import WireError

_CODES = {
    "invalid_request": "INVALID_ARG",
    "context_length_exceeded": "INVALID_ARG",
    "overloaded": "UNAVAILABLE",
    "draining": "UNAVAILABLE",
    "no_session": "NOT_FOUND",
}
"""`TritonError`'s names; what is not here is INTERNAL."""


class PackedTensor(Struct, frozen=True, array_like=True):
    """A tensor on the way between two stubs. `data` are the elements of BYTES, or the memory of anything else."""

    dtype: str
    shape: list[int]
    data: bytes | list[bytes]


class PackedRequest(Struct, frozen=True, array_like=True):
    tensors: dict[str, PackedTensor]
    parameters: dict[str, Any]


encode = msgspec.msgpack.Encoder().encode
decode_request = msgspec.msgpack.Decoder(PackedRequest).decode
decode_tensors = msgspec.msgpack.Decoder(dict[str, PackedTensor]).decode


def tensors_of(request: Any) -> Tensors:
    """A request's, by name."""
    return {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}


def parameters_of(request: Any) -> dict[str, Any]:
    """A request's, and its id as the public model wants it."""
    return {**json.loads(request.parameters() or "{}"), REQUEST_ID: request.request_id()}


def response_of(triton: Any, tensors: Tensors) -> Any:
    return triton.InferenceResponse([triton.Tensor(name, array) for name, array in tensors.items()])


def failed(triton: Any, error: WireError) -> Any:
    """The response of a request that was refused, or failed."""
    code = getattr(triton.TritonError, _CODES.get(error.code, "INTERNAL"))
    return triton.InferenceResponse(error=triton.TritonError(f"{error.code}: {error.message}", code))


def pack(tensors: Mapping[str, Any]) -> dict[str, PackedTensor]:
    return {name: _packed(array) for name, array in tensors.items()}


def unpack(tensors: Mapping[str, PackedTensor]) -> Tensors:
    return {name: _unpacked(tensor) for name, tensor in tensors.items()}


def _packed(array: Any) -> PackedTensor:
    shape = list(array.shape)
    if array.dtype.kind in "OS":
        return PackedTensor("O", shape, [bytes(element) for element in array.reshape(-1)])
    return PackedTensor(array.dtype.str, shape, array.tobytes())


def _unpacked(tensor: PackedTensor) -> Any:
    if isinstance(tensor.data, list):
        array = np.empty(len(tensor.data), np.object_)
        array[:] = tensor.data
        return array.reshape(tensor.shape)
    return np.frombuffer(tensor.data, tensor.dtype).reshape(tensor.shape)
