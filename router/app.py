"""The router as a process: opens everything in order, serves until a signal, drains, closes in reverse.

`cli.py` runs it. Tests open `Application` themselves.
"""

import asyncio
import contextlib
import errno
import logging
import math
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import AsyncExitStack
from types import TracebackType

import uvicorn

from kvstore.connect import connect
from kvstore.keys import Keys
from kvstore.registry import Registry
from kvstore.tasks import spawn
from router.config import RouterConfig
from router.generation import Generation
from router.http.app import App, Figures
from router.http.chat import ChatCompletions
from router.http.completions import Completions
from router.http.protocol import Connection
from router.kserve.grpc import KServeGrpc, PortBusy
from router.kserve.http import routes
from router.live_settings import LiveSettings
from router.metrics import Metrics
from router.models import Models
from router.pool import Pool
from router.prefill_queues import PrefillQueues
from router.status import status

logger = logging.getLogger(__name__)

_LISTING_TIMEOUT_S = 10.0
_ANSWER_S = 2.0
"""After the drain's time, what was in flight has so long to take its last answer."""


class StartError(Exception):
    """The router cannot start as it was told to; the message is one line that says what to do."""


class Application:
    """A running router. Entering it listens on both ports; leaving it drains what is in flight and closes all.

    Entering raises `StartError`, or `kvstore.errors.StoreError` for a Redis that refuses.
    """

    def __init__(self, config: RouterConfig) -> None:
        self.config = config
        self.metrics = Metrics()
        self.models = Models()
        self.settings = LiveSettings(config.disagg)
        self.http_port = config.http_port
        self.grpc_port = config.grpc_port
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> "Application":
        async with AsyncExitStack() as stack:
            config = self.config
            listener = stack.enter_context(contextlib.closing(_bind(config.host, config.http_port)))
            redis = await stack.enter_async_context(connect(config.redis_url, client_name="dynamo-llm-router"))
            registry = Registry(redis, Keys(namespace=config.namespace))
            settings = self.settings
            pool = Pool(registry, self.models, self.metrics, config, settings.on_change)
            self.pool = await stack.enter_async_context(pool)
            name = f"router-{os.urandom(6).hex()}"
            queues = await stack.enter_async_context(PrefillQueues(redis, registry.keys, name))
            self.generation = Generation(self.models, self.pool, self.metrics, config, settings, queues)
            self.metrics.prefill_queue_depths = queues.depths
            self.metrics.redis_connected = lambda: self.pool.redis_connected
            self.metrics.index_figures = self.pool.index_figures
            await self.pool.wait_listed(_LISTING_TIMEOUT_S)
            http = _HttpServer(self._asgi(), listener, config)
            grpc = KServeGrpc(
                self.models,
                self.generation,
                self.metrics,
                self.pool.can_serve,
                config.host,
                config.grpc_port,
                max_message_bytes=config.max_body_bytes,
                drain_timeout_s=config.drain_timeout_s + _ANSWER_S,
            )
            stack.push_async_callback(self._drain, http, grpc)
            try:
                await grpc.__aenter__()
            except PortBusy as error:
                raise StartError(f"{error}; choose another one by --grpc-port") from None
            await http.__aenter__()
            self.http_port, self.grpc_port = http.port, grpc.port
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.__aexit__(kind, error, trace)

    async def _drain(self, http: "_HttpServer", grpc: KServeGrpc) -> None:
        """Both servers take nothing new and finish what is in flight; what takes too long is told so."""
        timer = asyncio.get_running_loop().call_later(self.config.drain_timeout_s, self.generation.abandon)
        try:
            await asyncio.gather(http.__aexit__(None, None, None), grpc.__aexit__(None, None, None))
        finally:
            timer.cancel()

    def _asgi(self) -> App:
        parts = (self.models, self.generation, self.metrics, self.config)
        figures = Figures(
            ready=self.pool.can_serve,
            status=lambda: status(self.config, self.settings.current, self.models, self.pool, self.generation),
            metrics=self.metrics,
        )
        kserve = routes(*parts, self.pool.can_serve)
        return App(ChatCompletions(*parts), Completions(*parts), self.models, figures, kserve)


class _HttpServer:
    """uvicorn on a socket that is bound already, without its own signal handling."""

    def __init__(self, app: App, listener: socket.socket, config: RouterConfig) -> None:
        self.port: int = listener.getsockname()[1]
        self._listener = listener
        protocol = type("_Connection", (Connection,), {"write_buffer_bytes": config.write_buffer_bytes})
        self._server = _Uvicorn(
            uvicorn.Config(
                app,
                http=protocol,
                ws="none",
                lifespan="off",
                loop="none",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=math.ceil(config.drain_timeout_s + _ANSWER_S),
                timeout_keep_alive=75,
                backlog=2048,
            )
        )
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "_HttpServer":
        self._task = spawn("http server", self._server.serve([self._listener]))
        while not self._server.started:
            if self._task.done():
                self._task.result()
                raise StartError("the HTTP server did not start")
            await asyncio.sleep(0.005)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.should_exit = True
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)


class _Uvicorn(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The application handles signals itself, for all of its parts."""
        yield


def _bind(host: str, port: int) -> socket.socket:
    """A listening address, before anything else is started. Raises `StartError`."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise StartError(f"--host {host} is no address of this machine: {error.strerror}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        reason = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be opened: {error.strerror}"
        raise StartError(f"port {port} of {host} {reason}; choose another one by --http-port") from None
    listener.setblocking(False)
    return listener


async def serve(config: RouterConfig) -> None:
    """Run until SIGINT or SIGTERM, then drain. A second signal ends the process at once.

    Raises `StartError` or `StoreError` when it cannot start.
    """
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def on_signal(number: int) -> None:
        if stop.is_set():
            os._exit(128 + number)
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal, number)
    async with Application(config) as application:
        host = f"[{config.host}]" if ":" in config.host else config.host
        print(f"ready http://{host}:{application.http_port} grpc {host}:{application.grpc_port}", flush=True)
        await stop.wait()
        logger.info("draining %d requests in flight", application.generation.inflight)
