"""The operators between the matrix products: norm, attention over the paged pool, gated activation.

Two sets: `TorchOperators` runs on any device and dtype; `native.NativeOperators` fuses the same in compiled kernels for
float32 on a CPU. The model calls them and knows no other difference between devices.

The KV pool is one tensor, shape [kv_blocks, layers, 2 (key, value), kv_heads, block_size, head_dim]: all bytes of a
block lie together, at `block * bytes_per_block`, so that a block moves between machines as one piece.
"""

from typing import Protocol

import torch
from torch.nn import functional

from dynamo_llm.engines.torch_engine.batch import Batch, Chunk
from dynamo_llm.engines.torch_engine.model_config import ModelConfig
from dynamo_llm.engines.torch_engine.weights import Layer


class Operators(Protocol):
    """What a device brings. All of them allocate their results."""

    def norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """RMSNorm (arXiv:1910.07467) of each row."""
        ...

    def attend(self, index: int, layer: Layer, qkv: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Rotate, write keys and values to the pool, attend. `qkv` is [tokens, (heads + 2 kv_heads) * head_dim] and may
        be overwritten; returns [tokens, heads * head_dim]."""
        ...

    def silu_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        """`silu(gate) * up`; [tokens, 2 n] to [tokens, n]."""
        ...


def allocate_pool(
    config: ModelConfig, kv_blocks: int, block_size: int, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """See the module's docstring. Zeroed, so that its pages are really there before the first request."""
    shape = (kv_blocks, config.layers, 2, config.kv_heads, block_size, config.head_dim)
    return torch.zeros(shape, dtype=dtype, device=device)


class TorchOperators:
    """Torch's own operators; attention gathers each sequence's blocks."""

    def __init__(self, config: ModelConfig, pool: torch.Tensor, rope: torch.Tensor) -> None:
        self._heads, self._kv_heads, self._head_dim = config.heads, config.kv_heads, config.head_dim
        self._eps = config.norm_eps
        self._pool, self._rope = pool, rope.to(pool.dtype)

    def norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, (x.shape[-1],), weight, self._eps)

    def silu_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate).mul_(up)

    def attend(self, index: int, layer: Layer, qkv: torch.Tensor, batch: Batch) -> torch.Tensor:
        query = self._rotate_and_store(index, layer, qkv, batch)
        out = torch.empty_like(query)
        if batch.decodes:
            out[: batch.decodes] = self._attend_decodes(index, query[: batch.decodes], batch)
        for chunk in batch.chunks:
            rows = slice(chunk.first, chunk.first + chunk.tokens)
            out[rows] = self.attend_chunk(index, query[rows], batch, chunk)
        return out.flatten(1)

    def _rotate_and_store(self, index: int, layer: Layer, qkv: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The rotated queries, [tokens, heads, head_dim]; keys and values go to their slots."""
        query, key, value = qkv.view(len(qkv), -1, self._head_dim).split(
            [self._heads, self._kv_heads, self._kv_heads], dim=1
        )
        if layer.query_norm is not None and layer.key_norm is not None:
            query, key = self.norm(query, layer.query_norm), self.norm(key, layer.key_norm)
        cos, sin = self._rope[batch.positions].unsqueeze(1).chunk(2, dim=-1)
        size = self._pool.shape[4]
        block, offset = batch.slots // size, batch.slots % size
        self._pool[:, index, 0][block, :, offset] = _rotate(key, cos, sin)
        self._pool[:, index, 1][block, :, offset] = value
        return _rotate(query, cos, sin)

    def _attend_decodes(self, index: int, query: torch.Tensor, batch: Batch) -> torch.Tensor:
        """One query for each sequence against all its context; shorter contexts are padded and masked."""
        sequences = len(query)
        keys, values = self._gather(index, batch.block_tables[:sequences])
        positions = torch.arange(keys.shape[2], device=query.device)
        mask = positions <= batch.positions[:sequences, None]
        out = functional.scaled_dot_product_attention(
            query.unsqueeze(2), keys, values, attn_mask=mask[:, None, None], enable_gqa=True
        )
        return out.squeeze(2)

    def attend_chunk(self, index: int, query: torch.Tensor, batch: Batch, chunk: Chunk) -> torch.Tensor:
        """A chunk's rotated queries, [tokens, heads, head_dim], against its context in the pool and its own keys."""
        context = chunk.start + chunk.tokens
        blocks = -(-context // self._pool.shape[4])
        keys, values = self._gather(index, batch.block_tables[chunk.sequence : chunk.sequence + 1, :blocks])
        keys, values = keys[:, :, :context], values[:, :, :context]
        mask = None
        if chunk.start:
            mask = torch.ones(chunk.tokens, context, dtype=torch.bool, device=query.device).tril(chunk.start)
        out = functional.scaled_dot_product_attention(
            query.transpose(0, 1).unsqueeze(0),
            keys,
            values,
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=True,
        )
        return out.squeeze(0).transpose(0, 1)

    def _gather(self, index: int, tables: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values behind block tables [sequences, blocks]: each [sequences, kv_heads, tokens, head_dim]."""
        blocks = self._pool[:, index].index_select(0, tables.flatten())
        blocks = blocks.view(*tables.shape, *blocks.shape[1:]).permute(2, 0, 3, 1, 4, 5)
        keys, values = blocks.reshape(2, len(tables), self._kv_heads, -1, self._head_dim)
        return keys, values


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE of [tokens, heads, head_dim] by cosines and sines [tokens, 1, head_dim / 2]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
