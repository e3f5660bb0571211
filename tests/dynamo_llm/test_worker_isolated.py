"""A real worker whose engine lives in a process of its own, and loses it."""

import json
import os
import signal
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from worker_runner import Worker

from kvstore.connect import connect
from kvstore.embedded import EmbeddedRedis
from kvstore.keys import Keys
from kvstore.registry import Registry

PROGRAMS = {"pytriton": "worker_process.py", "triton": "tritonserver_process.py"}
QUESTION = "<|begin|><|user|>What is the capital of France?<|end|><|assistant|>"


@pytest.mark.parametrize("host", PROGRAMS)
async def test_a_killed_engine_is_an_error_and_a_restart(
    redis_server: EmbeddedRedis, tmp_path: Path, eventually: Any, host: str
) -> None:
    """Each request in flight gets one clear error; Triton stays, and the instance answers under a later epoch."""
    options = {"threads": 1, "kv_blocks": 1024}
    worker = Worker(
        tmp_path,
        [PROGRAMS[host]],
        redis_url=redis_server.url,
        engine="torch",
        engine_options=options,
        python=sys.executable,
    )
    try:
        await eventually(lambda: worker.is_ready, 60)
        worker.look()
        before = await epoch(redis_server.url)
        (engine,) = [pid for pid in worker.descendants if b"isolated.child" in command_line(pid)]
        (triton,) = [pid for pid in worker.descendants if command_line(pid).split(b"\0")[0].endswith(b"/tritonserver")]
        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(ask, worker, 1800) for _ in range(4)]
            await eventually(lambda: in_flight(worker) == 4)
            os.kill(engine, signal.SIGKILL)
            answers = [future.result(timeout=20) for future in asked]
        for answer in answers:
            assert answer.removeprefix("ModelError: ").startswith("engine_failure: ")
            assert "was killed by SIGKILL" in answer
        await eventually(lambda: "Paris" in ask(worker, 20), 60)
        assert await epoch(redis_server.url) > before
        assert b"tritonserver" in command_line(triton)
        worker.process.send_signal(signal.SIGTERM)
        assert worker.wait() == 0
    finally:
        worker.clean()


def ask(worker: Worker, max_tokens: int) -> str:
    """The answer, or the error."""
    parameters = {"max_tokens": max_tokens, "temperature": 0, "ignore_eos": max_tokens > 100}
    body = json.dumps({"text_input": QUESTION, "parameters": parameters}).encode()
    url = f"http://{worker.fields['http']}/v2/models/demo/generate"
    try:
        with urllib.request.urlopen(url, body, timeout=30) as response:
            return str(json.load(response)["text_output"])
    except urllib.error.HTTPError as error:
        return str(json.load(error)["error"])


def in_flight(worker: Worker) -> int:
    with urllib.request.urlopen(worker.fields["metrics"], timeout=10) as response:
        lines = response.read().decode().splitlines()
    return int(sum(float(line.split()[-1]) for line in lines if line.partition("{")[0].endswith("requests_running")))


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


async def epoch(redis_url: str) -> int:
    async with connect(redis_url) as redis:
        (card,) = await Registry(redis, Keys()).instances()
        return int(card.epoch)
