"""Models from the files that instance cards name: fetched from the registry, loaded once each. Used by `pool.Pool`."""

import asyncio
import time

from kvstore import model_files
from kvstore.cards import InstanceCard
from kvstore.registry import Registry
from kvstore.text import Tokenizer
from router.chat_template import ChatTemplate
from router.models import Model, Models


class ModelLoader:
    """Puts what it loads into `models`."""

    def __init__(self, registry: Registry, models: Models) -> None:
        self._registry = registry
        self._models = models
        self._loaded: dict[str, tuple[Tokenizer, ChatTemplate]] = {}
        self._loading = asyncio.Lock()

    async def model_of(self, card: InstanceCard) -> Model:
        """The card's model, made anew when nobody serves the one that is known and it differs.

        Raises `StoreError`, and `ValueError` for files that are not there or cannot be read.
        """
        async with self._loading:
            known = self._models.find(card.model)
            if known is not None and (known.by_instance or not known.misfit(card)):
                return known
            if card.model_files not in self._loaded:
                blob = await self._registry.get_blob(card.model_files)
                if blob is None:
                    raise ValueError("they are not in Redis")
                self._loaded[card.model_files] = await asyncio.to_thread(_load, blob)
            tokenizer, chat_template = self._loaded[card.model_files]
            model = Model(card.model, card.block_size, tokenizer, chat_template, time.time(), card.model_files)
            self._models.put(model)
            return model

    def forget(self, files: str) -> None:
        """No instance refers to these files any more."""
        self._loaded.pop(files, None)


def _load(blob: bytes) -> tuple[Tokenizer, ChatTemplate]:
    """Runs in a thread: a large vocabulary takes a second. Raises `ValueError`."""
    files = model_files.unpack(blob)
    return Tokenizer.from_files(files), ChatTemplate.from_files(files)
