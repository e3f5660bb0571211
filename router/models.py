"""The models that can be served right now: what the API layers look up by name. `pool.Pool` fills it."""

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from kvstore.cards import InstanceCard
from kvstore.text import Tokenizer
from router.errors import ModelNotFound

if TYPE_CHECKING:
    from router.chat_template import ChatTemplate

LINGER_S = 60.0
"""So long a model without instances is `Unavailable` (its workers may be restarting) before it is not found at all."""


class Model:
    """One model and the instances that serve it. Instances of one model share block size and tokenizer."""

    def __init__(
        self,
        name: str,
        block_size: int,
        tokenizer: Tokenizer,
        chat_template: "ChatTemplate",
        created_s: float,
        model_files: str = "",
    ) -> None:
        self.name = name
        self.block_size = block_size
        """Tokens in a KV block."""
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.created_s = created_s
        """When this router first saw it, seconds since 1970."""
        self.model_files = model_files
        """`InstanceCard.model_files` of what tokenizer and template were made from."""
        self.turn = 0
        """Requests placed so far; round robin goes by it."""
        self.prefill_turn = 0
        """Of those, prompts that were placed on a prefill worker."""
        self.by_instance: dict[str, InstanceCard] = {}
        self.max_context = 0
        """Most tokens, prompt and output together, that every instance takes."""

    def misfit(self, card: InstanceCard) -> str:
        """Why an instance cannot serve this model together with the others; empty if it can."""
        if card.block_size != self.block_size:
            return f"its block size is {card.block_size}, that of the model's other instances {self.block_size}"
        if card.model_files != self.model_files:
            return "its tokenizer or chat template differs from that of the model's other instances"
        return ""

    @property
    def cards(self) -> list[InstanceCard]:
        """The instances that are registered now, connected or not."""
        return list(self.by_instance.values())

    def add(self, card: InstanceCard) -> None:
        """Add or replace an instance."""
        self.by_instance[card.instance] = card
        self._recount()

    def remove(self, instance: str) -> None:
        """Unknown instances are ignored."""
        self.by_instance.pop(instance, None)
        self._recount()

    def _recount(self) -> None:
        if self.by_instance:
            self.max_context = min(card.max_context for card in self.by_instance.values())


class Models:
    """All models by name."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._models: dict[str, Model] = {}
        self._emptied_at: dict[str, float] = {}

    def get(self, name: str) -> Model:
        """Raises `ModelNotFound`. A model whose last instance left a moment ago is still found."""
        model = self._models.get(name)
        if model is None or self._empty_for_s(name) > LINGER_S:
            raise ModelNotFound(f"the model `{name}` does not exist", param="model")
        return model

    def names(self) -> list[str]:
        """Names of the models that have an instance, sorted."""
        return sorted(name for name, model in self._models.items() if model.by_instance)

    def __iter__(self) -> Iterator[Model]:
        return iter(list(self._models.values()))

    def find(self, name: str) -> Model | None:
        """As `get`, without judgement: also a model that has had no instance for long."""
        return self._models.get(name)

    def put(self, model: Model) -> None:
        """Make a model known; one of the same name is replaced."""
        self._models[model.name] = model
        self._emptied_at.pop(model.name, None)

    def add(self, card: InstanceCard) -> None:
        """Add an instance of a known model."""
        self._models[card.model].add(card)
        self._emptied_at.pop(card.model, None)

    def remove(self, model: str, instance: str) -> None:
        """Remove an instance; unknown ones are ignored."""
        known = self._models.get(model)
        if known is not None:
            known.remove(instance)
            if not known.by_instance:
                self._emptied_at.setdefault(model, self._clock())

    def _empty_for_s(self, name: str) -> float:
        emptied_at = self._emptied_at.get(name)
        return 0.0 if emptied_at is None else self._clock() - emptied_at

    def forget(self, name: str) -> None:
        """Drop a model and all that is known of it."""
        self._models.pop(name, None)
        self._emptied_at.pop(name, None)
