"""Options of the torch engine: read from the worker's `engine_options`, validated here and nowhere else."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from dynamo_llm.engines.base import EngineError
from dynamo_llm.engines.options import read_options

_Count = Annotated[int, Meta(ge=1)]


class TorchConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the engine uses the machine. `None` and `auto` are decided when the engine starts."""

    block_size: Annotated[int, Meta(ge=4, le=512, multiple_of=4)] = 16
    """Tokens in a KV block."""
    kv_blocks: _Count | None = None
    """Size of the KV pool; None: as many as fit `kv_memory_fraction`."""
    kv_memory_fraction: Annotated[float, Meta(gt=0, lt=1)] | None = None
    """Share of the device's free memory for the pool when `kv_blocks` is None; None: 0.85 on CUDA, and on a CPU 0.1 of
    the available memory but at most 2,048 blocks."""
    max_batch_tokens: _Count = 512
    """Most tokens computed in one step; longer prompts are prefilled in chunks beside the running decodes."""
    max_seqs: _Count = 128
    """Most sequences in the batch."""
    max_waiting: _Count = 1024
    """Most requests queued for the batch; more are refused with `overloaded`."""
    max_context: _Count | None = None
    """Most tokens of a sequence, prompt and output together; None: the model's own limit, or what fits the pool."""
    prefix_caching: bool = True
    """Reuse the KV blocks of earlier sequences that begin alike, and announce them."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, …; auto: CUDA where there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of weights and KV; auto: float32 on a CPU, the weights' own on CUDA."""
    kv_lease_s: Annotated[float, Meta(gt=0, le=3600)] = 30.0
    """How long a prefill's blocks are kept for the worker that is to decode."""
    threads: _Count | None = None
    """CPU threads of one step; None: one per core. Divide the cores where workers share a machine."""
    attention: Literal["auto", "native", "sdpa"] = "auto"
    """`native`: compiled kernels over the block table (CPU, float32); `sdpa`: gather, and torch's attention, anywhere;
    auto: native where it can run."""

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> "TorchConfig":
        """Numbers may be text, as command lines give them. Raises `EngineError` naming the nearest known option."""
        config = read_options("torch", cls, options)
        if config.max_batch_tokens < config.max_seqs:
            raise EngineError(
                f"max_batch_tokens ({config.max_batch_tokens}) must be at least max_seqs ({config.max_seqs}): "
                "each running sequence decodes one token in a step"
            )
        return config
