"""Real processes are killed, clients vanish, Redis goes away: nothing hangs, leaks or is lost."""

import asyncio
import contextlib
import json
import os
import signal
import urllib.request
from collections.abc import Callable
from pathlib import Path

import openai
import pytest

SYSTEM = "You are a helpful assistant. Answer clearly and briefly. " * 30
LONG = {"model": "demo", "messages": [{"role": "user", "content": "Tell me a story about a fox."}]}


@pytest.fixture(scope="module")
def cluster(start_cluster: Callable):
    """A cluster of its own: its parts are killed."""
    return start_cluster("--mode", "agg-router", "--workers", "2")


def all_ready(status: dict) -> bool:
    return status["ready"] and sum(i["ready"] for i in status["instances"]) == 2


def idle(status: dict) -> bool:
    """Nothing is in flight anywhere, and no running sequence holds a block."""
    return all_ready(status) and all(
        i["inflight"] == 0 and i["load"] and i["load"]["running"] == i["load"]["waiting"] == i["kv_blocks_used"] == 0
        for i in status["instances"]
    )


async def open_stream(base: str) -> asyncio.StreamWriter:
    """A client that streams an endless answer and has read a little of it."""
    host, port = base.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    body = json.dumps({**LONG, "stream": True, "ignore_eos": True, "max_tokens": 1900}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    seen = b""
    while seen.count(b"data:") < 3:
        piece = await reader.read(4096)
        assert piece, seen
        seen += piece
    return writer


async def vanish(base: str, clients: int) -> None:
    """So many clients close their connections together, in the middle of their answers."""
    for writer in await asyncio.gather(*(open_stream(base) for _ in range(clients))):
        writer.transport.abort()


def usage_of(pid: int) -> dict[str, float]:
    """Open files, threads and resident memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return {
        "files": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": len(os.listdir(f"/proc/{pid}/task")),
        "rss_mb": pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
    }


async def test_two_hundred_clients_that_vanish(cluster) -> None:
    """200 streaming clients vanish mid-answer: all KV blocks come free again, and no process holds more than before.

    How soon is measured by benchmarks/vanish.py.
    """
    await vanish(cluster.base, 200)  # what is opened once is open now
    status = await asyncio.to_thread(cluster.wait, idle)
    pids = [status["pid"], *(i["pid"] for i in status["instances"])]
    before = [usage_of(pid) for pid in pids]
    for _ in range(2):
        await vanish(cluster.base, 200)
        status = await asyncio.to_thread(cluster.wait, idle)
    assert status["inflight"] == 0
    for was, now in zip(before, [usage_of(pid) for pid in pids], strict=True):
        assert now["files"] <= was["files"] + 2
        assert now["threads"] <= was["threads"] + 1
        assert now["rss_mb"] <= was["rss_mb"] * 1.1 + 10


STORIES = [f"Tell me a story about a {animal}." for animal in ("fox", "owl", "bear", "rabbit", "turtle", "crow")]


async def tell(client: openai.AsyncOpenAI, question: str, on_text: Callable[[str], None] | None = None) -> str:
    """One streamed story; `on_text` is called with the instance at each piece of it."""
    messages = [{"role": "user", "content": question}]
    raw = await client.chat.completions.with_raw_response.create(
        model="demo", messages=messages, temperature=0, stream=True
    )
    text = ""
    async for chunk in raw.parse():
        text += chunk.choices[0].delta.content or ""
        if text and on_text is not None:
            on_text(raw.headers["x-dynamo-instance"])
    return text


async def test_a_worker_dies_mid_stream(cluster) -> None:
    """Streams of a killed worker go on elsewhere without their clients noticing, and the worker comes back."""
    before = await asyncio.to_thread(cluster.wait, all_ready)
    pids = {i["instance"]: i["pid"] for i in before["instances"]}
    victims: list[str] = []

    def kill_first(instance: str) -> None:
        if not victims:
            victims.append(instance)
            os.kill(pids[instance], signal.SIGKILL)

    async with openai.AsyncOpenAI(base_url=f"{cluster.base}/v1", api_key="none", max_retries=0) as client:
        expected = [await tell(client, question) for question in STORIES]
        told = await asyncio.gather(*(tell(client, question, kill_first) for question in STORIES))
    assert told == expected
    assert migrations(cluster) >= 1
    await asyncio.to_thread(cluster.wait, lambda s: all_ready(s) and victims[0] not in instances_of(s), 60)
    assert any("worker-" in line and "SIGKILL" in line for line in cluster.log)


def instances_of(status: dict) -> set[str]:
    return {i["instance"] for i in status["instances"]}


def migrations(cluster) -> float:
    """Requests that were moved to another worker, as the router's metrics count them."""
    with urllib.request.urlopen(f"{cluster.base}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    return sum(
        float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("dynamo_llm_router_migrations_total{")
    )


def index_of(status: dict) -> dict:
    """What the router's index holds of each instance."""
    return {i["instance"]: (i["epoch"], i["index"]) for i in status["instances"]}


def test_a_router_that_restarts_has_the_same_index(cluster) -> None:
    """A killed router is started again and has the same index as before: digests equal, cached prompts are found."""
    cluster.wait(all_ready)
    with openai.OpenAI(base_url=f"{cluster.base}/v1", api_key="none", max_retries=5) as client:
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "What is 12 + 30?"}]
        raw = client.chat.completions.with_raw_response.create(model="demo", messages=messages, temperature=0)
        holder = raw.headers["x-dynamo-instance"]
        before = index_of(cluster.wait(lambda s: idle(s) and index_of(s)[holder][1]["blocks"] > 20))
        os.kill(cluster.pid_of("router"), signal.SIGKILL)
        after = cluster.wait(lambda s: all_ready(s) and index_of(s) == before)
        assert index_of(after) == before
        messages[1]["content"] = "Spell the word lantern."
        raw = client.chat.completions.with_raw_response.create(model="demo", messages=messages, temperature=0)
        assert raw.headers["x-dynamo-instance"] == holder
        assert raw.parse().usage.prompt_tokens_details.cached_tokens > 300


def test_redis_dies_and_comes_back(cluster) -> None:
    """Without Redis requests keep flowing; back again and empty, all instances register and the index is whole."""
    before = cluster.wait(idle)
    os.kill(cluster.pid_of("redis"), signal.SIGKILL)
    with openai.OpenAI(base_url=f"{cluster.base}/v1", api_key="none", max_retries=0) as client:
        for _ in range(5):
            answer = client.chat.completions.create(
                model="demo", messages=[{"role": "user", "content": "What is 12 + 30?"}], temperature=0
            )
            assert answer.choices[0].message.content == "12 + 30 = 42."
    after = cluster.wait(lambda s: all_ready(s) and s["redis_connected"] and s["models"][0]["index"]["unsynced"] == 0)
    assert {i["instance"] for i in after["instances"]} == {i["instance"] for i in before["instances"]}


def test_nothing_is_left_behind(start_cluster: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """After SIGTERM no process, no shared memory region and no temporary file of the cluster is left."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    cluster = start_cluster("--workers", "1")
    (pid,) = [i["pid"] for i in cluster.instances()]
    assert len(processes_of(tmp_path)) > 5
    assert regions_of(pid)
    assert cluster.stop() == 0
    assert processes_of(tmp_path) == []
    assert regions_of(pid) == []
    assert list(tmp_path.iterdir()) == []


def processes_of(temporary: Path) -> list[str]:
    """Processes with this folder in their environment, which everything that a cluster starts inherits."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.fsencode(temporary) in (folder / "environ").read_bytes() and folder.name != str(os.getpid()):
                found.append(folder.name)
    return found


def regions_of(pid: int) -> list[str]:
    """Shared memory of a worker's Triton server, which carries the worker's pid in its name."""
    return [name for name in os.listdir("/dev/shm") if f"pytrtion{pid}-" in name]
