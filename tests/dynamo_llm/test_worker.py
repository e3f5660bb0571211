"""A worker as a process: registration, an orderly end, and what a sudden one leaves over."""

import json
import os
import signal
import socket
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from scripted_engine import tokens
from wire_router import Router, submit
from worker_process import FATAL_TOKEN
from worker_runner import MODEL, ROOT, Worker

from kvstore import model_files
from kvstore.embedded import EmbeddedRedis
from kvstore.events import EventReader
from kvstore.keys import Keys
from kvstore.registry import Registry
from kvstore.wire import Done, SamplingParams, Snapshot, SnapshotReply, Stats, StatsReply, Submit

START_S = 60.0
Start = Callable[..., Any]


@pytest.fixture
def start(tmp_path: Path, redis_url: str, eventually: Callable[..., Any]) -> Iterator[Start]:
    """`await start(**options)`: a worker that is ready, on a key prefix of the test's own."""
    workers: list[Worker] = []

    async def start(*, ready: bool = True, command: list[str] | None = None, **options: Any) -> Worker:
        defaults = {"redis_url": redis_url, "key_prefix": uuid.uuid4().hex}
        workers.append(Worker(tmp_path, command or ["worker_process.py"], **{**defaults, **options}))
        worker = workers[-1]
        if ready:
            await eventually(lambda: worker.is_ready, timeout_s=START_S)
            worker.look()
        return worker

    yield start
    for worker in workers:
        worker.clean()


def get(url: str, body: bytes | None = None) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, body, timeout=10) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


async def test_a_worker_registers_serves_and_drains(start: Start, redis: Redis, eventually: Callable[..., Any]) -> None:
    """Ready means registered; SIGTERM lets the request in flight end, and nothing is left of the worker."""
    worker = await start(key_prefix="drains")
    registry = Registry(redis, Keys("drains"))
    (card,) = await registry.instances()
    assert card.instance == worker.fields["instance"]
    assert card.grpc_address == worker.fields["grpc"]
    assert (card.model, card.engine, card.kv_blocks, card.pid) == ("demo", "scripted", 64, worker.process.pid)
    blob = await registry.get_blob(card.model_files)
    assert model_files.unpack(blob or b"") == model_files.read(Path(MODEL) / "1/model")

    router = Router(card.grpc_address, "router")
    await router.open()
    await router.frame()
    await router.control(submit(1, 100, 100))
    (stats,) = await router.control(Stats())
    assert isinstance(stats, StatsReply)
    assert (stats.instance, stats.epoch) == (card.instance, card.epoch)
    assert get(worker.fields["metrics"].replace("/metrics", "/health")) == (200, '{"status": "ok"}')
    worker.process.send_signal(signal.SIGTERM)
    received: list[int] = []
    end = finish = None
    while end is None:
        frame = await router.frame()
        end = frame.end
        for output in frame.outputs:
            received += output.token_ids
            finish = output.finish_reason
    await router.channel.close()
    assert (end, finish, received) == ("drained", "length", list(range(101, 201)))
    assert worker.wait() == 0
    assert worker.err == []
    assert len(worker.out) == 1
    assert worker.nothing_left
    assert await registry.instances() == []


async def test_events_and_figures_tell_what_the_engine_did(start: Start, redis: Redis) -> None:
    """The stream carries the engine's blocks, /metrics the requests, tokens and frames."""
    worker = await start(key_prefix="figures")
    router = Router(worker.fields["grpc"], "router")
    await router.open()
    await router.frame()
    assert await router.run(submit(1, 10, 20), submit(2, 50, 5)) == {1: list(range(11, 31)), 2: list(range(51, 56))}
    reader = EventReader(redis, Keys("figures").events("demo", 16))
    ops = []
    while len(ops) < 2:
        ops += [op for entry in await reader.read() for op in entry.batch.ops]
    assert [op.hashes for op in ops] == [[1], [2]]
    status, text = get(worker.fields["metrics"])
    figures = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    await router.channel.close()
    assert status == 200
    name = 'dynamo_llm_worker_{}{{model="demo"}}'.format
    assert figures[name("generated_tokens_total")] == "25.0"
    assert figures[name("prompt_tokens_total")] == "4.0"
    assert figures[name("sessions")] == "1.0"
    assert float(figures[name("frames_total")]) >= 20
    assert figures[name("time_to_first_token_seconds_count")] == "2.0"
    assert figures[name("inter_token_latency_seconds_count")] == "23.0"
    assert figures['dynamo_llm_worker_requests_total{finish_reason="length",model="demo"}'] == "2.0"
    assert get(worker.fields["metrics"] + "/no")[0] == 404


async def test_the_torch_engine_reuses_a_prefix_and_says_so(start: Start, redis: Redis) -> None:
    """The whole worker with real parts: the same prompt twice gives the same tokens, cached the second time."""
    worker = await start(key_prefix="torch", engine="torch", engine_options={})
    (card,) = await Registry(redis, Keys("torch")).instances()
    router = Router(card.grpc_address, "router")
    await router.open()
    await router.frame()
    prompt = tokens(*range(300, 300 + 3 * card.block_size + 1))
    answers, cached = [], []
    for rid in (1, 2):
        command = Submit(
            rid=rid, token_ids=prompt, sampling=SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
        )
        assert await router.control(command) == [Done()]
        answers.append([])
        finished = False
        while not finished:
            for output in (await router.frame()).outputs:
                assert output.error is None
                answers[-1] += output.token_ids
                cached += [output.started.cached_tokens] if output.started else []
                finished = output.finish_reason is not None
    (snapshot,) = await router.control(Snapshot())
    await router.channel.close()
    assert len(answers[0]) == 8
    assert answers[0] == answers[1]
    assert cached == [0, 3 * card.block_size]
    assert isinstance(snapshot, SnapshotReply)
    (resident,) = snapshot.tiers
    assert resident.tier == "device"
    assert len(resident.hashes) // 8 >= 3
    worker.process.send_signal(signal.SIGTERM)
    assert worker.wait() == 0
    assert worker.nothing_left


async def test_a_killed_worker_leaves_nothing(start: Start, eventually: Callable[..., Any]) -> None:
    """kill -9 with a request in flight: within seconds there is no process, no shared memory and no file of it."""
    worker = await start()
    router = Router(worker.fields["grpc"], "router")
    await router.open()
    await router.frame()
    await router.control(submit(1, max_tokens=None))
    worker.process.kill()
    assert worker.wait() == -signal.SIGKILL
    await eventually(lambda: worker.nothing_left, timeout_s=10.0)
    await router.channel.close()


async def test_an_engine_that_dies_is_followed_by_another(
    start: Start, redis: Redis, eventually: Callable[..., Any]
) -> None:
    """Its requests are told, the instance comes back under a later epoch and serves, lines say so, counters go on."""
    worker = await start(key_prefix="follows")
    registry = Registry(redis, Keys("follows"))
    (before,) = await registry.instances()
    router = Router(worker.fields["grpc"], "router")
    await router.open()
    await router.frame()
    await router.control(submit(1, FATAL_TOKEN))
    frame = await router.frame()
    while frame.end is None:
        frame = await router.frame()
    assert frame.end == "engine_failure"

    async def is_back() -> bool:
        return [card.epoch > before.epoch for card in await registry.instances()] == [True]

    await eventually(is_back)
    (after,) = await registry.instances()
    assert (after.instance, after.pid) == (before.instance, worker.process.pid)
    await router.open()
    assert (await router.frame()).epoch == after.epoch
    assert await router.run(submit(1)) == {1: [11, 12, 13, 14, 15]}
    await router.channel.close()
    status, text = get(worker.fields["metrics"])
    assert status == 200
    assert 'dynamo_llm_worker_requests_total{finish_reason="error",model="demo"} 1.0' in text
    await eventually(lambda: len(worker.err) == 2)
    assert "met its fatal token; the engine starts again in 0.25 s" in worker.err[0]
    assert worker.err[1] == f"dynamo-llm worker: the engine is back, epoch {after.epoch}"
    worker.process.send_signal(signal.SIGTERM)
    assert worker.wait() == 0
    assert worker.nothing_left


async def test_an_engine_that_dies_too_often_ends_the_worker(start: Start) -> None:
    """After the restarts that it has in a row, the exit code is not 0, and the last line says why."""
    worker = await start(engine_restarts=0)
    router = Router(worker.fields["grpc"], "router")
    await router.open()
    await router.frame()
    await router.control(submit(1, FATAL_TOKEN))
    assert await router.read_to_end() == "engine_failure"
    await router.channel.close()
    assert worker.wait() == 1
    assert worker.err == ["dynamo-llm worker: the scripted engine met its fatal token"]
    assert worker.nothing_left


async def test_an_engine_that_cannot_be_followed_ends_the_worker(start: Start) -> None:
    """Where something fails that no further attempt would mend, the worker does not stay up without an engine."""
    worker = await start(engine_options={"step_s": 0.01, "unstartable": 2})
    router = Router(worker.fields["grpc"], "router")
    await router.open()
    await router.frame()
    await router.control(submit(1, FATAL_TOKEN))
    assert await router.read_to_end() == "engine_failure"
    await router.channel.close()
    assert worker.wait() == 1
    assert worker.err[-1].endswith(" cannot go on: ZeroDivisionError('as it was told')")
    assert worker.nothing_left


@pytest.mark.parametrize("stuck", [1, 2])
async def test_a_signal_during_a_load_ends_it(start: Start, eventually: Callable[..., Any], stuck: int) -> None:
    """At once, whichever instance's engine it is: nothing was promised to anyone yet, and a load takes minutes."""
    worker = await start(ready=False, instances=2, engine_options={"step_s": 0.01, "stuck": stuck})
    await eventually(lambda: worker.err == ["stuck"], timeout_s=START_S)
    worker.process.send_signal(signal.SIGTERM)
    assert worker.wait() == 0
    assert worker.err == ["stuck"]
    assert worker.nothing_left


async def test_a_signal_while_an_engine_is_loaded_again_ends_it(start: Start, eventually: Callable[..., Any]) -> None:
    """The exit code says that there was no engine."""
    worker = await start(engine_options={"step_s": 0.01, "stuck": 2})
    router = Router(worker.fields["grpc"], "router")
    await router.open()
    await router.frame()
    await router.control(submit(1, FATAL_TOKEN))
    await router.channel.close()
    await eventually(lambda: worker.err[-1:] == ["stuck"])
    worker.process.send_signal(signal.SIGTERM)
    assert worker.wait() == 1
    assert worker.err[-1] == "dynamo-llm worker: the scripted engine met its fatal token"
    assert worker.nothing_left


async def test_several_instances_share_a_server(start: Start, redis: Redis) -> None:
    """Each is registered and reached by itself, has its own figures, and the public model uses all of them."""
    worker = await start(key_prefix="several", instances=2)
    cards = await Registry(redis, Keys("several")).instances()
    assert sorted(card.triton_model for card in cards) == ["demo", "demo.i2"]
    assert {card.grpc_address for card in cards} == {worker.fields["grpc"]}
    routers = [Router(card.grpc_address, "router", card.triton_model) for card in cards]
    for card, router in zip(cards, routers, strict=True):
        await router.open()
        assert (await router.frame()).epoch == card.epoch
        (stats,) = await router.control(Stats())
        assert isinstance(stats, StatsReply)
        assert stats.instance == card.instance
    await routers[0].control(submit(1, max_tokens=None))
    assert await routers[1].run(submit(1)) == {1: [11, 12, 13, 14, 15]}
    body = json.dumps({"input_ids": [5], "parameters": {"max_tokens": 2}}).encode()
    with urllib.request.urlopen(
        f"http://{worker.fields['http']}/v2/models/demo/generate", body, timeout=10
    ) as response:
        assert json.load(response)["output_ids"] == [6, 7]
    _, text = get(worker.fields["metrics"])
    generated = {line for line in text.splitlines() if line.startswith("dynamo_llm_worker_generated_tokens_total{")}
    busy, idle = cards[0].triton_model, cards[1].triton_model
    assert f'dynamo_llm_worker_generated_tokens_total{{model="demo",triton_model="{idle}"}} 7.0' in generated
    assert any(busy in line for line in generated)
    assert text.count("# TYPE dynamo_llm_worker_generated_tokens_total ") == 1
    for router in routers:
        await router.channel.close()
    worker.process.kill()


async def test_a_dead_triton_server_ends_the_worker(start: Start) -> None:
    """A worker without its server is of no use to anyone: the supervisor is to start another."""
    worker = await start()
    (server,) = [pid for pid in worker.descendants if Path(f"/proc/{pid}/comm").read_text().startswith("tritonserver")]
    os.kill(server, signal.SIGKILL)
    assert worker.wait() == 1
    assert worker.err[0].startswith("dynamo-llm worker: the Triton server ended")
    assert worker.nothing_left


async def test_requests_that_outlast_the_drain_are_cancelled(start: Start) -> None:
    """After `drain_timeout_s` they get their one final output, even if Triton's processes got the Ctrl-C, too."""
    worker = await start(drain_timeout_s=0.2)
    router = Router(worker.fields["grpc"], "router")
    await router.open()
    await router.frame()
    await router.control(submit(1, max_tokens=None))
    os.killpg(worker.process.pid, signal.SIGINT)
    outputs, end = [], None
    while end is None:
        frame = await router.frame()
        outputs, end = outputs + frame.outputs, frame.end
    await router.channel.close()
    assert [output.finish_reason for output in outputs if output.finish_reason] == ["cancelled"]
    assert end == "drained"
    assert worker.wait() == 0


async def test_a_second_signal_ends_it_at_once(start: Start, eventually: Callable[..., Any]) -> None:
    """Whatever is in flight; and nothing is left all the same."""
    worker = await start(drain_timeout_s=600.0)
    router = Router(worker.fields["grpc"], "router")
    await router.open()
    await router.frame()
    await router.control(submit(1, max_tokens=None))

    def signalled() -> bool:
        worker.process.send_signal(signal.SIGTERM)
        return worker.process.poll() is not None

    await eventually(signalled, timeout_s=30.0)
    await router.channel.close()
    assert worker.wait() == 1
    assert worker.err == ["dynamo-llm worker: stopped at once"]
    await eventually(lambda: worker.nothing_left)


async def test_a_worker_waits_for_redis(
    start: Start, redis_server: EmbeddedRedis, eventually: Callable[..., Any]
) -> None:
    """It says once that it waits, and is ready when Redis is there."""
    redis_server.stop()
    worker = await start(ready=False, redis_url=redis_server.url)
    await eventually(lambda: any("waiting for Redis" in line for line in worker.err), timeout_s=START_S)
    assert worker.out == []
    redis_server.start()
    await eventually(lambda: worker.is_ready, timeout_s=START_S)
    assert len(worker.err) == 1
    worker.process.send_signal(signal.SIGTERM)
    assert worker.wait() == 0


async def test_a_signal_while_it_waits_for_redis_ends_it(
    start: Start, redis_server: EmbeddedRedis, eventually: Callable[..., Any]
) -> None:
    """There is nothing to drain."""
    redis_server.stop()
    worker = await start(ready=False, redis_url=redis_server.url)
    await eventually(lambda: len(worker.err) == 1, timeout_s=START_S)
    worker.process.send_signal(signal.SIGTERM)
    assert worker.wait() == 0
    assert worker.nothing_left


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_path": "/no/such/model"}, "model folder '/no/such/model' does not exist"),
        ({"model_path": str(ROOT / "tests")}, "holds neither config.json nor 1/model/config.json"),
        ({"redis_url": "http://nowhere"}, "redis://"),
        ({"model_name": "a/b"}, "model name 'a/b' cannot be served"),
        ({"grpc_port": "BUSY"}, "cannot listen on 127.0.0.1:"),
        ({"metrics_port": "BUSY"}, "cannot listen on 127.0.0.1:"),
    ],
)
async def test_what_cannot_start_says_so_in_one_line(start: Start, options: dict[str, Any], message: str) -> None:
    """Exit code 2, one line on stderr, nothing left."""
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        options = {key: busy.getsockname()[1] if value == "BUSY" else value for key, value in options.items()}
        worker = await start(ready=False, **options)
        assert worker.wait() == 2
    (line,) = worker.err
    assert line.startswith("dynamo-llm worker: cannot start: ")
    assert message in line
    assert worker.nothing_left


async def test_the_models_dialect_is_an_option(start: Start) -> None:
    """The model's own name takes what tensorrtllm_backend's clients send, and leaves the prompt out as told."""
    worker = await start(dialect="tensorrtllm", exclude_input_in_output=True)
    url = f"http://{worker.fields['http']}/v2/models/demo"
    ids = {"input_ids": [5], "max_tokens": 2}
    status, text = get(f"{url}/generate", json.dumps(ids).encode())
    assert (status, json.loads(text)["output_ids"], json.loads(text)["sequence_length"]) == (200, [6, 7], 2)
    status, text = get(f"{url}.vllm/generate", json.dumps(ids).encode())
    assert (status, json.loads(text)["output_ids"]) == (200, [6, 7])
    assert "sequence_length" not in json.loads(text)
