"""One request on its way through the mock engine."""

from abc import ABC, abstractmethod


class MockSequence(ABC):
    """What the scheduler needs to know of a request. Plain state, changed by scheduler and block pool only.

    It knows no tokens: blocks go by their hashes and the end by its length, so that a trace without tokens can be
    replayed. A subclass says how blocks are named, and what tokens come out, if any.
    """

    __slots__ = (
        "awaits_blocks",
        "cached_tokens",
        "chain",
        "computed",
        "held",
        "keeps_blocks",
        "key",
        "last_step",
        "length",
        "max_length",
        "named",
        "offset",
        "prompt_tokens",
        "ticket",
        "urgency",
    )

    def __init__(
        self, key: int, length: int, max_length: int, chain: list[int], *, prompt_tokens: int | None = None
    ) -> None:
        """`length` tokens to begin with; it ends with `max_length`, which is more. `chain`: hashes of the whole blocks
        among the first `length` tokens."""
        self.key = key
        self.length = length
        """Prompt and output so far; while it decodes, `MockScheduler.length_of` knows better."""
        self.prompt_tokens = length if prompt_tokens is None else prompt_tokens
        """What follows it is output, of an earlier attempt perhaps."""
        self.max_length = max_length
        self.chain = chain
        self.urgency = (0, 0)
        """Sorts the sequences of a scheduler, the most urgent last."""
        self.cached_tokens = -1
        """Prompt tokens that were reused when it was first admitted; -1 before."""
        self.awaits_blocks = False
        """To be set before it is added: another worker has computed all its tokens but the last one. It enters the
        batch with blocks, and waits there until `MockScheduler.arrived`."""
        self.keeps_blocks = False
        """To be set before it is added: when it ends, its blocks stay for another worker to read, until
        `MockScheduler.release`."""

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

    @abstractmethod
    def name(self, index: int, parent: int | None) -> int:
        """Hash of a whole block that output has filled; `parent` is that of the block before it."""

    def chain_to(self, blocks: int) -> list[int]:
        """Its chain, with at least that many blocks, all of them whole."""
        chain = self.chain
        while len(chain) < blocks:
            chain.append(self.name(len(chain), chain[-1] if chain else None))
        return chain
