"""One real vLLM engine for the whole session, and what drives it. `make test-vllm` comes here."""

import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from vllm_driver import MODEL, Driver, start

collect_ignore_glob = [] if find_spec("vllm") else ["test_*.py"]


@pytest.fixture(scope="session")
def driver() -> Iterator[Driver]:
    """An engine with 63 blocks of 32 tokens, for tests that need nothing particular."""
    driver = start()
    yield driver
    driver.engine.close()


@pytest.fixture
def make_driver() -> Iterator[Callable[[], Driver]]:
    """Engines for tests that end them."""
    made: list[Driver] = []
    yield lambda: made.append(start()) or made[-1]  # type: ignore[func-returns-value]
    for driver in made:
        driver.engine.close()


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(f"{MODEL}/tokenizer.json")


@pytest.fixture(scope="session")
def question(tokenizer: Any) -> list[int]:
    """A prompt that the demo model has an answer to."""
    tokens: list[int] = tokenizer.encode("The capital of France is").ids
    return tokens
