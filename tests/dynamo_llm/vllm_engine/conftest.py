"""One real vLLM engine for the whole session, and what drives it. `make test-vllm` comes here."""

import queue
from array import array
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from dynamo_llm.engines.base import EngineRequest, StepResult
from kvstore.cards import KvOp
from kvstore.wire import Output, SamplingParams

collect_ignore_glob = [] if find_spec("vllm") else ["test_*.py"]

MODEL = Path(__file__).parents[3] / "model_repository" / "demo" / "1" / "model"
OPTIONS = {"dtype": "float32", "block_size": 32, "num_gpu_blocks_override": 64, "max_model_len": 512}
WAIT_S = 60.0


def pytest_configure(config: pytest.Config) -> None:
    """vLLM's client leaves its ZMQ context open where its engine core was killed."""
    config.addinivalue_line("filterwarnings", "ignore:Unclosed context:ResourceWarning")


class Driver:
    """Runs requests on an engine. Outputs are kept by request, ops in order."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.outputs: dict[int, list[Output]] = {}
        self.ops: list[KvOp] = []
        self.deaths: queue.Queue[str] = queue.Queue()
        self._keys = count(1)
        self._steps: queue.Queue[StepResult] = queue.Queue()
        engine.start(self._steps.put, self.deaths.put)

    def submit(self, tokens: list[int], *, cache_salt: str = "", lora: str = "", **sampling: Any) -> int:
        key = next(self._keys)
        params = SamplingParams(**{"max_tokens": 4, "temperature": 0.0, **sampling})
        prompt = array("I", tokens).tobytes()
        self.engine.submit(EngineRequest(key=key, token_ids=prompt, sampling=params, cache_salt=cache_salt, lora=lora))
        return key

    def step(self) -> None:
        """Take in one step; fails after `WAIT_S` without one."""
        step = self._steps.get(timeout=WAIT_S)
        self.ops += step.ops
        for output in step.outputs:
            self.outputs.setdefault(output.rid, []).append(output)

    def finish(self, key: int) -> list[Output]:
        while not any(output.finish_reason for output in self.outputs.get(key, [])):
            self.step()
        return self.outputs[key]

    def run(self, tokens: list[int], **more: Any) -> list[Output]:
        return self.finish(self.submit(tokens, **more))


def _start() -> Driver:
    from dynamo_llm.engines.vllm_engine.engine import VllmEngine

    return Driver(VllmEngine(MODEL, "demo", dict(OPTIONS)))


@pytest.fixture(scope="session")
def driver() -> Iterator[Driver]:
    driver = _start()
    yield driver
    driver.engine.close()


@pytest.fixture
def make_driver() -> Iterator[Callable[[], Driver]]:
    """Engines for tests that end them."""
    made: list[Driver] = []
    yield lambda: made.append(_start()) or made[-1]  # type: ignore[func-returns-value]
    for driver in made:
        driver.engine.close()
