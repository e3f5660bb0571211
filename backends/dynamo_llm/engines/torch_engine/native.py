"""The operators of float32 on a CPU: compiled kernels over the block table, torch's attention for prompt chunks."""

import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba.core.errors import NumbaError

from dynamo_llm.engines.torch_engine import kernels
from dynamo_llm.engines.torch_engine.batch import Batch
from dynamo_llm.engines.torch_engine.model_config import ModelConfig
from dynamo_llm.engines.torch_engine.operators import TorchOperators
from dynamo_llm.engines.torch_engine.team import Team
from dynamo_llm.engines.torch_engine.weights import Layer

logger = logging.getLogger(__name__)

_PARALLEL_FROM = 32768
"""Elements from which a second thread is worth its start."""


class KernelError(Exception):
    """The kernels cannot be compiled on this machine."""


class NativeOperators(TorchOperators):
    """See `operators.Operators`."""

    def __init__(self, config: ModelConfig, pool: torch.Tensor, rope: torch.Tensor, threads: int) -> None:
        super().__init__(config, pool, rope)
        kv_blocks, layers, _, kv_heads, block_size, head_dim = pool.shape
        shape = layers, config.heads, kv_heads, block_size, head_dim
        self._team = Team(threads)
        started = time.monotonic()
        logger.info("compiling the CPU kernels (kept on disk for the next start)")
        self._norm = _Kernel(kernels.norm, kernels.NORM, self._team)
        self._silu_gate = _Kernel(kernels.silu_gate, kernels.SILU_GATE, self._team)
        self._store = _Kernel(kernels.make_store(*shape), kernels.STORE, self._team)
        self._attend = _Kernel(kernels.make_attend(*shape), kernels.ATTEND, self._team)
        logger.info("CPU kernels are ready after %.1f s", time.monotonic() - started)
        context = min(len(rope), kv_blocks * block_size)
        self._context = -(-context // block_size) * block_size
        self._scores = torch.empty(self._team.threads * config.heads // kv_heads * self._context)
        self._eps_bits = int(np.float64(config.norm_eps).view(np.int64))

    def norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        rows, columns = x.shape
        out = torch.empty_like(x)
        addresses = x.data_ptr(), weight.data_ptr(), out.data_ptr()
        self._norm.run(rows * columns >= _PARALLEL_FROM, *addresses, rows, columns, self._eps_bits)
        return out

    def silu_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        rows, columns = gate_up.shape[0], gate_up.shape[1] // 2
        out = torch.empty(rows, columns)
        self._silu_gate.run(rows * columns >= _PARALLEL_FROM, gate_up.data_ptr(), out.data_ptr(), rows, columns)
        return out

    def attend(self, index: int, layer: Layer, qkv: torch.Tensor, batch: Batch) -> torch.Tensor:
        tokens = len(qkv)
        self._rotate_into_pool(index, layer, qkv, batch)
        out = torch.empty(tokens, self._heads * self._head_dim)
        if batch.decodes:
            self._attend_decodes_into(out, index, qkv, batch)
        for chunk in batch.chunks:
            rows = slice(chunk.first, chunk.first + chunk.tokens)
            query = qkv[rows, : self._heads * self._head_dim].view(chunk.tokens, self._heads, self._head_dim)
            out[rows] = self.attend_chunk(index, query, batch, chunk).flatten(1)
        return out

    def _rotate_into_pool(self, index: int, layer: Layer, qkv: torch.Tensor, batch: Batch) -> None:
        """The queries in `qkv` are rotated in place; keys and values go to their slots."""
        norms = (
            layer.query_norm.data_ptr() if layer.query_norm is not None else 0,
            layer.key_norm.data_ptr() if layer.key_norm is not None else 0,
        )
        self._store.run(
            qkv.numel() >= _PARALLEL_FROM,
            *(qkv.data_ptr(), batch.positions.data_ptr(), batch.slots.data_ptr()),
            *(self._rope.data_ptr(), self._pool.data_ptr(), index, len(qkv)),
            *norms,
            self._eps_bits,
        )

    def _attend_decodes_into(self, out: torch.Tensor, index: int, qkv: torch.Tensor, batch: Batch) -> None:
        self._attend.run(
            True,
            0,
            *(qkv.data_ptr(), qkv.shape[1], batch.block_tables.data_ptr(), batch.block_tables.shape[1]),
            *(batch.positions.data_ptr(), self._pool.data_ptr(), index, batch.decodes),
            *(self._scores.data_ptr(), self._context, out.data_ptr()),
        )


class _Kernel:
    """A compiled kernel with its argument record. One engine's thread calls it, so the record is used over and over."""

    def __init__(self, function: Callable[[Any], None], layout: np.dtype[np.void], team: Team) -> None:
        try:
            self._compiled = kernels.compile_kernel(function)
        except (NumbaError, RuntimeError, OSError) as error:
            # LLVM's own errors are RuntimeErrors.
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise KernelError(f"numba cannot compile {function.__name__}: {reason}") from error
        self._arguments = np.zeros(len(layout), dtype=np.int64)
        self._start = team.starter(self._compiled.address, self._arguments.ctypes.data)

    def run(self, parallel: bool, *values: int) -> None:
        """`values` are the record's fields after `next`, the counter by which the threads share the work."""
        self._arguments[:] = (0, *values)
        self._start(parallel)
