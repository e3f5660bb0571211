"""The HTTP face with what no good client sends: broken bodies, wrong paths, clients that do not read."""

import asyncio
import contextlib
import re
import socket
from typing import Any

import httpx2 as httpx
import msgspec
import pytest
import tritonclient.grpc.aio as triton
from scripted_worker import EOS, TOKENIZER, ids_of, says, silent

from kvstore import wire
from router.http import asgi
from router.http.protocol import Connection


def url_of(router: Any) -> str:
    return f"http://127.0.0.1:{router.http_port}"


CHAT = {"model": "demo", "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
async def http() -> Any:
    async with httpx.AsyncClient(timeout=20) as client:
        yield client


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b"[]", "object"),
        (b"\xff\xfe", "JSON"),
        (b'{"model": "demo", "messages": [{"role": "user", "content": "\xff"}]}', "JSON"),
        (b'{"model": "demo", "messages": ' + b"[" * 100_000, ""),
        (b"{}", "model"),
    ],
)
async def test_broken_bodies(cluster, http, body: bytes, message: str) -> None:
    """A body that is no request is a 400 in OpenAI's form."""
    router = await cluster.router()
    answer = await http.post(f"{url_of(router)}/v1/chat/completions", content=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert message in error["message"]


@pytest.mark.parametrize("chunked", [False, True])
async def test_huge_bodies(cluster, http, chunked: bool) -> None:
    """A body over the limit is refused, whether its length was declared or not, and the router goes on."""
    await cluster.worker(says("ok"))
    router = await cluster.router(max_body_bytes=100_000)
    body = msgspec.json.encode({**CHAT, "user": "x" * 200_000})

    async def pieces() -> Any:
        for at in range(0, len(body), 10_000):
            yield body[at : at + 10_000]

    answer = await http.post(f"{url_of(router)}/v1/chat/completions", content=pieces() if chunked else body)
    assert answer.status_code == 413
    assert (await http.post(f"{url_of(router)}/v1/chat/completions", json=CHAT)).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/v1/models", 405),
        ("DELETE", "/metrics", 405),
        ("GET", "/", 404),
    ],
)
async def test_wrong_paths(cluster, http, method: str, path: str, status: int) -> None:
    """Unknown paths and methods are errors in the same form."""
    router = await cluster.router()
    answer = await http.request(method, url_of(router) + path)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


async def test_request_ids(cluster, http) -> None:
    """A client's request id comes back and goes to the worker; an unfit one is replaced."""
    worker = await cluster.worker(says("ok"))
    router = await cluster.router()
    url = f"{url_of(router)}/v1/chat/completions"
    given = await http.post(url, json=CHAT, headers={"x-request-id": "abc-1", "traceparent": "00-a-b-01"})
    assert given.headers["x-request-id"] == "abc-1"
    assert given.json()["id"] == "chatcmpl-abc-1"
    assert (worker.submits[0].request_id, worker.submits[0].trace) == ("abc-1", {"traceparent": "00-a-b-01"})
    unfit = await http.post(url, json={}, headers={"x-request-id": "x" * 500})
    assert re.fullmatch(r"[0-9a-f]{24}", unfit.headers["x-request-id"])


async def test_health_and_readiness(cluster, http) -> None:
    """Alive at once; ready with the first worker that takes requests."""
    router = await cluster.router()
    assert (await http.get(f"{url_of(router)}/live")).status_code == 200
    assert (await http.get(f"{url_of(router)}/health")).status_code == 200
    assert (await http.get(f"{url_of(router)}/ready")).status_code == 503
    await cluster.worker(silent)
    await cluster.connected(router)
    assert (await http.get(f"{url_of(router)}/ready")).status_code == 200


async def test_kserve_is_ready_when_the_router_is(cluster, http, eventually) -> None:
    """A known model whose only worker cannot be reached is not ready, by HTTP or gRPC; with a worker, it is."""
    router = await cluster.router()
    dead = await cluster.worker()
    await dead.kill()
    await eventually(lambda: router.models.names() == ["demo"] and router.pool.connections())
    async with triton.InferenceServerClient(f"127.0.0.1:{router.grpc_port}") as client:

        async def answers() -> list[bool]:
            paths = ("/ready", "/v2/health/ready", "/v2/models/demo/ready")
            codes = [(await http.get(url_of(router) + path)).status_code for path in paths]
            return [
                *(code == 200 for code in codes),
                await client.is_server_ready(),
                await client.is_model_ready("demo"),
            ]

        assert await answers() == [False] * 5
        await cluster.worker()
        await cluster.connected(router, 1)
        assert await answers() == [True] * 5


async def test_status(cluster, http, eventually) -> None:
    """The status document shows instances with their load, and the index of each model."""
    worker = await cluster.worker(silent)
    worker.load = wire.Load(running=2, kv_blocks_used=5, kv_blocks_total=256)
    router = await cluster.router()
    held = worker.store(TOKENIZER.encode("a prompt of several blocks " * 10))
    model = router.models.get("demo")
    await eventually(lambda: router.pool.mirror(model).stats().blocks == held)
    document = (await http.get(f"{url_of(router)}/status")).json()
    (instance,) = document["instances"]
    assert instance["instance"] == worker.instance
    assert instance["connected"]
    assert instance["kv_blocks_total"] == 256
    assert document["models"][0]["index"]["blocks"] == held
    assert document["redis_connected"] is True


async def test_metrics(cluster, http) -> None:
    """The figures of served and refused requests, in Prometheus' format."""
    worker = await cluster.worker(says("one two"))
    worker.cached_tokens = 3
    router = await cluster.router()
    url = f"{url_of(router)}/v1/chat/completions"
    assert (await http.post(url, json=CHAT)).status_code == 200
    assert (await http.post(url, json={**CHAT, "model": "made-up"})).status_code == 404
    text = (await http.get(f"{url_of(router)}/metrics")).text
    figures = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    labels = 'endpoint="chat_completions",model='
    assert figures[f'dynamo_llm_router_requests_total{{{labels}"demo",status="200"}}'] == "1.0"
    assert figures[f'dynamo_llm_router_requests_total{{{labels}"",status="404"}}'] == "1.0"
    assert figures['dynamo_llm_router_generated_tokens_total{model="demo"}'] == str(float(len(ids_of("one two")) + 1))
    assert figures['dynamo_llm_router_cached_prompt_tokens_total{model="demo"}'] == "3.0"
    assert figures['dynamo_llm_router_time_to_first_token_seconds_count{model="demo"}'] == "1.0"
    assert figures["dynamo_llm_router_redis_connected"] == "1.0"
    assert f'instance="{worker.instance}",model="demo",reason="load"' in text


async def test_faults_of_ours_are_counted(cluster, http, monkeypatch) -> None:
    """A request that a bug ends is answered and stands in the figures as well."""
    router = await cluster.router()
    monkeypatch.setattr(router.models, "get", None)
    assert (await http.post(f"{url_of(router)}/v1/chat/completions", json=CHAT)).status_code == 500
    assert router.metrics.requests == {("chat_completions", "", "500"): 1}


async def answer_to(router: Any, *pieces: bytes) -> bytes:
    """All that the router says to raw bytes, until it closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", router.http_port)
    for piece in pieces:
        with contextlib.suppress(ConnectionError):  # it may have closed before the last ones
            writer.write(piece)
            await writer.drain()
    answer = bytearray()
    with contextlib.suppress(ConnectionError):
        while data := await asyncio.wait_for(reader.read(2**16), 10):
            answer += data
    writer.close()
    return bytes(answer)


@pytest.mark.parametrize(
    "fields",
    [
        [b"x-%d: %s\r\n" % (number, b"x" * 1000) for number in range(80)] + [b"\r\n"],
        [b"x: "] + [b"x" * 2**16] * 8,
    ],
)
async def test_huge_heads(cluster, fields: list[bytes]) -> None:
    """A head over the limit ends the connection, made of many fields or of one without an end."""
    router = await cluster.router()
    answer = await answer_to(router, b"GET /live HTTP/1.1\r\nhost: x\r\n", *fields)
    assert answer.startswith(b"HTTP/1.1 431") or not answer  # the kernel may drop what we had not read
    assert b"200" not in answer


async def test_a_large_head_is_told_why(cluster) -> None:
    """The answer is a status of its own."""
    router = await cluster.router()
    head = b"GET /live HTTP/1.1\r\nhost: x\r\nx: %s\r\n\r\n" % (b"x" * 70_000)
    assert (await answer_to(router, head)).startswith(b"HTTP/1.1 431")
    head = b"GET /live HTTP/1.1\r\nhost: x\r\nconnection: close\r\nx: %s\r\n\r\n" % (b"x" * 60_000)
    assert (await answer_to(router, head)).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("pieces", [(), (b"GET /li",), (b"GET /live HTTP/1.1\r\nhost: x\r\n\r\n", b"GET /live HT")])
async def test_heads_that_do_not_come(cluster, monkeypatch, pieces: tuple[bytes, ...]) -> None:
    """A connection whose next request never begins or never gets on is closed; a request before it is answered."""
    monkeypatch.setattr(Connection, "head_timeout_s", 0.1)
    router = await cluster.router()
    answer = await answer_to(router, *pieces)
    assert answer.count(b"HTTP/1.1 200") == max(len(pieces) - 1, 0)


async def test_an_answer_outlasts_the_timeout_of_the_next_head(cluster, monkeypatch, eventually) -> None:
    """The half head of a pipelined request does not end the answer that is still on its way."""
    monkeypatch.setattr(Connection, "head_timeout_s", 0.05)
    worker = await cluster.worker(silent)
    router = await cluster.router()
    body = msgspec.json.encode(CHAT)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
    answer = asyncio.create_task(answer_to(router, head + body, b"GET /live HT"))
    await eventually(lambda: worker.submits)
    late = asyncio.get_running_loop().time() + 0.2
    await eventually(lambda: asyncio.get_running_loop().time() > late)
    worker.emit(wire.Output(worker.submits[0].rid, [EOS], "stop"))
    assert (await answer).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("begun", [b"", b"{"])
async def test_bodies_that_do_not_come(cluster, monkeypatch, begun: bytes) -> None:
    """A body that never begins or never ends is a 400 after some time."""
    monkeypatch.setattr(asgi, "_BODY_TIMEOUT_S", 0.1)
    router = await cluster.router()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 9\r\n\r\n"
    answer = await answer_to(router, head + begun)
    assert answer.startswith(b"HTTP/1.1 400")
    assert b"did not arrive" in answer


async def test_keep_alive_after_a_stream(cluster) -> None:
    """A connection serves one request after the other, streams among them."""
    await cluster.worker(says("one two"))
    router = await cluster.router()
    reader, writer = await asyncio.open_connection("127.0.0.1", router.http_port)
    for stream in (True, False, True):
        body = msgspec.json.encode({**CHAT, "stream": stream})
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200")
        if stream:
            assert b"one" in await reader.readuntil(b"\r\n0\r\n\r\n")
        else:
            length = int(re.search(rb"content-length: (\d+)", head)[1])
            assert b"one two" in await reader.readexactly(length)
    writer.close()


class SlowClient:
    """Asks for a stream over a socket with a small buffer, and reads only when told to."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self._socket.setblocking(False)

    async def ask(self) -> None:
        loop = asyncio.get_running_loop()
        await loop.sock_connect(self._socket, ("127.0.0.1", self._port))
        body = msgspec.json.encode({**CHAT, "stream": True})
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
        await loop.sock_sendall(self._socket, head % len(body) + body)

    async def read_all(self) -> bytes:
        data = bytearray()
        while piece := await asyncio.get_running_loop().sock_recv(self._socket, 2**20):
            data += piece
        return bytes(data)

    def close(self) -> None:
        self._socket.close()


def text_of(response: bytes) -> str:
    """The text of a chunked stream of events."""
    events = re.findall(rb"data: (\{.*\})\n\n", response)
    deltas = [msgspec.json.decode(event)["choices"][0]["delta"] for event in events]
    return "".join(delta.get("content", "") for delta in deltas)


async def test_a_slow_client_gets_fuller_events(cluster, eventually) -> None:
    """While a client does not read, text is merged within bounds; when it reads again, nothing is missing."""
    worker = await cluster.worker(silent)
    router = await cluster.router(max_pending_bytes=64 * 2**20, write_buffer_bytes=16 * 2**10)
    client = SlowClient(router.http_port)
    await client.ask()
    await eventually(lambda: worker.submits)
    rid, tokens = worker.submits[0].rid, ids_of("some words to say ") * 100
    frames = 4000  # 7 MB, more than the kernel keeps for one connection
    for _ in range(frames):
        worker.emit(wire.Output(rid, tokens))
    worker.emit(wire.Output(rid, [EOS], "stop"))
    figures = router.metrics.model("demo")
    await eventually(lambda: figures.generated_tokens == frames * len(tokens) + 1, timeout_s=30)
    response = await asyncio.wait_for(client.read_all(), 30)
    client.close()
    assert text_of(response) == TOKENIZER.decode(tokens) * frames
    assert response.count(b"data: ") < frames


async def test_a_client_that_never_reads_is_cut_off(cluster, eventually) -> None:
    """Beyond the bound the request is cancelled and the connection closed, so memory stays bounded."""
    worker = await cluster.worker(silent)
    router = await cluster.router(max_pending_bytes=200_000)
    client = SlowClient(router.http_port)
    await client.ask()
    await eventually(lambda: worker.submits)
    rid, tokens = worker.submits[0].rid, ids_of("some words to say ") * 1000

    async def flood() -> None:
        while not worker.cancels:
            worker.emit(wire.Output(rid, tokens))
            await asyncio.sleep(0)

    await asyncio.wait_for(flood(), 30)
    await eventually(lambda: router.generation.inflight == 0)
    await eventually(lambda: ("chat_completions", "demo", "499") in router.metrics.requests)
    client.close()


@pytest.mark.parametrize("stream", [False, True])
async def test_what_outlasts_the_drain_is_told_so(cluster, eventually, stream: bool) -> None:
    """A request that is not through when the drain's time is over gets an answer, not a cut connection."""
    worker = await cluster.worker(says("one two", until=1) if stream else silent)
    router = await cluster.router(drain_timeout_s=0.1)
    async with httpx.AsyncClient(timeout=20) as http:
        asked = http.post(f"{url_of(router)}/v1/chat/completions", json={**CHAT, "stream": stream})
        answer = asyncio.create_task(asked)
        await eventually(lambda: worker.submits)
        await eventually(lambda: not stream or router.metrics.model("demo").generated_tokens)
        await router.__aexit__(None, None, None)
        response = await answer
    assert response.status_code == (200 if stream else 503)
    assert "shutting down" in response.text
