"""A plain tritonserver with our backend: what an operator does with a model repository, and what may befall it."""

import asyncio
import json
import os
import re
import signal
import urllib.request
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException
from tritonserver_process import make_entry
from wire_router import Router, submit
from worker_process import FATAL_TOKEN
from worker_runner import Worker

from kvstore.cards import InstanceCard
from kvstore.connect import connect
from kvstore.embedded import EmbeddedRedis
from kvstore.keys import Keys
from kvstore.registry import Registry
from kvstore.wire import Stats, StatsReply

PROGRAM = str(Path(__file__).parent / "tritonserver_process.py")
START_S = 90.0
RUNNING = 'dynamo_llm_worker_requests_running{model="demo",version="1"}'
CANCELLED = 'dynamo_llm_worker_requests_total{finish_reason="cancelled",model="demo",version="1"}'
NAMES = ("demo", "demo.control", "demo.session", "demo.trtllm")
ALL_VERSIONS = "version_policy: { all: {} }\n"


class Site:
    """A tritonserver, and how an operator sees it."""

    def __init__(self, worker: Worker, registry: Registry, prefix: str, eventually: Any) -> None:
        self.worker = worker
        self._registry = registry
        self._prefix = prefix
        self.eventually = partial(eventually, timeout_s=START_S)  # a model that is loaded is two Pythons that start
        self.client = triton.InferenceServerClient(worker.fields["http"])

    async def cards(self) -> dict[str, InstanceCard]:
        """By the name on the server."""
        return {card.triton_model: card for card in await self._registry.instances()}

    def ready(self, *models: str, version: str = "") -> list[bool]:
        """Triton's index leaves out what was loaded from nowhere, so each is asked for."""
        return [self.client.is_model_ready(model, version) for model in models]

    def metrics(self) -> dict[str, float]:
        with urllib.request.urlopen(self.worker.fields["metrics"], timeout=10) as response:
            lines = [line for line in response.read().decode().splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}

    def ask(self, model: str = "demo", version: str = "", **fields: Any) -> list[int]:
        """The token ids that follow token 10, five if nothing else is said."""
        path = f"models/{model}" + (f"/versions/{version}" if version else "")
        body = json.dumps({"input_ids": [10], "max_tokens": 5, **fields}).encode()
        with urllib.request.urlopen(f"http://{self.worker.fields['http']}/v2/{path}/generate", body, timeout=30) as got:
            ids: list[int] = json.load(got)["output_ids"]
            return ids


@pytest.fixture
def redis_site() -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis() as server:
        yield server


@pytest.fixture
async def start(
    tmp_path: Path, redis_site: EmbeddedRedis, eventually: Callable[..., Any]
) -> AsyncIterator[Callable[..., Any]]:
    """`await start(make)`: a server on the repository that `make(folder, **options)` fills."""
    workers: list[Worker] = []
    repository = tmp_path / "repository"
    repository.mkdir()
    async with connect(redis_site.url) as redis:

        async def start(make: Callable[..., None], **options: Any) -> Site:
            prefix = uuid.uuid4().hex
            make(repository, engine="scripted", engine_options={"step_s": 0.005}, key_prefix=prefix)
            worker = Worker(tmp_path, [PROGRAM], repository=str(repository), redis_url=redis_site.url, **options)
            workers.append(worker)
            await eventually(lambda: worker.is_ready, timeout_s=START_S)
            return Site(worker.look(), Registry(redis, Keys(prefix)), prefix, eventually)

        yield start
    for worker in workers:
        worker.clean()


def one_entry(folder: Path, **options: Any) -> None:
    make_entry(folder, options)


# --- load, unload, reload, versions -----------------------------------------------------------------------------------


async def test_unload_and_load(start: Any) -> None:
    """Unloading ends sessions after what is in flight, and takes the instance and its companions away; loading brings
    another instance."""
    site = await start(one_entry)
    assert all(site.ready(*NAMES))
    (card,) = (await site.cards()).values()
    assert (card.host, card.grpc_address, card.triton_model) == ("triton", site.worker.fields["grpc"], "demo")
    router = Router(card.grpc_address, "router")
    await router.open()
    await router.frame()
    await router.control(submit(1, 100, 60))
    site.client.unload_model("demo")
    tokens, reason = [], None
    while reason is None:
        frame = await router.frame()
        reason = frame.end
        tokens += [token for output in frame.outputs for token in output.token_ids]
    await router.channel.close()
    assert (tokens, reason) == (list(range(101, 161)), "drained")
    await site.eventually(lambda: not any(site.ready(*NAMES)))
    assert await site.cards() == {}

    site.client.load_model("demo")
    assert site.ask() == [11, 12, 13, 14, 15]
    await site.eventually(lambda: all(site.ready(*NAMES)))
    await site.eventually(lambda: _has_other(site, card))


async def _has_other(site: Site, card: InstanceCard) -> bool:
    cards = await site.cards()
    return set(cards) == {"demo"} and cards["demo"].instance != card.instance


async def test_reload(start: Any, tmp_path: Path) -> None:
    """With another config, the new model takes the place of the old one: its sessions end, its card goes."""
    site = await start(one_entry)
    (card,) = (await site.cards()).values()
    router = Router(card.grpc_address, "router")
    await router.open()
    await router.frame()
    await router.control(submit(1, 100, None))
    file = tmp_path / "repository/demo/1/model.json"
    file.write_text(file.read_text().replace("0.005", "0.004"))
    site.client.load_model("demo")
    assert await router.read_to_end() == "drained"
    await site.eventually(lambda: _has_other(site, card))
    await router.channel.close()
    again = Router(card.grpc_address, "router")
    await again.open()
    await again.frame()
    assert await again.run(submit(1, 10, 3)) == {1: [11, 12, 13]}
    await again.channel.close()
    assert site.ask() == [11, 12, 13, 14, 15]
    assert all(site.ready(*NAMES))


async def test_reloads_cut_nobody_off(start: Any, tmp_path: Path) -> None:
    """Clients of the model itself get the whole of their answers from the one that they asked, however often another
    follows; its companions go with the last one."""
    site = await start(one_entry)
    file = tmp_path / "repository/demo/1/model.json"
    answers = []
    for step_s in (0.004, 0.003, 0.002):
        (card,) = (await site.cards()).values()
        answers.append(asyncio.create_task(asyncio.to_thread(site.ask, max_tokens=400)))
        await site.eventually(lambda: site.metrics().get(RUNNING))
        options = json.loads(file.read_text())
        options["engine_options"]["step_s"] = step_s
        file.write_text(json.dumps(options))
        site.client.load_model("demo")
        await site.eventually(partial(_has_other, site, card))
    assert await asyncio.gather(*answers) == [list(range(11, 411))] * 3
    site.client.unload_model("demo")
    await site.eventually(lambda: not any(site.ready(*NAMES)))


async def test_an_unload_with_a_client_of_the_model(start: Any) -> None:
    """Triton lets it finish first; routers are told at once all the same."""
    site = await start(one_entry)
    answer = asyncio.create_task(asyncio.to_thread(site.ask, max_tokens=900))
    await site.eventually(lambda: site.metrics().get(RUNNING))
    site.client.unload_model("demo")

    async def is_gone() -> bool:
        return await site.cards() == {}

    await site.eventually(is_gone)
    assert not answer.done()
    assert await answer == list(range(11, 911))


async def test_versions(start: Any) -> None:
    """Each version is an instance; clients of a router know the newest by the model's name."""
    site = await start(lambda folder, **options: make_entry(folder, options, config=ALL_VERSIONS, versions=(1, 3)))
    cards = await site.cards()
    assert {name: card.model for name, card in cards.items()} == {"demo": "demo.1", "demo.3": "demo"}
    assert all(site.ready(*NAMES, "demo.3.control", "demo.3.session") + site.ready("demo", version="3"))
    for version in ("", "1", "3"):
        assert site.ask(version=version, max_tokens=2) == [11, 12]
    for name, card in cards.items():
        router = Router(card.grpc_address, "router", name)
        await router.open()
        await router.frame()
        (stats,) = await router.control(Stats())
        assert isinstance(stats, StatsReply)
        assert stats.instance == card.instance
        await router.channel.close()
    counts = {name: value for name, value in site.metrics().items() if name.startswith("vllm:generation_tokens_total")}
    assert set(counts) == {f'vllm:generation_tokens_total{{model="demo",version="{version}"}}' for version in "13"}


async def test_without_model_control_companions_are_entries(start: Any) -> None:
    """Where Triton does not let a model load others, entries of two lines bring the companions."""

    def make(folder: Path, **options: Any) -> None:
        make_entry(folder, options)
        of_demo = 'parameters: { key: "companion_of" value: { string_value: "demo" } }'
        for suffix in ("control", "session", "trtllm"):
            make_entry(folder, {"model_name": f"demo.{suffix}"}, config=of_demo)

    site = await start(make, control_mode="none")
    (card,) = (await site.cards()).values()
    router = Router(card.grpc_address, "router")
    await router.open()
    await router.frame()
    assert await router.run(submit(1, 10, 3)) == {1: [11, 12, 13]}
    await router.channel.close()
    assert site.ask("demo.trtllm", exclude_input_in_output=True) == [11, 12, 13, 14, 15]
    site.worker.process.terminate()
    assert site.worker.wait() == 0
    assert await site.cards() == {}


# --- figures ----------------------------------------------------------------------------------------------------------


async def test_figures_in_tritons_metrics(start: Any) -> None:
    """By vllm_backend's names, tensorrtllm_backend's and our own, each with model and version."""
    site = await start(one_entry)
    for _ in range(3):
        site.ask(max_tokens=4)
    at = '{model="demo",version="1"}'
    await site.eventually(lambda: site.metrics().get(f"vllm:e2e_request_latency_seconds_count{at}") == 3)
    figures = site.metrics()
    assert figures[f"vllm:prompt_tokens_total{at}"] == 3
    assert figures[f"vllm:generation_tokens_total{at}"] == 12
    assert figures[f"vllm:request_generation_tokens_sum{at}"] == 12
    assert figures[f"vllm:time_to_first_token_seconds_count{at}"] == 3
    assert figures[f"vllm:time_per_output_token_seconds_count{at}"] == 3
    assert (
        0.004
        < figures[f"vllm:time_per_output_token_seconds_sum{at}"] / 3
        < figures[f"vllm:e2e_request_latency_seconds_sum{at}"]
    )
    blocks = {
        re.search('type="(.*?)"', name).group(1): value  # type: ignore[union-attr]
        for name, value in figures.items()
        if name.startswith("nv_trt_llm_kv_cache_block_metrics")
    }
    assert (blocks["max"], blocks["free"], blocks["used"], blocks["tokens_per"]) == (64, 64, 0, 16)
    assert figures[f"dynamo_llm_worker_generated_tokens_total{at}"] == 12


# --- trouble ----------------------------------------------------------------------------------------------------------


async def test_an_engine_given_up_is_not_ready(start: Any) -> None:
    """Its model leaves the registry and Triton; the server stays, and others can load it again."""

    def make(folder: Path, **options: Any) -> None:
        make_entry(folder, {**options, "engine_restarts": 0})

    site = await start(make)
    with pytest.raises(urllib.error.HTTPError):
        site.ask(input_ids=[FATAL_TOKEN])
    await site.eventually(lambda: not site.client.is_model_ready("demo"))
    assert await site.cards() == {}
    assert site.client.is_server_live()
    site.client.load_model("demo")
    assert site.ask() == [11, 12, 13, 14, 15]


async def test_an_option_that_is_wrong_is_named(start: Any, tmp_path: Path) -> None:
    """In the error of the load, which the index repeats; the server and its other models stay."""
    site = await start(one_entry)
    make_entry(tmp_path / "repository", {"model_name": "other", "engin": "mock"})
    make_entry(tmp_path / "repository", {"model_name": "many"}, config="instance_group: { count: 2 }\n")
    make_entry(tmp_path / "repository", {"model_name": "said", "dialect": "tensorrtllm"})
    of_demo = 'parameters: { key: "companion_of" value: { string_value: "demo" } }'
    make_entry(tmp_path / "repository", {"model_name": "demo.else"}, config=of_demo)
    for name, text in {
        "other": "other cannot be loaded: unknown option 'engin'; did you mean 'engine'?",
        "many": "many cannot be loaded: one engine serves a model: instance_group must be",
        "said": "said cannot be loaded: dialect must be a parameter of config.pbtxt",
        "demo.else": "demo.else is no companion of demo: there are demo.control, demo.session, demo.trtllm",
    }.items():
        with pytest.raises(InferenceServerException):
            site.client.load_model(name)
        (entry,) = [entry for entry in site.client.get_model_repository_index() if entry["name"] == name]
        assert text in entry["reason"]
    assert site.ask() == [11, 12, 13, 14, 15]


async def test_a_client_that_leaves_frees_the_engine(start: Any) -> None:
    """Of a stream over HTTP and over gRPC, although it goes on for long."""
    site = await start(one_entry)
    host, _, port = site.worker.fields["http"].partition(":")
    body = '{"input_ids": [10], "max_tokens": 900, "stream": true}'
    _, writer = await asyncio.open_connection(host, int(port))
    path = "/v2/models/demo/generate_stream"
    writer.write(f"POST {path} HTTP/1.1\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode())
    await site.eventually(lambda: site.metrics()[RUNNING] == 1)
    writer.close()
    await site.eventually(lambda: site.metrics().get(CANCELLED) == 1, timeout_s=4.0)

    with triton_grpc.InferenceServerClient(site.worker.fields["grpc"]) as client:
        client.start_stream(lambda result, error: None)
        client.async_stream_infer("demo", [_tensor("input_ids", [10]), _tensor("max_tokens", [900])])
        await site.eventually(lambda: site.metrics()[RUNNING] == 1)
        client.stop_stream(cancel_requests=True)
        await site.eventually(lambda: site.metrics().get(CANCELLED) == 2, timeout_s=4.0)


def _tensor(name: str, values: list[int]) -> triton_grpc.InferInput:
    tensor = triton_grpc.InferInput(name, [len(values)], "INT32")
    tensor.set_data_from_numpy(np.array(values, np.int32))
    return tensor


@pytest.mark.parametrize("model", ["demo", "demo.control", "demo.session"])
async def test_a_killed_stub_ends_the_server(start: Any, model: str) -> None:
    """Triton would call the model ready for good, so the launcher ends it and says why; nothing is left over."""
    site = await start(one_entry)
    (stub,) = [pid for pid in site.worker.descendants if re.search(rf"\0{model}(_0)+\0".encode(), _command(pid))]
    os.kill(stub, signal.SIGKILL)
    await site.eventually(lambda: site.worker.process.poll() is not None, timeout_s=30.0)
    assert site.worker.wait() == 1
    assert f"the process of {model} has died" in "\n".join(site.worker.err)
    await site.eventually(lambda: site.worker.nothing_left)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_the_end_of_the_launcher(start: Any, number: signal.Signals) -> None:
    """In order, what is in flight ends first; killed, its guard ends the rest. Nothing is left either way."""
    site = await start(one_entry)
    router = Router(site.worker.fields["grpc"], "router")
    await router.open()
    await router.frame()
    await router.control(submit(1, 100, 60))
    site.worker.process.send_signal(number)
    if number == signal.SIGTERM:
        assert await router.read_to_end() == "drained"
        assert await site.cards() == {}
        assert site.worker.wait() == 0
    await router.channel.close()
    await site.eventually(lambda: site.worker.nothing_left, timeout_s=30.0)


async def test_a_signal_to_the_server_itself(start: Any) -> None:
    """A tritonserver that nobody launched for us gets SIGTERM from its operator: routers are told in time."""
    site = await start(one_entry)
    (server,) = [pid for pid in site.worker.descendants if _command(pid).split(b"\0")[0].endswith(b"/tritonserver")]
    router = Router(site.worker.fields["grpc"], "router")
    await router.open()
    await router.frame()
    os.kill(server, signal.SIGTERM)
    await site.eventually(lambda: site.worker.process.poll() is not None, timeout_s=25.0)
    assert await site.cards() == {}
    await router.channel.close()


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
