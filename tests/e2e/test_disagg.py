"""Disaggregated clusters answer as aggregated ones do, token by token, in whatever order the requests overlap."""

import asyncio
import random
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http.aio as triton

from kvstore.text import Tokenizer

MODEL = Path(__file__).parents[2] / "model_repository" / "demo"
PROMPTS = 500
LONGEST = 1900
TOKENS = 24
AT_ONCE = 32
ROLES = ("--prefill", "2", "--decode", "2")


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Conversations of the demo model's corpus: 1 to 1,900 tokens, half of them behind one of five beginnings."""
    sys.path.insert(0, str(MODEL / "train"))
    from corpus import render, sample

    tokenizer = Tokenizer.from_files({"tokenizer.json": (MODEL / "1" / "model" / "tokenizer.json").read_bytes()})
    rng = random.Random(4)

    def tokens(count: int) -> list[int]:
        made: list[int] = []
        while len(made) < count:
            made += np.frombuffer(tokenizer.encode(render(sample(rng))), "<u4").tolist()
        return made[:count]

    beginnings = [tokens(rng.randint(100, 1200)) for _ in range(5)]
    made = [tokens(1), tokens(LONGEST)]
    while len(made) < PROMPTS:
        shared = rng.choice(beginnings) if rng.random() < 0.5 else []
        made.append(shared + tokens(rng.randint(1, LONGEST - len(shared))))
    return made


async def answers(base: str, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy ones, so many requests at once."""
    turn = asyncio.Semaphore(AT_ONCE)
    async with triton.InferenceServerClient(base.removeprefix("http://"), conn_limit=AT_ONCE) as client:

        async def ask(prompt: list[int]) -> list[int]:
            ids = triton.InferInput("input_ids", [len(prompt)], "INT32")
            ids.set_data_from_numpy(np.array(prompt, np.int32))
            options = {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True}
            async with turn:
                got = await client.infer("demo", [ids], parameters=options)
            return got.as_numpy("output_ids").reshape(-1).tolist()

        return await asyncio.gather(*map(ask, prompts))


def remote_prefills(base: str) -> float:
    with urllib.request.urlopen(f"{base}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if "_prefills_total{" in line and 'where="remote"' in line)


@pytest.fixture(scope="module")
def expected(start_cluster: Callable[..., Any], prompts: list[list[int]]) -> list[list[int]]:
    """One worker's answers."""
    cluster = start_cluster("--mode", "agg", "--workers", "1")
    got = asyncio.run(answers(cluster.base, prompts))
    cluster.stop()
    return got


@pytest.mark.timeout(400)
@pytest.mark.parametrize("mode", ["disagg", "disagg-router"])
def test_the_same_tokens(
    start_cluster: Callable[..., Any], prompts: list[list[int]], expected: list[list[int]], mode: str
) -> None:
    """Many of the prompts are computed by one worker and continued by another, and no answer shows it."""
    cluster = start_cluster("--mode", mode, *ROLES)
    try:
        assert asyncio.run(answers(cluster.base, prompts)) == expected
        assert remote_prefills(cluster.base) > PROMPTS / 5
        cluster.wait(lambda status: not any(instance["kv_blocks_used"] for instance in status["instances"]), 60.0)
    finally:
        cluster.stop()
