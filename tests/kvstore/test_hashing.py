"""Block hashes: against a straightforward reference, and what must be refused."""

import struct

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from kvstore.hashing import block_hashes, root_seed


def reference(tokens: list[int], block_size: int, seed: int) -> list[int]:
    """The contract's sentence, as slowly as it reads."""
    hashes = []
    for begin in range(0, len(tokens) - len(tokens) % block_size, block_size):
        block = b"".join(struct.pack("<I", token) for token in tokens[begin : begin + block_size])
        seed = xxhash.xxh3_64(block, seed=seed).intdigest()
        hashes.append(seed)
    return hashes


tokens = st.lists(st.integers(0, 2**32 - 1), max_size=200)
seeds = st.integers(0, 2**64 - 1)


@given(tokens, st.integers(1, 70), seeds)
def test_reference(tokens: list[int], block_size: int, seed: int) -> None:
    """Bytes and arrays give what the contract says, for whole blocks only."""
    array = np.array(tokens, dtype=np.uint32)
    expected = reference(tokens, block_size, seed)
    for given_tokens in (array, array.tobytes(), memoryview(array.tobytes()), bytearray(array.tobytes())):
        hashes = block_hashes(given_tokens, block_size, seed=seed)
        assert hashes.dtype == np.uint64
        assert hashes.tolist() == expected


@given(tokens, st.integers(1, 20), seeds)
def test_continued(tokens: list[int], block_size: int, seed: int) -> None:
    """A sequence that is hashed in two parts has the hashes of the whole."""
    array = np.array(tokens, dtype=np.uint32)
    whole = block_hashes(array, block_size, seed=seed).tolist()
    cut = len(whole) // 2
    first = block_hashes(array[: cut * block_size], block_size, seed=seed).tolist()
    rest = block_hashes(array[cut * block_size :], block_size, seed=first[-1] if first else seed).tolist()
    assert first + rest == whole


def test_fixed_values() -> None:
    """Hashes that are stored or sent by one version are understood by the next."""
    seed = root_seed("demo")
    assert seed == 16315330592195321860
    assert block_hashes(np.arange(8, dtype=np.uint32), 4, seed=seed).tolist() == [
        12502350105291652234,
        6682372025862286790,
    ]


def test_strided_array() -> None:
    """A view of every second token is hashed by its values, not by the memory under it."""
    array = np.arange(32, dtype=np.uint32)
    assert block_hashes(array[::2], 4, seed=1).tolist() == reference(list(range(0, 32, 2)), 4, 1)


def test_names_do_not_mix() -> None:
    """Model, adapter and salt each separate the chains, and none of them can be moved into another."""
    seeds = {
        root_seed("m"),
        root_seed("m", "a"),
        root_seed("m", "", "a"),
        root_seed("ma"),
        root_seed("m", "a", "b"),
        root_seed("m", "ab"),
        root_seed("m", "b", "a"),
        root_seed("", "m"),
    }
    assert len(seeds) == 8


@pytest.mark.parametrize(
    ("token_ids", "block_size", "message"),
    [
        (b"\0\0\0\0", 0, "block_size"),
        (b"\0\0\0", 4, "uint32"),
        (np.zeros(4, dtype=np.int64), 4, "int64"),
        (np.zeros((2, 4), dtype=np.uint32), 4, "shape"),
    ],
)
def test_refused(token_ids: bytes, block_size: int, message: str) -> None:
    """What cannot be hashed is an error that names the fault, not a wrong hash."""
    with pytest.raises(ValueError, match=message):
        block_hashes(token_ids, block_size, seed=0)
