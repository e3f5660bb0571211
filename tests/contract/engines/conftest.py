"""Every engine that runs on this machine, each started once for the suite. `vllm` runs by `make test-vllm`."""

import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from engine_driver import Driver

from dynamo_llm.engines import create_engine
from dynamo_llm.engines.base import Engine

ROOT = Path(__file__).parents[3]
MODEL = ROOT / "model_repository" / "demo" / "1" / "model"
VLLM_PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
MAX_CONTEXT = 512


class Kind(NamedTuple):
    """How an engine of the suite is made."""

    engine: str
    options: dict[str, Any]
    python: str = ""
    real: bool = True
    """It computes the demo model, so its greedy answers are the model's."""

    def create(self) -> Engine:
        return create_engine(self.engine, MODEL, "demo", self.options, self.python)


_TORCH = {"block_size": 32, "kv_blocks": 64, "max_context": MAX_CONTEXT}
_VLLM = {"dtype": "float32", "block_size": 32, "num_gpu_blocks_override": 65, "max_model_len": MAX_CONTEXT}
KINDS = {
    "torch": Kind("torch", _TORCH),
    "torch-isolated": Kind("torch", _TORCH, python=sys.executable),
    "mock": Kind("mock", {**_TORCH, "max_batch_tokens": 512, "speed_up": 10}, real=False),
    "vllm-isolated": Kind("vllm", _VLLM, python=str(VLLM_PYTHON)),
}


def _param(name: str) -> Any:
    return pytest.param(name, marks=[pytest.mark.vllm, pytest.mark.timeout(400)] if "vllm" in name else [])


@pytest.fixture(scope="session", params=[_param(name) for name in KINDS])
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


@pytest.fixture(scope="session")
def _driver(kind: Kind) -> Iterator[Driver]:
    driver = Driver(kind.create())
    yield driver
    driver.engine.close()


@pytest.fixture
def driver(_driver: Driver) -> Iterator[Driver]:
    """The suite's engine, which each test leaves without a request."""
    yield _driver
    assert _driver.deaths.empty()
    assert _driver.engine.load().running == _driver.engine.load().waiting == 0


@pytest.fixture(scope="session")
def _keys() -> Iterator[int]:
    return count(1)


@pytest.fixture
def new_key(_keys: Iterator[int]) -> Any:
    """A key that no request had before."""
    return lambda: next(_keys)


@pytest.fixture(scope="session")
def greedy() -> Iterator[Any]:
    """The torch engine's own greedy answers, which its tests hold to transformers'."""
    driver, keys = Driver(KINDS["torch"].create()), count(1)

    def answer(prompt: list[int], tokens: int) -> list[int]:
        key = next(keys)
        driver.submit(key, prompt, greedily(tokens))
        driver.finish(key)
        return driver.tokens(key)

    yield answer
    driver.engine.close()


def greedily(tokens: int) -> Any:
    from kvstore.wire import SamplingParams

    return SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
