"""Tensors on their way between two stubs."""

from typing import Any

import numpy as np
import pytest

from dynamo_llm.hosts.tritonserver import translate


@pytest.mark.parametrize(
    "array",
    [
        np.array([[b"a", b""], [b"\xff", "\u00e9".encode()]], np.object_),
        np.array([True, False]),
        np.array([[1, -2]], np.int32),
        np.array([2**64 - 1], np.uint64),
        np.array([], np.float32),
        np.zeros((0, 3), np.object_),
        np.arange(12, dtype=np.int32).reshape(3, 4)[:, ::2],
    ],
)
def test_tensors_arrive_as_they_were_sent(array: Any) -> None:
    """Whatever their type, shape and layout in memory."""
    packed = translate.encode(translate.pack({"x": array}))
    (name, got), *rest = translate.unpack(translate.decode_tensors(packed)).items()
    assert (name, rest) == ("x", [])
    assert (got.dtype, got.shape) == (array.dtype, array.shape)
    assert got.tolist() == array.tolist()
