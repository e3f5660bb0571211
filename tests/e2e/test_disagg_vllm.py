"""vLLM prefills and decodes on different workers, over its own NixlConnector: the answers are those of one worker."""

import asyncio
import json
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pytest
from command import running
from conversations import answers, conversations, remote_prefills
from inbox import Inbox

from kvstore import wire
from kvstore.connect import connect
from kvstore.embedded import EmbeddedRedis
from kvstore.keys import Keys
from kvstore.registry import Registry
from router.worker_client import WorkerConnection, next_rid

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

PYTHON = Path(__file__).parents[2] / ".venv-vllm" / "bin" / "python"
TOKENS = 16
ENGINE = {"dtype": "float32", "max_model_len": 2048, "num_gpu_blocks_override": 200, "block_size": 32}
ask = partial(answers, tokens=TOKENS, at_once=8)


class Clusters(NamedTuple):
    """Two namespaces of one Redis: an aggregated worker, and a prefill and a decode worker."""

    redis_url: str
    agg: Any
    disagg: Any


@pytest.fixture(scope="module")
def clusters(start_cluster: Callable[..., Any]) -> Iterator[Clusters]:
    """Started side by side. Every prompt of a block or more goes to the prefill worker."""
    engine = ("--engine", "vllm", "--python", str(PYTHON), "--engine-option", "enforce_eager=true")
    options = [f"--engine-option={name}={json.dumps(value)}" for name, value in ENGINE.items()]
    with EmbeddedRedis(port=0) as redis, ThreadPoolExecutor() as pool:

        def start(mode: str) -> Any:
            return start_cluster("--mode", mode, *engine, *options, "--redis", redis.url, "--namespace", mode)

        agg, disagg = pool.map(start, ("agg", "disagg"))
        asyncio.run(prefill_remotely(redis.url))
        yield Clusters(redis.url, agg, disagg)
        for cluster in (agg, disagg):
            cluster.stop()  # while there is a Redis


async def prefill_remotely(redis_url: str) -> None:
    async with connect(redis_url) as client:
        registry = Registry(client, Keys(namespace="disagg"))
        await registry.set_setting("remote_prefill", "always")
        await registry.set_setting("max_local_prefill_tokens", ENGINE["block_size"])


def test_the_same_tokens(clusters: Clusters) -> None:
    """Whatever the policy, through routers that ask at the same time, and with prompts that begin alike."""
    prompts = conversations(50, 1900, seed=7)
    expected = asyncio.run(ask(clusters.agg.base, prompts))
    assert asyncio.run(ask(clusters.disagg.base, prompts)) == expected
    assert remote_prefills(clusters.disagg.base) > 40
    arguments = ("--redis", clusters.redis_url, "--namespace", "disagg", "--http-port", "0", "--grpc-port", "0")
    with running("router", "--policy", "kv", *arguments) as router:
        base = router["first"]
        clusters.disagg.wait(lambda status: all(instance["ready"] for instance in status["instances"]))

        async def both() -> list[list[list[int]]]:
            more = conversations(50, 1900, seed=8)
            return await asyncio.gather(ask(base, more[:25]), ask(clusters.disagg.base, more[25:]), ask(base, prompts))

        first, second, again = asyncio.run(both())
        assert again == expected
        assert first + second == asyncio.run(ask(clusters.agg.base, conversations(50, 1900, seed=8)))


def test_the_prefill_worker_is_killed_before_its_blocks_are_fetched(clusters: Clusters) -> None:
    """The decode worker computes the prompt again; so it does for a router when there is no prefill worker any more."""
    prompt, *others = conversations(12, 1500, seed=9)[1:]
    expected = asyncio.run(ask(clusters.agg.base, [prompt, *others]))
    assert asyncio.run(prefill_kill_decode(clusters, prompt)) == expected[0]
    assert asyncio.run(ask(clusters.disagg.base, others)) == expected[1:]


async def prefill_kill_decode(clusters: Clusters, prompt: list[int]) -> list[int]:
    """The answer, asked for as a router does it, but slowly enough for a worker to die in between."""
    async with connect(clusters.redis_url) as client:
        cards = {card.role: card for card in await Registry(client, Keys(namespace="disagg")).instances()}
    tokens = np.array(prompt, "<u4").tobytes()
    async with WorkerConnection(cards["decode"], "test", 20.0, 20.0) as decode:
        async with WorkerConnection(cards["prefill"], "test", 20.0, 20.0) as prefill:
            sampling = wire.SamplingParams(max_tokens=1, temperature=0.0)
            asked = {"do_remote_decode": True, "do_remote_prefill": False}
            handed = await result(
                prefill, wire.Submit(rid=next_rid(), token_ids=tokens, sampling=sampling, kv_transfer_params=asked)
            )
        params = handed.outputs[-1].kv_transfer_params
        assert params is not None
        assert params["do_remote_prefill"]
        kill(clusters.disagg.pid_of("prefill-1"))
        sampling = wire.SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
        done = await result(
            decode, wire.Submit(rid=next_rid(), token_ids=tokens, sampling=sampling, kv_transfer_params=params)
        )
    assert done.endings == ["length"]
    return done.token_ids


async def result(connection: WorkerConnection, submit: wire.Submit) -> Inbox:
    inbox = Inbox()
    while not connection.ready:  # noqa: ASYNC110 - it has no event
        await asyncio.sleep(0.01)
    connection.submit(submit, inbox)
    while not inbox.endings:  # noqa: ASYNC110 - as above
        await asyncio.sleep(0.01)
    return inbox


def kill(pid: int) -> None:
    """A process with all that it has started, as when a machine is gone."""
    process = psutil.Process(pid)
    family = [process, *process.children(recursive=True)]
    for member in family:
        os.kill(member.pid, signal.SIGSTOP)  # none is to clean up after another one
    for member in family:
        os.kill(member.pid, signal.SIGKILL)
    psutil.wait_procs(family[1:], timeout=10)
