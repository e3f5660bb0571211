"""CPU kernels between the matrix products, compiled by numba: norm, rotate and store, attention, gated activation.

Each kernel is a C function of one pointer to its arguments (a record of int64 fields: addresses and sizes), so it costs
a microsecond to call and can run on the OpenMP threads that torch's own products run on (`team.py`). Work is dealt out
by an atomic counter. Only `native.py` calls this module.
"""

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.core import cgutils
from numba.core.caching import FunctionCache
from numba.extending import intrinsic

FLAGS = {"fastmath": True, "error_model": "numpy", "boundscheck": False}
F = np.float32


def record(*fields: str) -> np.dtype[np.void]:
    """Layout of a kernel's arguments."""
    return np.dtype([(field, np.int64) for field in fields])


NORM = record("next", "x", "weight", "out", "rows", "columns", "eps")
"""`eps` holds the bits of a float64; the other kernels have no floating-point argument."""
SILU_GATE = record("next", "x", "out", "rows", "columns")
STORE = record("next", "qkv", "positions", "slots", "rope", "pool", "layer", "tokens", "query_norm", "key_norm", "eps")
ATTEND = record(
    "next",
    "worker",
    "query",
    "row",
    "tables",
    "width",
    "positions",
    "pool",
    "layer",
    "tokens",
    "scratch",
    "context",
    "out",
)


NEXT, WORKER = 0, 1
"""Fields that count up: the work handed out, and the threads that have arrived."""


def _pointer_to(element: Any) -> Any:
    @intrinsic
    def pointer(typing_context: Any, address: Any) -> Any:
        signature = types.CPointer(element)(address)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return signature, generate

    return pointer


_floats = _pointer_to(types.float32)
_ints = _pointer_to(types.int64)
_int32s = _pointer_to(types.int32)


@intrinsic
def _fetch_add(typing_context: Any, record: Any, field: Any, value: Any) -> Any:
    """Atomically add to an int64 field of the arguments; returns what it was before."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        fields = builder.bitcast(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", builder.gep(fields, [arguments[1]]), arguments[2], "monotonic")

    return types.int64(types.voidptr, types.int64, types.int64), generate


@intrinsic
def _as_float32(typing_context: Any, bits: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@intrinsic
def _as_float64(typing_context: Any, bits: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.DoubleType())

    return types.float64(types.int64), generate


@intrinsic
def _prefetch(typing_context: Any, address: Any) -> Any:
    """Bring a cache line near. Blocks lie far apart, and the hardware's own prefetching stops at the page."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
        prototype = ir.FunctionType(ir.VoidType(), [byte, flag, flag, flag])
        function = cgutils.get_or_insert_function(builder.module, prototype, "llvm.prefetch.p0i8")
        read, near, data = flag(0), flag(3), flag(1)
        builder.call(function, [builder.inttoptr(arguments[0], byte), read, near, data])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@njit(inline="always", **FLAGS)
def _exp(x):
    """e**x in float32 to 2 ulp, in operations that vectorise: 2**n by its bits, the rest by the Cephes polynomial."""
    x = min(max(x, F(-87.0)), F(88.0))
    n = np.floor(x * F(1.44269504) + F(0.5))
    r = x - n * F(0.693359375) + n * F(2.12194440e-4)
    p = F(1.9875691500e-4)
    p = p * r + F(1.3981999507e-3)
    p = p * r + F(8.3334519073e-3)
    p = p * r + F(4.1665795894e-2)
    p = p * r + F(1.6666665459e-1)
    p = p * r + F(5.0000001201e-1)
    p = p * r * r + r + F(1.0)
    return p * _as_float32((np.int32(n) + np.int32(127)) << np.int32(23))


@njit(inline="always", **FLAGS)
def _norm_row(x, weight, eps, out):
    total = F(0)
    for j in range(x.shape[0]):
        total += x[j] * x[j]
    scale = F(1) / np.sqrt(total / F(x.shape[0]) + F(eps))
    for j in range(x.shape[0]):
        out[j] = x[j] * scale * weight[j]


def norm(arguments):
    """RMSNorm: x[rows, columns] to out."""
    a = carray(arguments, (1,), NORM)[0]
    x = carray(_floats(a.x), (a.rows, a.columns))
    out = carray(_floats(a.out), (a.rows, a.columns))
    weight = carray(_floats(a.weight), (a.columns,))
    eps = _as_float64(a.eps)
    while True:
        first = _fetch_add(arguments, NEXT, 8)
        if first >= a.rows:
            return
        for i in range(first, min(first + 8, a.rows)):
            _norm_row(x[i], weight, eps, out[i])


def silu_gate(arguments):
    """x[rows, 2 * columns] to silu(left half) * right half."""
    a = carray(arguments, (1,), SILU_GATE)[0]
    x = carray(_floats(a.x), (a.rows, 2, a.columns))
    out = carray(_floats(a.out), (a.rows, a.columns))
    while True:
        first = _fetch_add(arguments, NEXT, 8)
        if first >= a.rows:
            return
        for i in range(first, min(first + 8, a.rows)):
            gate, up, to = x[i, 0], x[i, 1], out[i]
            for j in range(a.columns):
                to[j] = gate[j] / (F(1) + _exp(-gate[j])) * up[j]


def make_store(layers: int, heads: int, kv_heads: int, block_size: int, head_dim: int) -> Callable[[Any], None]:
    """Kernel: rotate queries in place; rotate keys into the pool, with the values. Optional norm of both (Qwen3)."""
    half = head_dim // 2
    row_heads = heads + 2 * kv_heads

    def store(arguments):
        a = carray(arguments, (1,), STORE)[0]
        qkv = carray(_floats(a.qkv), (a.tokens, row_heads, head_dim))
        positions, slots = carray(_ints(a.positions), (a.tokens,)), carray(_ints(a.slots), (a.tokens,))
        while True:
            first = _fetch_add(arguments, NEXT, 8)
            if first >= a.tokens:
                return
            for i in range(first, min(first + 8, a.tokens)):
                angles = carray(_floats(a.rope + positions[i] * head_dim * 4), (2, half))
                cos, sin = angles[0], angles[1]
                block, offset = slots[i] // block_size, slots[i] % block_size
                base = ((block * layers + a.layer) * 2 * kv_heads * block_size + offset) * head_dim
                for h in range(heads + kv_heads):
                    x = qkv[i, h]
                    if a.query_norm != 0:
                        weight = a.query_norm if h < heads else a.key_norm
                        _norm_row(x, carray(_floats(weight), (head_dim,)), _as_float64(a.eps), x)
                    to = x
                    if h >= heads:
                        at = base + (h - heads) * block_size * head_dim
                        to = carray(_floats(a.pool + at * 4), (head_dim,))
                    for j in range(half):
                        left, right = x[j], x[j + half]
                        to[j] = left * cos[j] - right * sin[j]
                        to[j + half] = right * cos[j] + left * sin[j]
                for h in range(kv_heads):
                    at = base + (kv_heads + h) * block_size * head_dim
                    to, value = carray(_floats(a.pool + at * 4), (head_dim,)), qkv[i, heads + kv_heads + h]
                    for j in range(head_dim):
                        to[j] = value[j]

    return store


def make_attend(layers: int, heads: int, kv_heads: int, block_size: int, head_dim: int) -> Callable[[Any], None]:
    """Kernel: attention of one query per sequence over its block table. One piece of work is one key head's group.

    It waits for memory more than it computes, so each block's rows are asked for while the block before is worked on.
    """
    group = heads // kv_heads
    scale = F(head_dim**-0.5)
    row_bytes = head_dim * 4
    head_bytes = block_size * row_bytes
    layer_heads = 2 * kv_heads
    block_bytes = layers * layer_heads * head_bytes

    def attend(arguments):
        a = carray(arguments, (1,), ATTEND)[0]
        tables = carray(_int32s(a.tables), (a.tokens, a.width))
        positions = carray(_ints(a.positions), (a.tokens,))
        worker = _fetch_add(arguments, WORKER, 1)
        shape = (group, a.context // block_size, block_size)
        scores = carray(_floats(a.scratch + worker * group * a.context * 4), shape)
        while True:
            task = _fetch_add(arguments, NEXT, 1)
            if task >= a.tokens * kv_heads:
                return
            i, h = task // kv_heads, task % kv_heads
            context = positions[i] + 1
            blocks = (context + block_size - 1) // block_size
            table = tables[i]
            keys_at = a.pool + (a.layer * layer_heads + h) * head_bytes
            values_at = keys_at + kv_heads * head_bytes
            query = carray(_floats(a.query + (i * a.row + h * group * head_dim) * 4), (group, head_dim))
            out = carray(_floats(a.out + task * group * row_bytes), (group, head_dim))
            for b in range(blocks):
                ahead = keys_at + np.int64(table[min(b + 1, blocks - 1)]) * block_bytes
                keys = carray(_floats(keys_at + np.int64(table[b]) * block_bytes), (block_size, head_dim))
                for t in range(block_size):
                    for line in range(0, row_bytes, 64):
                        _prefetch(ahead + t * row_bytes + line)
                    key = keys[t]
                    for g in range(group):
                        q = query[g]
                        dot = F(0)
                        for j in range(head_dim):
                            dot += q[j] * key[j]
                        scores[g, b, t] = dot * scale
            for g in range(group):
                _softmax(scores[g].reshape(a.context), context, blocks * block_size)
                for j in range(head_dim):
                    out[g, j] = F(0)
            for b in range(blocks):
                ahead = values_at + np.int64(table[min(b + 1, blocks - 1)]) * block_bytes
                values = carray(_floats(values_at + np.int64(table[b]) * block_bytes), (block_size, head_dim))
                for t in range(0, block_size, 4):
                    for line in range(0, 4 * row_bytes, 64):
                        _prefetch(ahead + t * row_bytes + line)
                    v0, v1, v2, v3 = values[t], values[t + 1], values[t + 2], values[t + 3]
                    for g in range(group):
                        to = out[g]
                        p0, p1, p2, p3 = scores[g, b, t], scores[g, b, t + 1], scores[g, b, t + 2], scores[g, b, t + 3]
                        for j in range(head_dim):
                            to[j] += p0 * v0[j] + p1 * v1[j] + p2 * v2[j] + p3 * v3[j]

    return attend


@njit(inline="always", **FLAGS)
def _softmax(row, length, padded):
    """Of the first `length` scores, in place; those up to `padded` become 0."""
    highest = F(-3e38)
    for t in range(length):
        highest = max(highest, row[t])
    total = F(0)
    for t in range(length):
        row[t] = _exp(row[t] - highest)
        total += row[t]
    inverse = F(1) / total
    for t in range(length):
        row[t] *= inverse
    for t in range(length, padded):
        row[t] = F(0)


def compile_kernel(kernel: Callable[[Any], None]) -> Any:
    """Machine code of a kernel (`.address`), kept on disk where there is a place for it."""
    signature = types.void(types.voidptr)
    try:
        with _cache_lock(kernel):
            return cfunc(signature, cache=True, **FLAGS)(kernel)
    except (RuntimeError, OSError) as error:
        # No place to write to, or a full one.
        if isinstance(error, RuntimeError) and "cache" not in str(error):
            raise
        return cfunc(signature, **FLAGS)(kernel)


@contextmanager
def _cache_lock(kernel: Callable[[Any], None]) -> Iterator[None]:
    """One process at a time in the kernel's cache, which numba itself does not lock: two workers that write to it at
    once, for heads of different shape, could leave an index that names the other's machine code."""
    folder = Path(FunctionCache(kernel).cache_path)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{kernel.__name__}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
