"""Disaggregated clusters answer as aggregated ones do, token by token, in whatever order the requests overlap."""

import asyncio
import random
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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
PATIENCE_S = 240.0
"""For one answer, behind all others on a machine that is busy with something else."""
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
    address = base.removeprefix("http://")
    async with triton.InferenceServerClient(address, conn_limit=AT_ONCE, conn_timeout=PATIENCE_S) as client:

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


def change_role(cluster: Any, instance: str, role: str) -> None:
    """As an operator does."""
    (redis,) = (line.split()[-1] for line in cluster.log if ", with Redis at " in line)
    command = [sys.executable, "-m", "dynamo_llm", "role", instance[:12], role, "--redis", redis]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout == f"{instance} of demo has the role {role}\n", done.stderr


@pytest.mark.timeout(400)
def test_roles_change_while_requests_flow(
    start_cluster: Callable[..., Any], prompts: list[list[int]], expected: list[list[int]]
) -> None:
    """Each worker has each role in turn, one of them came as an aggregated one; there is always one that generates."""
    cluster = start_cluster("--mode", "agg-router", "--workers", "3")
    try:
        instances = [instance["instance"] for instance in cluster.instances()]
        with ThreadPoolExecutor(1) as side:
            asked = side.submit(asyncio.run, answers(cluster.base, prompts[:200]))
            turns = 0
            while not asked.done() or turns < 3:
                roles = ("prefill", "decode", "agg")
                for number, instance in enumerate(instances):
                    change_role(cluster, instance, roles[(turns + number) % 3])
                turns += 1
            assert asked.result() == expected[:200]
        assert remote_prefills(cluster.base) > 10
        cluster.wait(lambda status: not any(instance["kv_blocks_used"] for instance in status["instances"]), 60.0)
        cluster.wait(lambda status: {i["role"] for i in status["instances"]} == {"prefill", "decode", "agg"})
    finally:
        cluster.stop()
