"""One request on its way through the engine: its tokens, its KV blocks and how far both have come."""

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from kvstore.wire import SamplingParams, TokenLogprob

if TYPE_CHECKING:
    from dynamo_llm.transfer.pull import Pull


class Sequence:
    """Plain state, changed by the scheduler, the block manager and the engine's step only."""

    __slots__ = (
        "blocks",
        "cached_tokens",
        "chain",
        "committed",
        "computed",
        "exports",
        "first_step_s",
        "key",
        "max_tokens",
        "order",
        "priority",
        "prompt_logprobs",
        "prompt_tokens",
        "pull",
        "pull_s",
        "pulled_tokens",
        "remote",
        "root",
        "row",
        "sampling",
        "seed",
        "seen",
        "started",
        "stop_ids",
        "submitted_s",
        "tokens",
    )

    def __init__(
        self,
        key: int,
        tokens: list[int],
        sampling: SamplingParams,
        *,
        prompt_tokens: int | None = None,
        max_tokens: int,
        stop_ids: Collection[int] = (),
        root: tuple[str, str] = ("", ""),
        seed: int = 0,
        priority: int = 0,
        submitted_s: float = 0.0,
    ) -> None:
        self.key = key
        self.tokens = tokens
        """Prompt and output so far."""
        self.prompt_tokens = len(tokens) if prompt_tokens is None else prompt_tokens
        """What follows it is output, of an earlier attempt perhaps."""
        self.sampling = sampling
        self.max_tokens = max_tokens
        """Length, prompt included, at which it ends."""
        self.stop_ids = frozenset(stop_ids)
        self.root = root
        """LoRA and cache salt: sequences share KV blocks only within one root."""
        self.seed = seed
        self.priority = priority
        """Lower is sooner."""
        self.submitted_s = submitted_s
        self.order = 0
        """Of arrival; given by the scheduler."""

        self.row = -1
        """Of the block tables while it runs, else -1."""
        self.blocks: list[int] = []
        self.chain: list[tuple[int, bytes]] = []
        """(hash, digest) of its whole blocks, as far as they were needed; kept over a preemption."""
        self.committed = 0
        """Leading blocks that prefix caching has taken note of; -1: the rest of its blocks is private."""
        self.computed = 0
        """Tokens whose keys and values lie in its blocks."""

        self.pulled_tokens = 0
        """Prompt tokens that came from another worker, and how long that took."""
        self.pull_s = 0.0
        self.cached_tokens = 0
        """Prompt tokens that were reused when it was first admitted."""
        self.first_step_s: float | None = None
        self.started = False
        """Its first output has been sent."""
        self.prompt_logprobs: list[TokenLogprob | None] | None = None
        self.exports = False
        """It is a prefill: its blocks are for another worker."""
        self.remote: dict[str, Any] | None = None
        """Where its prompt's blocks can be had, until they are asked for."""
        self.pull: Pull | None = None
        """While they are being read."""
        self.seen: object | None = None
        """The sampler's counts of its tokens, where its penalties need them."""

    @property
    def awaits_blocks(self) -> bool:
        """Its blocks are to come from elsewhere: nothing of it is computed until then."""
        return self.remote is not None or self.pull is not None

    @property
    def output_tokens(self) -> int:
        return len(self.tokens) - self.prompt_tokens

    @property
    def wants_prompt_logprobs(self) -> bool:
        """The logits of its whole prompt are needed, so nothing of it may come from the cache."""
        return self.sampling.prompt_logprobs is not None and not self.started
