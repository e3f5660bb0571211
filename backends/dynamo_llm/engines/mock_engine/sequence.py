"""One request on its way through the mock engine."""

from collections.abc import Callable

Name = Callable[[int, int | None], int]
"""(index of a whole block, hash of the block before it) -> hash of the block."""


class MockSequence:
    """What the scheduler needs to know of a request. Plain state, changed by scheduler and block pool only.

    It knows no tokens: blocks go by their hashes and the end by its length, so that a trace without tokens can be
    replayed. What tokens come out is up to a subclass.
    """

    __slots__ = (
        "cached_tokens",
        "chain",
        "computed",
        "held",
        "key",
        "last_step",
        "length",
        "max_length",
        "name",
        "named",
        "offset",
        "prompt_tokens",
        "ticket",
        "urgency",
    )

    def __init__(
        self, key: int, length: int, max_length: int, chain: list[int], name: Name, *, prompt_tokens: int | None = None
    ) -> None:
        """`length` tokens to begin with; it ends with `max_length`, which is more. `chain`: hashes of the whole blocks
        among the first `length` tokens. `name` gives those of the blocks that follow."""
        self.key = key
        self.length = length
        """Prompt and output so far; while it decodes, `MockScheduler.length_of` knows better."""
        self.prompt_tokens = length if prompt_tokens is None else prompt_tokens
        """What follows it is output, of an earlier attempt perhaps."""
        self.max_length = max_length
        self.chain = chain
        self.name = name
        self.urgency = (0, 0)
        """Sorts the sequences of a scheduler, the most urgent last."""
        self.cached_tokens = -1
        """Prompt tokens that were reused when it was first admitted; -1 before."""

        self.held = 0
        self.named = 0
        """Of the held blocks, the leading ones that are registered."""
        self.computed = 0
        """Tokens whose blocks are filled, while it prefills."""

        self.offset = 0
        """While it decodes: `length` less the scheduler's count of steps."""
        self.last_step = 0
        """While it decodes: count of steps at which it will have ended."""
        self.ticket = -1
        """Of its entry in the scheduler's agenda; -1 while it does not decode."""

    def chain_to(self, blocks: int) -> list[int]:
        """Its chain, with at least that many blocks, all of them whole."""
        chain = self.chain
        while len(chain) < blocks:
            chain.append(self.name(len(chain), chain[-1] if chain else None))
        return chain
