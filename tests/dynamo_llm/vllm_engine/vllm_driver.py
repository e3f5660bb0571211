"""Drives a real vLLM engine from a test's own thread."""

import queue
from array import array
from collections.abc import Iterable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from dynamo_llm.engines.base import EngineRequest, StepResult
from kvstore.cards import Cleared, KvOp, Removed, Stored
from kvstore.hashing import block_hashes, root_seed
from kvstore.wire import Load, Output, SamplingParams

MODEL = Path(__file__).parents[3] / "model_repository" / "demo" / "1" / "model"
OPTIONS = {"dtype": "float32", "block_size": 32, "num_gpu_blocks_override": 64, "max_model_len": 512}
WAIT_S = 60.0


class Driver:
    """Runs requests on an engine. Outputs are kept by request, ops and loads in order."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.outputs: dict[int, list[Output]] = {}
        self.ops: list[KvOp] = []
        self.loads: list[Load] = []
        self.deaths: queue.Queue[str] = queue.Queue()
        self._keys = count(1)
        self._steps: queue.Queue[StepResult] = queue.Queue()
        engine.start(self._steps.put, self.deaths.put)

    def submit(
        self, tokens: list[int], *, cache_salt: str = "", lora: str = "", generated: int = 0, **sampling: Any
    ) -> int:
        """Greedy, and four tokens, unless `sampling` says otherwise."""
        key = next(self._keys)
        params = SamplingParams(**{"max_tokens": 4, "temperature": 0.0, **sampling})
        self.engine.submit(
            EngineRequest(
                key=key,
                token_ids=array("I", tokens).tobytes(),
                sampling=params,
                generated=generated,
                cache_salt=cache_salt,
                lora=lora,
            )
        )
        return key

    def step(self) -> None:
        """Take in one step; fails after `WAIT_S` without one."""
        step = self._steps.get(timeout=WAIT_S)
        self.ops += step.ops
        self.loads.append(step.load)
        for output in step.outputs:
            self.outputs.setdefault(output.rid, []).append(output)

    def finish(self, key: int) -> list[Output]:
        while not any(output.finish_reason for output in self.outputs.get(key, [])):
            self.step()
        return self.outputs[key]

    def run(self, tokens: list[int], **more: Any) -> list[Output]:
        return self.finish(self.submit(tokens, **more))

    def tokens(self, tokens: list[int], **more: Any) -> list[int]:
        """The answer to a prompt."""
        return answer(self.run(tokens, **more))

    def settle(self, prompt: list[int]) -> None:
        """Everything that vLLM has done to its cache is known: its events are in order, and those of this prompt, which
        must be new, are the last."""
        self.run(prompt, max_tokens=1)
        while hashes(prompt)[-1] not in resident(self.ops):
            self.step()


def start(**options: Any) -> Driver:
    from dynamo_llm.engines.vllm_engine.engine import VllmEngine

    return Driver(VllmEngine(MODEL, "demo", {**OPTIONS, **options}))


def answer(outputs: list[Output]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def hashes(prompt: list[int], *, lora: str = "", salt: str = "") -> list[int]:
    """Of the whole blocks of a prompt, as routers compute them."""
    seed = root_seed("demo", lora, salt)
    values: list[int] = block_hashes(np.array(prompt, np.uint32), 32, seed=seed).tolist()
    return values


def resident(ops: Iterable[KvOp]) -> set[int]:
    """What is in the cache after these."""
    blocks: set[int] = set()
    for op in ops:
        if isinstance(op, Stored):
            blocks.update(op.hashes)
        elif isinstance(op, Removed):
            blocks.difference_update(op.hashes)
        elif isinstance(op, Cleared):
            blocks.clear()
    return blocks
