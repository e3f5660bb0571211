"""Tensors between wire and values."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.utils import deserialize_bytes_tensor, serialize_byte_tensor

from router.errors import InvalidRequest
from router.kserve.face import INPUTS
from router.kserve.tensors import Tensor, check_shape, from_raw, from_values, short, to_json, to_raw


def outcome(function, *args):
    """(values, None) or ([], the message of the error that it must be)."""
    try:
        return function(*args), None
    except InvalidRequest as error:
        return [], error.message


@given(st.lists(st.binary(max_size=20), max_size=8))
def test_bytes_round_trip(values):
    """BYTES go to the client's form and back unchanged."""
    raw = to_raw(Tensor("t", "BYTES", values))
    assert deserialize_bytes_tensor(raw).tolist() == values
    packed = serialize_byte_tensor(np.array(values, np.object_))
    assert from_raw("t", "BYTES", len(values), packed.item() if packed.size else b"") == values


@pytest.mark.parametrize("datatype", ["INT32", "INT64", "UINT32", "UINT64"])
def test_integers_round_trip(datatype):
    """Integers survive at both ends of their range."""
    info = np.iinfo(datatype.lower())
    values = [info.min, 0, info.max]
    assert from_raw("t", datatype, 3, to_raw(Tensor("t", datatype, values))) == values
    assert from_values("t", datatype, 3, to_json(Tensor("t", datatype, values))) == values
    with pytest.raises(InvalidRequest, match="'t'"):
        from_values("t", datatype, 1, [info.max + 1])


@given(st.sampled_from(["BYTES", "BOOL", "INT32", "FP64"]), st.integers(0, 5), st.binary(max_size=40))
def test_random_bytes_never_do_harm(datatype, count, raw):
    """Any bytes are either exactly `count` elements or a clear error."""
    values, error = outcome(from_raw, "t", datatype, count, raw)
    assert len(values) == count if error is None else error.startswith("input 't'")


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from(["BYTES", "BOOL", "INT64", "UINT32", "FP32"]), st.integers(0, 3), _JSON)
def test_random_values_never_do_harm(datatype, count, data):
    """Any JSON is either exactly `count` elements of the datatype or a clear error."""
    kind = {"BYTES": bytes, "BOOL": bool, "FP32": float}.get(datatype, int)
    values, error = outcome(from_values, "t", datatype, count, data)
    assert len(values) == count if error is None else len(error) < 200
    assert all(type(value) is kind for value in values)


@pytest.mark.parametrize("name", INPUTS)
def test_announced_shape_and_type_are_taken(name):
    """What the metadata announces is what the check accepts, with and without a batch dimension."""
    spec = INPUTS[name]
    assert check_shape(spec, spec.datatype, [1], 100) == 1
    assert check_shape(spec, spec.datatype, [1, 1], 100) == 1
    assert spec.datatype in spec.accepted


def test_short_is_short():
    """Messages quote hostile values only in part."""
    for value in ("x" * 10**6, [10**5000] * 9, list(range(10**5)), b"y" * 10**6):
        assert len(short(value)) < 400
