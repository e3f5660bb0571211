"""Tensors between their forms on the wire and Python values. Reads nothing of size before the shape was checked.

A tensor's data comes as raw bytes (gRPC, binary HTTP), as a JSON list, or as the typed lists of gRPC's `contents`. Its
values are a flat list in row-major order: bytes for BYTES, else bool, int or float.
"""

import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from router.errors import InvalidRequest
from router.kserve.errors import Unimplemented
from router.kserve.face import InputSpec

_DTYPES: dict[str, npt.DTypeLike] = {
    "BOOL": "?",
    "INT32": "<i4",
    "INT64": "<i8",
    "UINT32": "<u4",
    "UINT64": "<u8",
    "FP32": "<f4",
    "FP64": "<f8",
}
_LENGTH = struct.Struct("<I")
_MAX_RANK = 8
_MAX_DIM = 2**31 - 1
_RANGES = {"INT32": (-(2**31), 2**31), "INT64": (-(2**63), 2**63), "UINT32": (0, 2**32), "UINT64": (0, 2**64)}

Values = list[Any]

JSON_ERRORS = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What decoding hostile JSON raises."""


class Tensor(NamedTuple):
    """One output tensor of rank 1."""

    name: str
    datatype: str
    values: Values


def check_shape(spec: InputSpec, datatype: str, shape: Sequence[int], max_context: int) -> int:
    """Number of elements of an input. Raises `InvalidRequest` when datatype or shape do not fit its spec."""
    if datatype not in spec.accepted:
        expected = " or ".join(sorted(spec.accepted))
        raise invalid(spec.name, f"datatype is '{datatype[:32]}', expected {expected}")
    if not 1 <= len(shape) <= _MAX_RANK or not all(0 <= dim <= _MAX_DIM for dim in shape):
        raise invalid(spec.name, f"shape {short(shape)} is not valid, expected {spec.dims}")
    count = math.prod(shape)
    if spec.max_elements == 1 and count != 1:
        raise invalid(spec.name, f"shape {short(shape)} is not valid, expected [1] or [1, 1]")
    most = max_context if spec.max_elements is None else spec.max_elements
    if count > most:
        why = "the model's context" if spec.max_elements is None else "the limit"
        raise invalid(spec.name, f"has {count} elements, more than {why} of {most}")
    return count


def from_raw(name: str, datatype: str, count: int, raw: bytes) -> Values:
    """Values of `count` elements in the binary form (BYTES: each after its length in 4 little-endian bytes)."""
    if datatype == "BYTES":
        return _bytes_elements(name, count, raw)
    dtype = np.dtype(_DTYPES[datatype])
    if len(raw) != count * dtype.itemsize:
        raise invalid(name, f"got {len(raw)} bytes, expected {count * dtype.itemsize} for {count} of {datatype}")
    values: Values = np.frombuffer(raw, dtype).tolist()
    return values


def from_values(name: str, datatype: str, count: int, data: object) -> Values:
    """Values of `count` elements from a list, nested or flat, as JSON and gRPC's `contents` carry it."""
    values: Values = []
    _flatten(name, data, values, count)
    if len(values) != count:
        raise invalid(name, f"got {len(values)} elements, expected {count}")
    return [_element(name, datatype, value) for value in values]


def to_raw(tensor: Tensor) -> bytes:
    """The binary form."""
    if tensor.datatype == "BYTES":
        return b"".join(_LENGTH.pack(len(value)) + value for value in tensor.values)
    return np.array(tensor.values, dtype=_DTYPES[tensor.datatype]).tobytes()


def to_json(tensor: Tensor) -> Values:
    """The `data` of the JSON form."""
    if tensor.datatype == "BYTES":
        return [value.decode("utf-8", "replace") for value in tensor.values]
    return tensor.values


def text(name: str, value: bytes) -> str:
    """A BYTES element as text."""
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise invalid(name, f"is not valid UTF-8 (byte {error.start})") from None


def refuse_shared_memory(kind: str, name: str, parameters: Mapping[str, Any]) -> None:
    """Raises `Unimplemented` for a tensor that lies in a shared memory region."""
    if "shared_memory_region" in parameters:
        raise Unimplemented(f"{kind} {short(name)}: shared memory is not supported by this router")


def short(value: object) -> str:
    """Enough of a value to recognise it in a message; hostile ones are long."""
    if isinstance(value, int) and not -(2**64) < value < 2**64:
        return "an integer of more than 64 bits"
    if isinstance(value, (list, tuple)):
        shown = ", ".join(short(item) for item in value[:_MAX_RANK])
        return f"[{shown}{', ...' if len(value) > _MAX_RANK else ''}]"
    shown = repr(value[:64]) if isinstance(value, (str, bytes)) else repr(value)
    return shown if len(shown) <= 64 else f"{shown[:61]}..."


def invalid(name: str, problem: str) -> InvalidRequest:
    """The error for one input, named in Triton's manner."""
    return InvalidRequest(f"input '{name}': {problem}", param=name)


def _bytes_elements(name: str, count: int, raw: bytes) -> Values:
    values: Values = []
    at = 0
    for index in range(count):
        if at + 4 > len(raw):
            raise invalid(name, f"ends within the length of element {index}: {len(raw)} bytes for {count} of BYTES")
        (length,) = _LENGTH.unpack_from(raw, at)
        at += 4
        if at + length > len(raw):
            raise invalid(name, f"element {index} says {length} bytes, only {len(raw) - at} follow")
        values.append(raw[at : at + length])
        at += length
    if at != len(raw):
        raise invalid(name, f"has {len(raw) - at} bytes more than its {count} elements")
    return values


def _flatten(name: str, data: object, values: Values, count: int, depth: int = 0) -> None:
    if not isinstance(data, list):
        raise invalid(name, "data is not a list")
    if depth == _MAX_RANK:
        raise invalid(name, f"data is nested more than {_MAX_RANK} deep")
    for item in data:
        if isinstance(item, list):
            _flatten(name, item, values, count, depth + 1)
        elif len(values) == count:
            raise invalid(name, f"got more than {count} elements")
        else:
            values.append(item)


def _element(name: str, datatype: str, value: object) -> object:
    """One JSON or `contents` value as an element of that datatype."""
    if datatype == "BYTES":
        if isinstance(value, str):
            return value.encode("utf-8", "surrogatepass")
        if isinstance(value, bytes):
            return value
    elif datatype == "BOOL":
        if isinstance(value, bool):
            return value
    elif isinstance(value, bool):
        pass
    elif datatype in _RANGES:
        low, high = _RANGES[datatype]
        if isinstance(value, int) and low <= value < high:
            return value
    elif isinstance(value, float) or (isinstance(value, int) and -(2**64) < value < 2**64):
        return float(value)
    raise invalid(name, f"{short(value)} is not a value of {datatype}")
