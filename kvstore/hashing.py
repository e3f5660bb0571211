"""Block hashes (design contract 1). Engines name their KV blocks by them, the router looks prompts up by them.

The hash of a block is `xxh3_64(tokens as little-endian uint32, seed=hash of the block before)`. It places a prompt;
it is not cryptographic, so whoever reuses KV by it compares the tokens too.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

Tokens = bytes | bytearray | memoryview | npt.NDArray[np.uint32]
"""Token ids, shape [tokens]: a uint32 array, or its little-endian bytes."""


def root_seed(model: str, lora: str = "", cache_salt: str = "") -> int:
    """Seed of the first block. Different models, adapters or salts never share a hash chain.

    Each name seeds the hash of the next, so no choice of a salt can imitate another model or adapter.
    """
    seed = 0
    for name in (model, lora, cache_salt):
        seed = xxh3_64_intdigest(name.encode(), seed)
    return seed


def block_hashes(token_ids: Tokens, block_size: int, *, seed: int) -> npt.NDArray[np.uint64]:
    """Hashes of the whole blocks of a sequence, shape [tokens // block_size], dtype uint64.

    `seed` is `root_seed(...)`, or the hash of the block before when a sequence is continued. Raises `ValueError` for a
    block size below 1, for bytes that are not whole uint32 values, and for an array of another dtype or shape.
    """
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, not {block_size}")
    block_bytes = 4 * block_size
    data = _as_bytes(token_ids)
    blocks = data.nbytes // block_bytes
    if not blocks:
        return np.empty(0, dtype=np.uint64)
    # A void dtype lets numpy cut the buffer into `bytes` objects in C: a third off the time of slicing in Python.
    pieces: list[Any] = np.frombuffer(data, dtype=f"V{block_bytes}", count=blocks).tolist()
    return np.array([seed := xxh3_64_intdigest(piece, seed) for piece in pieces], dtype=np.uint64)


def _as_bytes(token_ids: Tokens) -> memoryview:
    if isinstance(token_ids, np.ndarray):
        if token_ids.dtype != np.uint32 or token_ids.ndim != 1:
            raise ValueError(f"token ids must be uint32 of shape [tokens], not {token_ids.dtype} of {token_ids.shape}")
        return np.ascontiguousarray(token_ids, dtype="<u4").data.cast("B")
    view = memoryview(token_ids)
    if view.nbytes % 4:
        raise ValueError(f"token ids are little-endian uint32: {view.nbytes} bytes are no whole number of them")
    return view
