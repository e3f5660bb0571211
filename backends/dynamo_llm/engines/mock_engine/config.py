"""Options of the mock engine: read from the worker's `engine_options`, validated here and nowhere else."""

from collections.abc import Mapping
from math import isfinite
from typing import Annotated, Any

from msgspec import Meta, Struct

from dynamo_llm.engines.base import EngineError
from dynamo_llm.engines.mock_engine.timing import Timing
from dynamo_llm.engines.options import read_options

_Count = Annotated[int, Meta(ge=1)]
_Coefficients = tuple[float, float, float]


class MockConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the engine imitates. The defaults are those of Dynamo's mock engine."""

    block_size: Annotated[int, Meta(ge=1, le=1024)] = 64
    """Tokens in a KV block."""
    kv_blocks: _Count = 16384
    """Size of the KV pool; it costs no memory before it fills."""
    max_batch_tokens: _Count = 8192
    """Most tokens computed in one step; longer prompts are prefilled in chunks beside the running decodes."""
    max_seqs: _Count = 256
    """Most sequences in the batch."""
    max_waiting: _Count = 1024
    """Most requests queued for the batch; more are refused with `overloaded`."""
    max_context: _Count | None = None
    """Most tokens of a sequence, prompt and output together; None: the model's own limit, or what fits the pool."""
    prefix_caching: bool = True
    """Reuse the KV blocks of earlier sequences that begin alike, and announce them."""
    kv_events: bool = True
    """Announce them. False imitates an engine that reuses blocks and does not tell."""
    speed_up: Annotated[float, Meta(gt=0)] = 1.0
    """By how much time runs faster than the timing says; `inf`: steps follow each other at once."""
    prefill_ms: _Coefficients = Timing().prefill
    """Of a step that computes n prompt tokens: constant, coefficient of n, coefficient of n squared."""
    decode_ms: _Coefficients = Timing().decode
    """Of a step that decodes with a share p of the KV blocks in use: constant, coefficient of p, of p squared."""
    mean_output_tokens: _Count = 128
    """Mean length of an answer whose request sets no `max_tokens`."""

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> "MockConfig":
        """Numbers may be text, as command lines give them. Raises `EngineError` naming the nearest known option."""
        config = read_options("mock", cls, options)
        if config.max_batch_tokens < config.max_seqs:
            raise EngineError(
                f"max_batch_tokens ({config.max_batch_tokens}) must be at least max_seqs ({config.max_seqs}): "
                "each running sequence decodes one token in a step"
            )
        if not all(map(isfinite, (*config.prefill_ms, *config.decode_ms))):
            raise EngineError("prefill_ms and decode_ms must be finite numbers")
        return config

    @property
    def timing(self) -> Timing:
        return Timing(prefill=self.prefill_ms, decode=self.decode_ms)
