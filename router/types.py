"""What passes between the API layer (OpenAI, KServe) and the routing layer (`generation.py`)."""

from collections.abc import Callable
from typing import Protocol

from msgspec import Struct

from kvstore.wire import FinishReason, SamplingParams, TokenLogprob


class GenerationRequest(Struct, frozen=True, kw_only=True):
    """One sequence to generate, already tokenised. `n` choices of an API are `n` of these."""

    model: str
    token_ids: bytes
    """The prompt: little-endian uint32, shape [tokens], not empty."""
    sampling: SamplingParams
    request_id: str
    stop: tuple[str, ...] = ()
    """Stop strings: they end the sequence and are not part of the text."""
    include_stop: bool = False
    skip_special_tokens: bool = True
    lora: str = ""
    cache_salt: str = ""
    priority: int = 0
    trace: dict[str, str] = {}


class Placed(Struct, frozen=True, kw_only=True):
    """Where a request went and why."""

    instance: str
    prompt_blocks: int
    """Whole blocks of the prompt."""
    reused_blocks: int
    """How many of them the index says that the worker holds."""
    reason: str
    """For metrics: `kv`, `load`, `round_robin`, `random`, `migration`."""
    prefill_instance: str = ""
    """Which other worker computes the prompt; empty: `instance` itself."""


class Delta(Struct):
    """What one frame brought for one request."""

    text: str
    """Whole characters only; may be empty while a character or a stop string is incomplete."""
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    """Set on the last delta."""


class Result(Struct, kw_only=True):
    """The final answer of a request, with everything that was generated."""

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None
    prompt_logprobs: list[TokenLogprob | None] | None
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    """The stop string or stop token id that ended it, None at end-of-sequence."""
    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens whose KV the engine really reused."""
    queue_ms: float
    ttft_ms: float
    placed: Placed


class Generator(Protocol):
    """The routing layer, as the API layer sees it. The implementation is `generation.Generation`."""

    async def generate(
        self,
        request: GenerationRequest,
        on_delta: Callable[[Delta], None] | None = None,
        on_placed: Callable[[Placed], None] | None = None,
    ) -> Result:
        """Serve one request.

        `on_delta` and `on_placed` are called on the event loop, straight from the frame's handler: they must not block.
        `on_placed` comes before the first delta, and again when something of it changes, as its
        reason does to `migration` after a worker was lost.
        Cancelling the awaiting task cancels the request on its worker. Raises `router.errors.RouterError`.
        """
        ...
