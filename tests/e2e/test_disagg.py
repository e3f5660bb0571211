"""Disaggregated clusters answer as aggregated ones do, token by token, in whatever order the requests overlap."""

import asyncio
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
from conversations import answers, conversations, remote_prefills

PROMPTS = 500
ROLES = ("--prefill", "2", "--decode", "2")
ask = partial(answers, tokens=24, at_once=32)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return conversations(PROMPTS, 1900, seed=4)


@pytest.fixture(scope="module")
def expected(start_cluster: Callable[..., Any], prompts: list[list[int]]) -> list[list[int]]:
    """One worker's answers."""
    cluster = start_cluster("--mode", "agg", "--workers", "1")
    got = asyncio.run(ask(cluster.base, prompts))
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
        assert asyncio.run(ask(cluster.base, prompts)) == expected
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
            asked = side.submit(asyncio.run, ask(cluster.base, prompts[:200]))
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
