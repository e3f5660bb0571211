"""The same prompts through each engine on each host, as a router asks them: the answers are the same tokens."""

import asyncio
import json
import random
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from command import running
from inbox import Inbox

from kvstore import wire
from kvstore.connect import connect
from kvstore.embedded import EmbeddedRedis
from kvstore.keys import Keys
from kvstore.registry import Registry
from kvstore.text import Tokenizer
from router.worker_client import WorkerConnection, next_rid

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "model_repository" / "demo"
PROMPTS = 100
TOKENS = 48

ENGINES: dict[str, dict[str, Any]] = {
    "torch": {"engine": "torch", "engine_options": {"dtype": "float32"}},
    "vllm": {
        "engine": "vllm",
        "engine_options": {"dtype": "float32", "max_model_len": 2048, "num_gpu_blocks_override": 400},
        "python": str(ROOT / ".venv-vllm" / "bin" / "python"),
    },
}
PORTS = ("--http-port", "0", "--grpc-port", "0", "--metrics-port", "0")


def pytriton(redis_url: str, settings: dict[str, Any], folder: Path) -> AbstractContextManager[dict[str, str]]:
    """`dynamo-llm worker`, its engine given by flags."""
    options = [f"--engine-option={name}={json.dumps(value)}" for name, value in settings["engine_options"].items()]
    python = ("--python", settings["python"]) if "python" in settings else ()
    engine = ("--engine", settings["engine"], *options, *python)
    return running("worker", "--model", str(MODEL), *engine, "--redis", redis_url, *PORTS)


def tritonserver(redis_url: str, settings: dict[str, Any], folder: Path) -> AbstractContextManager[dict[str, str]]:
    """A model repository whose one entry names the engine."""
    version = folder / "demo" / "1"
    version.mkdir(parents=True)
    (version.parent / "config.pbtxt").write_text('backend: "dynamo_llm"\n')
    (version / "model.json").write_text(json.dumps({"model": str(MODEL / "1" / "model"), **settings}))
    return running("tritonserver", "--model-repository", str(folder), "--redis", redis_url, *PORTS)


HOSTS: dict[str, Callable[..., AbstractContextManager[dict[str, str]]]] = {
    "pytriton": pytriton,
    "tritonserver": tritonserver,
}


@cache
def prompts() -> list[bytes]:
    """Beginnings of conversations from the demo model's corpus, cut anywhere: little-endian uint32, shape [tokens]."""
    sys.path.insert(0, str(MODEL / "train"))
    from corpus import render, sample

    tokenizer = Tokenizer.from_files({"tokenizer.json": (MODEL / "1" / "model" / "tokenizer.json").read_bytes()})
    rng, made = random.Random(11), []
    while len(made) < PROMPTS:
        tokens = tokenizer.encode("".join(render(sample(rng)) for _ in range(rng.choice((1, 1, 2, 6)))))
        made.append(tokens[: 4 * rng.randint(4, len(tokens) // 4)])
    return made


async def answers(redis_url: str, eventually: Any) -> list[list[int]]:
    """All prompts at once, greedily, over the one worker's session."""
    async with connect(redis_url) as client:
        (card,) = await Registry(client, Keys()).instances()
    async with WorkerConnection(card, "test", 20.0, 20.0) as connection:
        await eventually(lambda: connection.ready, 20.0)
        inboxes = [Inbox() for _ in prompts()]
        for prompt, inbox in zip(prompts(), inboxes, strict=True):
            sampling = wire.SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
            connection.submit(wire.Submit(rid=next_rid(), token_ids=prompt, sampling=sampling), inbox)
        await eventually(lambda: all(inbox.endings for inbox in inboxes), 120.0)
    assert {ending for inbox in inboxes for ending in inbox.endings} == {"length"}
    return [inbox.token_ids for inbox in inboxes]


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory, eventually: Any) -> Callable[[str, str], list[list[int]]]:
    """The answers of an engine on a host; each pair is started once."""

    @cache
    def ask(host: str, engine: str) -> list[list[int]]:
        folder = tmp_path_factory.mktemp(f"{host}-{engine}")
        with EmbeddedRedis(port=0) as redis, HOSTS[host](redis.url, ENGINES[engine], folder):
            return asyncio.run(answers(redis.url, eventually))

    return ask


@pytest.mark.parametrize(
    ("host", "engine"),
    [
        ("tritonserver", "torch"),
        pytest.param("pytriton", "vllm", marks=pytest.mark.vllm),
        pytest.param("tritonserver", "vllm", marks=pytest.mark.vllm),
    ],
)
@pytest.mark.timeout(400)
def test_greedy_tokens(ask: Callable[[str, str], list[list[int]]], host: str, engine: str) -> None:
    """Those of the torch engine on PyTriton, which the engine's own tests hold to transformers'."""
    assert ask(host, engine) == ask("pytriton", "torch")
