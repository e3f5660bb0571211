"""Bodies of KServe's HTTP face: JSON and binary tensors, the generate extension's plain JSON, compression.

Pure functions from bytes to `InferRequest` and from `Response` to bytes; `http.py` is the only caller.
"""

import zlib
from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec
from msgspec import Raw, Struct

from router.errors import InvalidRequest, TooLarge
from router.kserve.errors import Unimplemented
from router.kserve.face import INPUTS, MODEL_VERSION
from router.kserve.request import InferRequest, find_input
from router.kserve.response import Response
from router.kserve.tensors import (
    JSON_ERRORS,
    Tensor,
    Values,
    check_shape,
    from_raw,
    from_values,
    invalid,
    refuse_shared_memory,
    short,
    to_json,
    to_raw,
)
from router.models import Model

HEADER_LENGTH = "inference-header-content-length"
"""Length of the JSON in a body that carries binary tensors after it."""
_JSON_BYTES_PER_ELEMENT = 64
"""No number of a tensor needs more, white space included."""
_COMPRESS_FROM_BYTES = 1024
_GZIP_WBITS, _ZLIB_WBITS = 31, 15

_T = TypeVar("_T")


class _Input(Struct):
    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, Any] = {}
    data: Raw = Raw()


class _Output(Struct):
    name: str
    parameters: dict[str, Any] = {}


class _Infer(Struct):
    inputs: list[_Input]
    id: str = ""
    parameters: dict[str, Any] = {}
    outputs: list[_Output] | None = None


class OutputForm(Struct, frozen=True):
    """Which outputs the client wants as binary."""

    default: bool = False
    by_name: dict[str, bool] = {}

    def binary(self, name: str) -> bool:
        return self.by_name.get(name, self.default)


def decode_infer(body: bytes, header_length: str | None, model: Model) -> tuple[InferRequest, OutputForm]:
    """An infer request's body. Raises `InvalidRequest`, naming the tensor."""
    length = _header_length(header_length, len(body))
    document = _json(body[:length], _Infer)
    inputs: dict[str, Values] = {}
    at = length
    for tensor in document.inputs:
        spec = find_input(model.name, tensor.name)
        if tensor.name in inputs:
            raise invalid(tensor.name, "is given twice")
        size = _binary_size(tensor)
        count = check_shape(spec, tensor.datatype, tensor.shape, model.max_context)
        if size is None:
            inputs[tensor.name] = _json_values(tensor, count)
            continue
        if size > len(body) - at:
            raise invalid(tensor.name, f"says {size} bytes of binary data, only {len(body) - at} follow")
        inputs[tensor.name] = _binary_values(tensor, count, body[at : at + size])
        at += size
    if at != len(body):
        raise InvalidRequest(f"the body has {len(body) - at} bytes more than its inputs")
    request = InferRequest(
        model=model.name,
        id=document.id,
        inputs=inputs,
        parameters=document.parameters,
        outputs=[output.name for output in document.outputs] if document.outputs else None,
    )
    return request, _output_form(document)


def decode_generate(body: bytes, model: Model) -> InferRequest:
    """A generate request's body, `parameters` unfolded: keys that name inputs become inputs, the rest parameters."""
    fields = _json(body, dict[str, Any])
    nested = fields.pop("parameters", {})
    if not isinstance(nested, dict):
        raise InvalidRequest("'parameters' is not an object", param="parameters")
    request_id = fields.pop("id", "")
    if not isinstance(request_id, str):
        raise InvalidRequest("'id' is not a string", param="id")
    fields |= nested
    inputs: dict[str, Values] = {}
    parameters: dict[str, Any] = {}
    for name, value in fields.items():
        if value is None:
            continue
        spec = INPUTS.get(name)
        if spec is None or (spec.sampling is not None and "sampling_parameters" not in fields):
            parameters[name] = value
            continue
        values = value if isinstance(value, list) else [value]
        if spec.datatype == "BYTES" and spec.max_elements != 1:  # an empty word, as curl examples send it, is no word
            values = [item for item in values if item != ""]
        count = check_shape(spec, spec.datatype, [len(values)], model.max_context)
        inputs[name] = from_values(name, spec.datatype, count, values)
    return InferRequest(model=model.name, id=request_id, inputs=inputs, parameters=parameters)


def encode_infer(response: Response, model: str, request_id: str, form: OutputForm) -> tuple[bytes, int | None]:
    """(body, length of the JSON at its start if binary tensors follow)."""
    outputs, binary = [], []
    for tensor in response.outputs:
        entry: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": [len(tensor.values)]}
        if form.binary(tensor.name):
            binary.append(to_raw(tensor))
            entry["parameters"] = {"binary_data_size": len(binary[-1])}
        else:
            entry["data"] = to_json(tensor)
        outputs.append(entry)
    document = _response_head(model, request_id) | {"parameters": response.parameters, "outputs": outputs}
    header = msgspec.json.encode(document)
    return b"".join([header, *binary]), len(header) if binary else None


def encode_generate(response: Response, model: str, request_id: str) -> bytes:
    """One generate response: outputs and parameters side by side, single elements without a list around them."""
    outputs = {tensor.name: _plain(tensor) for tensor in response.outputs}
    return msgspec.json.encode(_response_head(model, request_id) | response.parameters | outputs)


def decompress(body: bytes, encoding: str, limit: int) -> bytes:
    """Undo `Content-Encoding`. Raises `TooLarge` beyond `limit` bytes."""
    wbits = {"gzip": _GZIP_WBITS, "deflate": _ZLIB_WBITS}.get(encoding)
    if wbits is None:
        raise InvalidRequest(f"Content-Encoding '{encoding[:32]}' is not supported, use gzip or deflate")
    stream = zlib.decompressobj(wbits)
    try:
        plain = stream.decompress(body, limit + 1)
    except zlib.error as error:
        raise InvalidRequest(f"the body is not valid {encoding}: {error}") from None
    if len(plain) > limit:
        raise TooLarge(f"the body is larger than {limit} bytes when decompressed")
    if not stream.eof:
        raise InvalidRequest(f"the body is not valid {encoding}: it ends too soon")
    return plain


def compress(body: bytes, accepted: str) -> tuple[bytes, str | None]:
    """(body, `Content-Encoding`): compressed where the client takes it and it pays."""
    offered = {part.split(";")[0].strip() for part in accepted.lower().split(",")}
    encoding = next((name for name in ("gzip", "deflate") if name in offered), None)
    if encoding is None or len(body) < _COMPRESS_FROM_BYTES:
        return body, None
    stream = zlib.compressobj(level=1, wbits=_GZIP_WBITS if encoding == "gzip" else _ZLIB_WBITS)
    return stream.compress(body) + stream.flush(), encoding


def _json(document: bytes, kind: type[_T]) -> _T:
    try:
        return msgspec.json.decode(document, type=kind)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"the request is not valid: {error}") from None
    except JSON_ERRORS as error:
        raise InvalidRequest(f"failed to parse the request JSON: {error}") from None


def _header_length(value: str | None, body_length: int) -> int:
    if value is None:
        return body_length
    if not value.isascii() or not value.isdigit() or len(value) > 18 or int(value) > body_length:
        raise InvalidRequest(
            f"Inference-Header-Content-Length '{value[:32]}' does not fit a body of {body_length} bytes"
        )
    return int(value)


def _binary_size(tensor: _Input) -> int | None:
    refuse_shared_memory("input", tensor.name, tensor.parameters)
    size = tensor.parameters.get("binary_data_size")
    if size is None:
        return None
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise invalid(tensor.name, "binary_data_size is not a number of bytes")
    return size


def _binary_values(tensor: _Input, count: int, raw: bytes) -> Values:
    if bytes(tensor.data):
        raise invalid(tensor.name, "has both 'data' and 'binary_data_size'")
    return from_raw(tensor.name, tensor.datatype, count, raw)


def _json_values(tensor: _Input, count: int) -> Values:
    document = bytes(tensor.data)
    if not document:
        raise invalid(tensor.name, "has no 'data'")
    if tensor.datatype != "BYTES" and len(document) > _JSON_BYTES_PER_ELEMENT * (count + 16):
        raise invalid(tensor.name, f"'data' is longer than {count} elements can be")
    try:
        return from_values(tensor.name, tensor.datatype, count, msgspec.json.decode(document))
    except JSON_ERRORS as error:
        raise invalid(tensor.name, f"'data' is not valid: {error}") from None


def _output_form(document: _Infer) -> OutputForm:
    by_name = {}
    for output in document.outputs or ():
        refuse_shared_memory("output", output.name, output.parameters)
        if "classification" in output.parameters:
            raise Unimplemented(f"output {short(output.name)}: the classification extension is not supported")
        if isinstance(binary := output.parameters.get("binary_data"), bool):
            by_name[output.name] = binary
    return OutputForm(document.parameters.get("binary_data_output") is True, by_name)


def _response_head(model: str, request_id: str) -> dict[str, Any]:
    head = {"id": request_id} if request_id else {}
    return head | {"model_name": model, "model_version": MODEL_VERSION}


def _plain(tensor: Tensor) -> Any:
    values: Sequence[Any] = to_json(tensor)
    return values[0] if len(values) == 1 and tensor.name != "output_ids" else values
