"""The real PyTriton server in front of a scripted engine: the models as clients see them, and what is left over."""

import asyncio
import json
import os
import queue
import socket
import tempfile
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from scripted_engine import Events, ScriptedEngine
from tritonclient.utils import InferenceServerException
from wire_router import Router, submit

from dynamo_llm import process_tree
from dynamo_llm.hosts import pytriton
from dynamo_llm.hosts.base import HostError, PublicModels
from dynamo_llm.hosts.pytriton import PyTritonHost
from dynamo_llm.hosts.pytriton_server import Server, free_ports, scratch_folder
from dynamo_llm.metrics import Metrics
from dynamo_llm.service import Limits, Service
from kvstore.text import Tokenizer
from kvstore.wire import Cancel, Close, Refused

MODEL_FOLDER = Path(__file__).parents[2] / "model_repository/demo/1/model"


def serve(service: Service, tokenizer: Tokenizer | None, folder: Path, **options: Any) -> PyTritonHost:
    public = PublicModels("demo", [service], tokenizer)
    return PyTritonHost({"demo": service}, public, folder=folder, **options)


class Rig:
    """One server for the whole module: it takes seconds to start."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = Tokenizer.from_files({"tokenizer.json": (MODEL_FOLDER / "tokenizer.json").read_bytes()})
        self.engine = ScriptedEngine(step_s=0.002)
        self.service = Service(
            self.engine,
            instance="0" * 16,
            epoch=7,
            events=Events(),
            metrics=Metrics("demo"),
            limits=Limits(session_timeout_s=2.0, frame_heartbeat_s=0.2),
        )
        self.service.start()
        self.host = serve(self.service, self.tokenizer, folder)
        self.host.start()

    @property
    def grpc_address(self) -> str:
        return f"127.0.0.1:{self.host.grpc_port}"

    @property
    def http_url(self) -> str:
        return f"http://127.0.0.1:{self.host.http_port}"


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    rig = Rig(Path(tmp_path_factory.mktemp("t")))
    yield rig
    rig.host.stop()
    rig.engine.close()


@pytest.fixture
async def router(rig: Rig, request: pytest.FixtureRequest) -> AsyncIterator[Router]:
    router = Router(rig.grpc_address, request.node.name)
    await router.open()
    assert (await router.frame()).outputs == []
    yield router
    await router.control(Close())
    await router.read_to_end()
    await router.channel.close()


async def test_a_batch_of_requests_streams_through_one_session(router: Router) -> None:
    """32 requests of one control call come back in frames, each complete and ended once."""
    got = await router.run(*(submit(rid, rid * 100) for rid in range(32)))
    assert got == {rid: list(range(rid * 100 + 1, rid * 100 + 6)) for rid in range(32)}


async def test_two_routers_share_the_server(rig: Rig, router: Router) -> None:
    """Sessions with the same rids do not meet."""
    other = Router(rig.grpc_address, "another")
    await other.open()
    one, two = await asyncio.gather(router.run(submit(1, 100, 20)), other.run(submit(1, 500, 20)))
    assert one == {1: list(range(101, 121))}
    assert two == {1: list(range(501, 521))}
    await other.control(Close())
    assert await other.read_to_end() == "closed"
    await other.channel.close()


async def test_a_cancelled_request_ends(rig: Rig, router: Router) -> None:
    """The last output says so, and the engine has nothing left."""
    await router.control(submit(1, max_tokens=None))
    while not (await router.frame()).outputs:
        pass
    await router.control(Cancel(1))
    while not any(output.finish_reason == "cancelled" for output in (await router.frame()).outputs):
        pass
    assert rig.service.in_flight == 0


async def test_a_second_session_of_a_name_replaces_the_first(rig: Rig) -> None:
    """The first one's stream ends by itself, with the reason in its last frame."""
    first, second = Router(rig.grpc_address, "same"), Router(rig.grpc_address, "same")
    await first.open()
    await first.frame()
    await second.open()
    await second.frame()
    assert await first.read_to_end() == "replaced"
    assert await second.run(submit(1)) == {1: [11, 12, 13, 14, 15]}
    await second.control(Close())
    await second.read_to_end()
    for router in (first, second):
        await router.channel.close()


async def test_a_router_that_vanishes_frees_its_requests(rig: Rig, eventually: Callable[..., Any]) -> None:
    """A closed connection says nothing to PyTriton; the missing pings do."""
    router = Router(rig.grpc_address, "vanishing")
    await router.open()
    await router.frame()
    await router.control(submit(1, max_tokens=None))
    assert rig.service.in_flight == 1
    await router.channel.close()
    await eventually(lambda: rig.service.in_flight == 0 and rig.service.streams == 0, timeout_s=10.0)


@pytest.mark.parametrize("payload", [b"\xc1", b"not msgpack", b"\x00" * 100], ids=["break", "text", "zeros"])
async def test_garbage_for_control_gets_one_refusal(router: Router, payload: bytes) -> None:
    """And the session goes on."""
    (reply,) = await router.control_raw(payload)
    assert isinstance(reply, Refused)
    assert reply.error.code == "invalid_request"
    assert await router.run(submit(1)) == {1: [11, 12, 13, 14, 15]}


async def test_garbage_for_a_session_gets_one_line(rig: Rig) -> None:
    """A model error in one line, without a traceback, and the stream ends."""
    router = Router(rig.grpc_address, "garbage")
    await router.open(b"\xc1\xc1")
    with pytest.raises(RuntimeError) as caught:
        await router.frame()
    assert "invalid_request: the payload is no OpenSession" in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert len(str(caught.value).strip().splitlines()) == 1
    await router.channel.close()


# --- the public model -----------------------------------------------------------------------------------------------


def _input(name: str, values: list[Any], datatype: str, dtype: Any) -> Any:
    tensor = triton.InferInput(name, [len(values)], datatype)
    tensor.set_data_from_numpy(np.array(values, dtype=dtype))
    return tensor


def _text(name: str, *values: str) -> Any:
    return _input(name, [value.encode() for value in values], "BYTES", np.object_)


def _flag(name: str) -> Any:
    return _input(name, [True], "BOOL", np.bool_)


def _count(value: int) -> Any:
    return _input("max_tokens", [value], "INT32", np.int32)


@pytest.fixture
def stream(rig: Rig) -> Iterator[Callable[..., list[Any]]]:
    """Send one request to the public model: its responses, or the error raised."""
    client = triton.InferenceServerClient(rig.grpc_address)
    results: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.start_stream(lambda result, error: results.put((result, error)))

    def send(*inputs: Any, **parameters: Any) -> list[Any]:
        client.async_stream_infer("demo", list(inputs), parameters=parameters, enable_empty_final_response=True)
        answers = []
        while True:
            result, error = results.get(timeout=10.0)
            if error is not None:
                raise error
            response = result.get_response()
            if response.outputs:
                answers.append(result)
            if response.parameters["triton_final_response"].bool_param:
                return answers

    yield send
    client.stop_stream()
    client.close()


def _answer(result: Any) -> str:
    return bytes(result.as_numpy("text_output")[0]).decode()


def test_text_comes_back_after_its_prompt(rig: Rig, stream: Callable[..., list[Any]]) -> None:
    """Not streaming, one response holds prompt and continuation; `exclude_input_in_output` leaves the prompt out."""
    last = np.frombuffer(rig.tokenizer.encode("Hello"), "<u4")[-1]
    expected = rig.tokenizer.decode([int(last) + step for step in range(1, 9)])
    (whole,) = stream(_text("text_input", "Hello"), _count(8))
    (bare,) = stream(_text("text_input", "Hello"), _count(8), _flag("exclude_input_in_output"))
    assert _answer(whole) == "Hello" + expected
    assert _answer(bare) == expected
    assert whole.as_numpy("output_ids").tolist() == [last + step for step in range(1, 9)]
    assert whole.as_numpy("finish_reason") is None


def test_a_stream_brings_deltas_that_add_up(stream: Callable[..., list[Any]]) -> None:
    """Streaming, the responses' texts and ids are what the single response holds, and the counts are per response."""
    flags = [_flag(f"return_{name}") for name in ("finish_reason", "num_input_tokens", "num_output_tokens")]
    (whole,) = stream(_text("text_input", "Hello"), _count(30), _flag("exclude_input_in_output"))
    parts = stream(_text("text_input", "Hello"), _count(30), _flag("stream"), *flags)
    assert "".join(map(_answer, parts)) == _answer(whole)
    assert np.concatenate([part.as_numpy("output_ids") for part in parts]).tolist() == list(
        whole.as_numpy("output_ids")
    )
    assert sum(int(part.as_numpy("num_output_tokens")[0]) for part in parts) == 30
    assert [bytes(part.as_numpy("finish_reason")[0]) for part in parts] == [b"None"] * (len(parts) - 1) + [b"length"]
    assert int(parts[0].as_numpy("num_input_tokens")[0]) >= 1


def test_token_ids_need_no_text(stream: Callable[..., list[Any]]) -> None:
    """`input_ids` are taken as they are; sampling parameters may come as request parameters, strings included."""
    (answer,) = stream(_input("input_ids", [5, 6, 7], "INT32", np.int32), max_tokens="4")
    assert answer.as_numpy("output_ids").tolist() == [8, 9, 10, 11]


def test_a_stop_string_ends_the_answer(rig: Rig, stream: Callable[..., list[Any]]) -> None:
    """The text ends before it, the finish reason is `stop`, and the engine stops, too."""
    ids = [300 + step for step in range(1, 200)]
    stop = rig.tokenizer.decode(ids[:40])[-6:]
    (answer,) = stream(
        _input("input_ids", [300], "INT32", np.int32),
        _text("sampling_parameters", json.dumps({"max_tokens": 100000, "stop": stop})),
        _flag("return_finish_reason"),
    )
    text = rig.tokenizer.decode(ids)
    assert _answer(answer) == text[: text.index(stop)]
    assert bytes(answer.as_numpy("finish_reason")[0]) == b"stop"


def test_tensors_with_a_batch_in_front(rig: Rig) -> None:
    """As clients of tensorrtllm_backend send them, to the model of that name."""
    tensor = triton.InferInput("input_ids", [1, 2], "INT32")
    tensor.set_data_from_numpy(np.array([[5, 6]], np.int32))
    count = triton.InferInput("request_output_len", [1, 1], "INT32")
    count.set_data_from_numpy(np.array([[3]], np.int32))
    results: queue.Queue[tuple[Any, Any]] = queue.Queue()
    with triton.InferenceServerClient(rig.grpc_address) as client:
        client.start_stream(lambda result, error: results.put((result, error)))
        client.async_stream_infer("demo.trtllm", [tensor, count])
        result, error = results.get(timeout=10.0)
    assert error is None
    assert result.as_numpy("output_ids").tolist() == [[[5, 6, 7, 8, 9]]]


def test_stop_by_tritons_own_request_id(rig: Rig) -> None:
    """As clients of tensorrtllm_backend cancel: `stop` under the id of the request, on the same stream."""
    results: queue.Queue[tuple[Any, Any]] = queue.Queue()
    with triton.InferenceServerClient(rig.grpc_address) as client:
        client.start_stream(lambda result, error: results.put((result, error)))
        prompt = [_input("input_ids", [300], "INT32", np.int32), _flag("stream"), _flag("return_finish_reason")]
        client.async_stream_infer("demo", prompt, request_id="7", parameters={"max_tokens": 900})
        assert results.get(timeout=10.0)[1] is None
        client.async_stream_infer("demo", [_flag("stop")], request_id="7", enable_empty_final_response=True)
        reasons = []
        while b"cancelled" not in reasons:
            result, error = results.get(timeout=10.0)
            assert error is None
            reasons += list(result.as_numpy("finish_reason")) if result.as_numpy("finish_reason") is not None else []


@pytest.mark.parametrize(
    ("inputs", "parameters", "message"),
    [
        ([_text("text_input", "Hi")], {"temprature": 1}, "did you mean 'temperature'"),
        ([_text("text_input", "Hi")], {"temperature": "hot"}, "temperature"),
        ([_text("text_input", "Hi"), _text("sampling_parameters", "{")], {}, "no JSON object"),
        ([_text("text_input", "Hi")], {"n": 0}, "sampling parameters: "),
        ([_count(3)], {}, "either text_input or input_ids"),
        (
            [_text("text_input", "Hi"), _input("input_ids", [1], "INT32", np.int32)],
            {},
            "either text_input or input_ids",
        ),
        ([_input("input_ids", [1, -1], "INT32", np.int32)], {}, "negative"),
        ([_input("input_ids", [1] * 2000, "INT32", np.int32)], {}, "context_length_exceeded"),
    ],
)
def test_a_wrong_request_gets_one_line(
    stream: Callable[..., list[Any]], inputs: list[Any], parameters: dict[str, Any], message: str
) -> None:
    """The error names what is wrong; there is no traceback."""
    with pytest.raises(InferenceServerException) as caught:
        stream(*inputs, **parameters)
    text = str(caught.value).strip()
    assert message in text
    assert "Traceback" not in text
    assert len(text.splitlines()) == 1


def test_generate_over_http(rig: Rig) -> None:
    """Triton's generate extension: JSON keys become tensors, `parameters` become parameters."""
    body = {"text_input": "Hello", "exclude_input_in_output": True, "parameters": {"max_tokens": 3}}
    request = urllib.request.Request(f"{rig.http_url}/v2/models/demo/generate", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=10) as response:
        answer = json.load(response)
    assert len(answer["output_ids"]) == 3
    assert answer["text_output"] == rig.tokenizer.decode(answer["output_ids"])


# --- the server itself ----------------------------------------------------------------------------------------------


def test_nothing_is_restricted_and_nothing_is_bound_to_the_world(rig: Rig) -> None:
    """Statistics need no token, and the ports are open on the loopback address only."""
    client = triton.InferenceServerClient(rig.grpc_address)
    assert client.get_inference_statistics("demo.control").model_stats
    client.close()
    listening = {
        line.split()[1]
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
        if line.split()[3] == "0A"
        and int(line.split()[1].rsplit(":")[1], 16) in (rig.host.grpc_port, rig.host.http_port)
    }
    assert listening
    assert all(address.split(":")[0].endswith("0100007F") for address in listening)  # 127.0.0.1, mapped or not


def test_a_busy_port_is_one_line(rig: Rig, tmp_path: Path) -> None:
    """Before anything is started."""
    host = serve(rig.service, None, tmp_path, grpc_port=rig.host.grpc_port)
    with pytest.raises(HostError, match=f"cannot listen on 127.0.0.1:{rig.host.grpc_port}"):
        host.start()


def test_a_stopped_server_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No process and no shared memory of its own; the folder is the caller's to remove."""
    mark = f"test-{os.getpid()}-stop"
    monkeypatch.setenv(process_tree.MARK_VARIABLE, mark)
    engine = ScriptedEngine(step_s=0.01)
    service = Service(engine, instance="0" * 16, epoch=7, events=Events(), metrics=Metrics("demo"))
    service.start()
    host = serve(service, None, tmp_path)
    host.start()
    pids = process_tree.members(mark)
    regions = process_tree.shm_regions(pids)
    assert len(pids) >= 4
    assert regions
    host.stop()
    engine.close()
    assert process_tree.members(mark) == []
    assert not [region for region in regions if os.path.exists(region)]


def test_a_port_lost_at_the_last_moment_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process takes the free port before Triton does: the second attempt serves, the first leaves nothing.

    A client whose stream stays open then does not hold up the end, where Triton hangs: the server is killed.
    """
    mark = f"test-{os.getpid()}-port"
    monkeypatch.setenv(process_tree.MARK_VARIABLE, mark)
    found: list[tuple[int, int]] = []
    with socket.socket() as thief:

        def ports(host: str, wanted: tuple[int, int]) -> tuple[int, int]:
            found.append(free_ports(host, wanted))
            if len(found) == 1:
                thief.bind((host, found[0][0]))
                thief.listen()
            return found[-1]

        monkeypatch.setattr(pytriton, "free_ports", ports)
        engine = ScriptedEngine(step_s=0.01)
        service = Service(engine, instance="0" * 16, epoch=7, events=Events(), metrics=Metrics("demo"))
        service.start()
        host = serve(service, None, tmp_path)
        host.start()
    assert len(found) == 2
    assert host.grpc_port == found[1][0] != found[0][0]
    programs = [Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0] for pid in process_tree.members(mark)]
    assert [program for program in programs if b"/w2/" in program]
    assert not [program for program in programs if b"/w1/" in program]

    killed: list[int] = []
    kill = Server._kill
    monkeypatch.setattr(Server, "_kill", lambda server: (killed.append(1), kill(server))[1])
    client = triton.InferenceServerClient(f"127.0.0.1:{host.grpc_port}")
    answers: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: answers.put(result))
    client.async_stream_infer("demo", [_input("input_ids", [5], "INT32", np.int32)])
    assert answers.get(timeout=10.0) is not None
    host.stop()
    assert killed
    client.close()
    engine.close()
    assert process_tree.members(mark) == []


def test_the_paths_of_sockets_are_short_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A temporary folder deep in the file system, as batch systems have them, is not used for them; what is made is
    deleted."""
    deep = tmp_path / ("d" * 60)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with scratch_folder("m" * 48, 2) as folder:
        assert folder.parent == Path("/tmp")
    assert not folder.exists()
    assert not any(deep.iterdir())
    monkeypatch.setattr(tempfile, "tempdir", "/tmp")
    with scratch_folder("m" * 48, 1) as folder:
        assert folder.is_dir()
