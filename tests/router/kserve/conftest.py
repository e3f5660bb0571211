"""A router's KServe faces on real ports, over a generator that echoes the prompt instead of a cluster."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import numpy as np
import pytest
import uvicorn
from starlette.applications import Starlette

from kvstore.cards import InstanceCard
from kvstore.text import Tokenizer
from kvstore.wire import TokenLogprob
from router.config import RouterConfig
from router.http.protocol import Connection
from router.kserve.grpc import KServeGrpc
from router.kserve.http import routes
from router.metrics import Metrics
from router.models import Model, Models
from router.types import Delta, GenerationRequest, Placed, Result

MODEL_FOLDER = Path(__file__).parents[3] / "model_repository" / "demo" / "1" / "model"
INSTANCE = "00000000000000aa"
BLOCK_SIZE = 16
MAX_BODY_BYTES = 256 * 1024


class EchoGenerator:
    """Answers with the tokens of the prompt, one delta a token. Faults are switched on by attributes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.requests: list[GenerationRequest] = []
        self.cancelled: list[str] = []
        self.finished: list[str] = []
        self.error: Exception | None = None
        self.fail_after = 0
        """Tokens before `error` is raised."""
        self.hold_after: int | None = None
        """Tokens after which a request waits for ever."""
        self.hold_only: set[str] | None = None
        """Ids of the requests that do; None: all."""

    async def generate(self, request, on_delta=None, on_placed=None) -> Result:
        self.requests.append(request)
        try:
            result = await self._echo(request, on_delta or (lambda _: None), on_placed or (lambda _: None))
        except asyncio.CancelledError:
            self.cancelled.append(request.request_id)
            raise
        self.finished.append(request.request_id)
        return result

    async def _echo(self, request, on_delta, on_placed) -> Result:
        prompt = np.frombuffer(request.token_ids, "<u4").tolist()
        tokens = [t for t in prompt if t not in self._tokenizer.special_ids][: request.sampling.max_tokens]
        reason = "length" if len(tokens) == request.sampling.max_tokens else "stop"
        placed = Placed(
            instance=INSTANCE, prompt_blocks=len(prompt) // BLOCK_SIZE, reused_blocks=len(prompt) // 32, reason="kv"
        )
        on_placed(placed)
        stream = self._tokenizer.stream(stop=request.stop, include_stop=request.include_stop)
        text, logprobs = "", [] if request.sampling.logprobs is not None else None
        for index, token in enumerate(tokens):
            if self.error is not None and index == self.fail_after:
                raise self.error
            if index == self.hold_after and (self.hold_only is None or request.request_id in self.hold_only):
                await asyncio.Event().wait()
            await asyncio.sleep(0)
            piece = stream.feed([token]) + (stream.flush() if index == len(tokens) - 1 else "")
            text += piece
            entry = None if logprobs is None else [_logprob(token, request.sampling.logprobs)]
            if logprobs is not None:
                logprobs += entry
            on_delta(Delta(piece, [token], entry, reason if index == len(tokens) - 1 else None))
        return Result(
            text=text,
            token_ids=tokens,
            logprobs=logprobs,
            prompt_logprobs=None,
            finish_reason=reason,
            prompt_tokens=len(prompt),
            cached_tokens=BLOCK_SIZE * placed.reused_blocks,
            queue_ms=0.1,
            ttft_ms=1.5,
            placed=placed,
        )


def _logprob(token: int, top: int) -> TokenLogprob:
    return TokenLogprob(token, -0.5, [(token, -0.5), (token + 1, -1.5)][:top])


class Faces(threading.Thread):
    """Both faces, in a thread with an event loop of its own, so that blocking clients can talk to them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(name="kserve-faces", daemon=True)
        self.tokenizer = tokenizer
        self.generator = EchoGenerator(tokenizer)
        self.models = Models()
        self.metrics = Metrics()
        self.loop = asyncio.new_event_loop()
        self.http_port = self.grpc_port = 0
        self.serving: set[str] = set()
        """Models that the router says it can serve."""
        self._ready = threading.Event()
        self._stopping = asyncio.Event()

    def start(self) -> None:
        super().start()
        assert self._ready.wait(20), "the faces did not come up"

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self._stopping.set)
        self.join(20)
        assert not self.is_alive()

    def run(self) -> None:
        self.loop.run_until_complete(self._serve())
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()

    async def _serve(self) -> None:
        config = RouterConfig(redis_url="", max_body_bytes=MAX_BODY_BYTES)
        app = Starlette(routes=routes(self.models, self.generator, self.metrics, config, self.is_ready))
        listener = socket.create_server(("127.0.0.1", 0))
        self.http_port = listener.getsockname()[1]
        server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="warning", http=Connection))
        async with AsyncExitStack() as stack:
            grpc = KServeGrpc(self.models, self.generator, self.metrics, self.is_ready, "127.0.0.1", 0)
            self.grpc_port = (await stack.enter_async_context(grpc)).port
            serving = asyncio.create_task(server.serve(sockets=[listener]))
            while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
                await asyncio.sleep(0.001)
            self._ready.set()
            await self._stopping.wait()
            server.should_exit = True
            await serving

    def is_ready(self, model: str | None) -> bool:
        return bool(self.serving) if model is None else model in self.serving

    @property
    def http(self) -> str:
        return f"127.0.0.1:{self.http_port}"

    @property
    def grpc(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"


def make_model(tokenizer: Tokenizer, name: str = "demo", max_context: int = 2048) -> Model:
    model = Model(name, BLOCK_SIZE, tokenizer, None, 0.0)
    model.add(
        InstanceCard(
            instance=INSTANCE,
            model=name,
            grpc_address="127.0.0.1:1",
            engine="echo",
            block_size=BLOCK_SIZE,
            kv_blocks=1024,
            max_context=max_context,
            model_files="",
            epoch=1,
        )
    )
    return model


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer((MODEL_FOLDER / "tokenizer.json").read_text())


@pytest.fixture
def model(tokenizer: Tokenizer) -> Model:
    return make_model(tokenizer)


@pytest.fixture
def echo(tokenizer: Tokenizer) -> EchoGenerator:
    """A generator without a server."""
    return EchoGenerator(tokenizer)


@pytest.fixture(scope="module")
def _faces(tokenizer: Tokenizer) -> Iterator[Faces]:
    faces = Faces(tokenizer)
    faces.models.put(make_model(tokenizer))
    faces.models.put(make_model(tokenizer, "org/demo"))
    faces.start()
    yield faces
    faces.stop()


@pytest.fixture
def faces(_faces: Faces) -> Faces:
    """Fresh state on the same ports."""
    _faces.generator.__init__(_faces.tokenizer)
    _faces.metrics.requests.clear()
    _faces.serving = set(_faces.models.names())
    return _faces


@pytest.fixture
def generator(faces: Faces) -> EchoGenerator:
    return faces.generator


@pytest.fixture
def until() -> Callable[[Callable[[], object]], None]:
    """Wait until a condition holds; fails after a deadline."""

    def wait(condition: Callable[[], object], deadline_s: float = 10.0) -> None:
        end = time.monotonic() + deadline_s
        while not condition():
            assert time.monotonic() < end, "the condition did not come true in time"
            time.sleep(0.002)

    return wait
