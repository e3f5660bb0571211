"""The registry of models."""

import pytest
from scripted_worker import TOKENIZER, ScriptedWorker

from router.chat_template import ChatTemplate
from router.errors import ModelNotFound
from router.models import LINGER_S, Model, Models


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_a_model_outlives_its_last_instance_for_a_while() -> None:
    """A model whose workers restart stays known, is not listed, and is forgotten in the end."""
    clock = Clock()
    models = Models(clock)
    card = ScriptedWorker("1" * 16).card()
    models.put(Model("demo", 16, TOKENIZER, ChatTemplate(None, {}), 0.0))
    models.add(card)
    assert (models.names(), models.get("demo").cards) == (["demo"], [card])
    models.remove("demo", card.instance)
    clock.now_s = LINGER_S
    assert (models.names(), models.get("demo").cards) == ([], [])
    clock.now_s = LINGER_S + 1
    with pytest.raises(ModelNotFound):
        models.get("demo")


def test_an_instance_that_comes_back_in_time() -> None:
    """A new instance ends the wait."""
    clock = Clock()
    models = Models(clock)
    models.put(Model("demo", 16, TOKENIZER, ChatTemplate(None, {}), 0.0))
    models.add(ScriptedWorker("1" * 16).card())
    models.remove("demo", "1" * 16)
    models.add(ScriptedWorker("2" * 16).card())
    clock.now_s = 10 * LINGER_S
    assert models.names() == ["demo"]
    assert models.get("demo").max_context == 2048
