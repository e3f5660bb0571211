"""Disaggregated clusters answer as aggregated ones do, token by token, in whatever order the requests overlap."""

import asyncio
from collections.abc import Callable
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
