"""The demo model under the engine and under transformers, and a driver that steps the engine by hand.

Steps are called from the test's thread, so a test decides exactly what joins and leaves the batch when; the thread, and
what happens across it, is in `test_torch_engine.py`.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dynamo_llm.engines import create_engine
from dynamo_llm.engines.base import EngineRequest, StepResult
from dynamo_llm.engines.torch_engine.engine import TorchEngine
from kvstore.cards import Cleared, KvOp, Removed
from kvstore.wire import Output, SamplingParams

DEMO = Path(__file__).parents[3] / "model_repository" / "demo" / "1" / "model"


class Reference:
    """transformers' answers, each computed once."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.model.generation_config.eos_token_id = None
        self._greedy: dict[tuple[tuple[int, ...], int], list[int]] = {}

    def greedy(self, prompt: list[int], tokens: int) -> list[int]:
        """Greedy continuation, end-of-sequence ignored."""
        key = (tuple(prompt), tokens)
        if key not in self._greedy:
            self._greedy[key] = self._generate(prompt, tokens)
        return self._greedy[key]

    def _generate(self, prompt: list[int], tokens: int) -> list[int]:
        with torch.inference_mode():
            ids = torch.tensor([prompt])
            mask = torch.ones_like(ids)
            out = self.model.generate(ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False)
        return out[0, len(prompt) :].tolist()

    def logprobs(self, tokens: list[int]) -> torch.Tensor:
        """Log-probabilities of the token after each position: [tokens, vocab]."""
        with torch.inference_mode():
            return self.model(torch.tensor([tokens])).logits[0].log_softmax(dim=-1)


class Driver:
    """An engine without its thread: submit, step, and read what each request has got."""

    def __init__(self, engine: TorchEngine) -> None:
        self.engine = engine
        self.outputs: dict[int, list[Output]] = {}
        self.ops: list[KvOp] = []
        self.resident: set[int] = set()

    def submit(self, prompt: list[int], **sampling: Any) -> int:
        key = len(self.outputs) + 1
        request = {k: sampling.pop(k) for k in ("priority", "cache_salt", "generated") if k in sampling}
        params = SamplingParams(**{"temperature": 0.0, "ignore_eos": True, "max_tokens": 8} | sampling)
        token_ids = np.array(prompt, dtype="<u4").tobytes()
        self.engine.submit(EngineRequest(key=key, token_ids=token_ids, sampling=params, **request))
        self.outputs[key] = []
        return key

    def step(self) -> StepResult:
        result = self.engine.step()
        for output in result.outputs:
            assert self.finish(output.rid) is None, "an output after the last one"
            self.outputs[output.rid].append(output)
        for op in result.ops:
            self._apply(op)
        return result

    def _apply(self, op: KvOp) -> None:
        self.ops.append(op)
        assert not isinstance(op, Cleared)
        hashes = set(op.hashes)
        assert len(hashes) == len(op.hashes)
        if isinstance(op, Removed):
            assert hashes <= self.resident, "removed what was not announced"
            self.resident -= hashes
        else:
            assert not hashes & self.resident, "announced twice"
            assert op.parent is None or op.parent in self.resident, "stored behind a block that is not there"
            self.resident |= hashes

    def run(self, steps: int = 10_000) -> "Driver":
        """Step until everything has finished."""
        for _ in range(steps):
            if all(self.finish(key) for key in self.outputs):
                return self
            self.step()
        raise AssertionError("the engine does not come to an end")

    def generate(self, prompt: list[int], **sampling: Any) -> list[int]:
        key = self.submit(prompt, **sampling)
        self.run()
        return self.tokens(key)

    def tokens(self, key: int) -> list[int]:
        return [token for output in self.outputs[key] for token in output.token_ids]

    def logprobs(self, key: int) -> list[Any]:
        return [entry for output in self.outputs[key] for entry in output.logprobs or []]

    def started(self, key: int) -> Any:
        return self.outputs[key][0].started

    def finish(self, key: int) -> str | None:
        return self.outputs[key][-1].finish_reason if self.outputs[key] else None


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Steps run on the test's own thread, and small products on a busy machine are fastest alone."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def demo() -> Path:
    """Folder of the demo model."""
    return DEMO


@pytest.fixture(scope="session")
def reference() -> Reference:
    """The demo model under transformers, float32."""
    return Reference(DEMO)


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Token ids of different lengths, none a beginning of another."""
    random = np.random.default_rng(7)
    return [random.integers(10, 2000, size=length).tolist() for length in (5, 16, 33, 48, 70, 128, 1, 17)]


@pytest.fixture
def make() -> Iterator[Callable[..., Driver]]:
    """Engines on the demo model (or another folder), closed at the end of the test."""
    engines: list[TorchEngine] = []

    def make_driver(folder: Path = DEMO, **options: Any) -> Driver:
        defaults = {"device": "cpu", "kv_blocks": 256, "max_seqs": 16, "threads": 1}
        engine = create_engine("torch", folder, "demo", defaults | options)
        assert isinstance(engine, TorchEngine)
        engines.append(engine)
        return Driver(engine)

    yield make_driver
    for engine in engines:
        engine.close()
