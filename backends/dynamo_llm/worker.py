"""One worker process: an engine behind a Triton server, in the registry. `dynamo-llm worker` and tests call `run`.

Start: engine, Redis, Triton, registry, `ready`. End, on SIGINT or SIGTERM or a `Drain` command: the registry first, so
that no router sends more; then what is in flight; then the sessions, Triton, the engine. A second signal ends it all at
once.

Triton's processes do not die with us. Two things see to it that none is left: at an orderly end we look for them by the
mark in their environment, and when we are killed with -9, a guard process does (`process_tree`).
"""

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, TypeVar

from dynamo_llm import process_tree
from dynamo_llm.config import ConfigError, WorkerConfig, resolve_model
from dynamo_llm.engines import create_engine
from dynamo_llm.engines.base import Engine, EngineError
from dynamo_llm.hosts.base import HostError
from dynamo_llm.hosts.pytriton import PyTritonHost, fits
from dynamo_llm.metrics import Metrics, MetricsServer
from dynamo_llm.public_model import PublicModel
from dynamo_llm.service import Limits, Service
from kvstore import model_files
from kvstore.cards import InstanceCard
from kvstore.connect import Redis, connect
from kvstore.errors import StoreError, StoreUnavailable
from kvstore.events import EventPublisher
from kvstore.keys import Keys
from kvstore.lease import Lease
from kvstore.registry import Registry
from kvstore.text import Tokenizer

OK, FAILED, CANNOT_START = 0, 1, 2
_SAME_SIGNAL_S = 1.0
"""A Ctrl-C may come twice at once, from the terminal and from a supervisor: what follows so soon is the same."""
_ENDING_S = 2.0
"""How long cancelled requests and ending sessions may take."""
_POLL_S = 0.01

T = TypeVar("T")
CreateEngine = Callable[[str, Path, str, dict[str, Any]], Engine]


class _Interrupted(Exception):
    """A signal came before the worker was ready."""


def run(config: WorkerConfig, create: CreateEngine = create_engine) -> int:
    """Serve until a signal comes. Returns the exit code: 0 drained, 1 failed while running, 2 could not start.

    Call it on the main thread. `create` makes the engine from (name, model folder, model name, options).
    """
    try:
        folder, model = resolve_model(config.model_path, config.model_name)
        address = config.advertise_host or _own_address(config.host)
        with _scratch_folder(model) as scratch, _no_leftovers(scratch):
            return asyncio.run(_Worker(config, folder, model, address, scratch).run(create))
    except (ConfigError, EngineError, HostError, StoreError, OSError) as error:
        _say(f"cannot start: {error}")
        return CANNOT_START


class _Worker:
    """One life of a worker process."""

    def __init__(self, config: WorkerConfig, folder: Path, model: str, address: str, scratch: Path) -> None:
        self._config = config
        self._folder = folder
        self._model = model
        self._address = address
        self._scratch = scratch
        self._instance = uuid.uuid4().hex[:16]
        self._epoch = time.time_ns() // 1_000_000
        self._wake = asyncio.Event()
        """Set when there is a reason to end: a signal, a drain, a death."""
        self._signalled_s: float | None = None
        self._host_failure: str | None = None

    async def run(self, create: CreateEngine) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)
        async with AsyncExitStack() as stack:
            with contextlib.suppress(_Interrupted):
                return await self._run(stack, create)
        return OK

    async def _run(self, stack: AsyncExitStack, create: CreateEngine) -> int:
        """Everything that is opened closes in reverse order: lease, Triton, metrics, engine, events, Redis."""
        config = self._config
        engine = await asyncio.to_thread(create, config.engine, self._folder, self._model, config.engine_options)
        stack.push_async_callback(asyncio.to_thread, engine.close)
        redis: Redis = await self._insist(lambda: stack.enter_async_context(connect(config.redis_url)))
        keys = Keys(config.key_prefix, config.namespace)
        events = await stack.enter_async_context(self._publisher(redis, keys, engine))
        stack.push_async_callback(asyncio.to_thread, engine.close)  # again: it must not outlive the publisher
        service = self._service(engine, events)
        files = model_files.read(self._folder)
        server = _open_metrics(config, service)
        stack.push_async_callback(asyncio.to_thread, server.close)
        host = await self._open_host(stack, service, files)
        registry = Registry(redis, keys)
        blob = await self._insist(lambda: registry.put_blob(model_files.pack(files)))
        card = self._card(engine, host, server.port, blob)
        lease = await self._insist(lambda: registry.register(card, ttl_s=config.lease_ttl_s))
        stack.push_async_callback(lease.close)
        print(
            f"ready {card.model} grpc={card.grpc_address} http={card.http_address} "
            f"metrics={card.metrics_url} instance={card.instance}",
            flush=True,
        )
        await self._wake.wait()
        return await self._end(service, lease)

    async def _end(self, service: Service, lease: Lease) -> int:
        """Drain, unless Triton died: nobody is there to read then. An engine's death ends what is in flight itself."""
        await lease.close()
        if self._host_failure is None:
            service.drain()
            await _until(lambda: not service.in_flight or self._host_failure is not None, self._config.drain_timeout_s)
        if self._host_failure is None and service.in_flight:
            _say(f"cancelled {service.in_flight} requests that were not done in {self._config.drain_timeout_s:g} s")
            service.cancel_all()
            await _until(lambda: service.in_flight == 0, _ENDING_S)
        trouble = service.failure or self._host_failure
        service.end_sessions("drained")
        await _until(lambda: service.streams == 0, _ENDING_S)
        if trouble is not None:
            _say(trouble)
            return FAILED
        return OK

    def _publisher(self, redis: Redis, keys: Keys, engine: Engine) -> EventPublisher:
        return EventPublisher(
            redis,
            keys,
            instance=self._instance,
            epoch=self._epoch,
            model=self._model,
            block_size=engine.info.block_size,
            heartbeat_s=self._config.heartbeat_s,
        )

    def _service(self, engine: Engine, events: EventPublisher) -> Service:
        config = self._config
        loop = asyncio.get_running_loop()
        metrics = Metrics(self._model)
        limits = Limits(
            max_inflight=config.max_inflight,
            max_payload_bytes=config.max_payload_bytes,
            session_timeout_s=config.session_timeout_s,
        )
        service = Service(
            engine, instance=self._instance, epoch=self._epoch, events=events, metrics=metrics, limits=limits
        )
        metrics.load = engine.load
        metrics.sessions = lambda: service.sessions
        metrics.events = lambda: (events.seq - events.dropped_batches, events.dropped_batches)
        service.on_change = lambda: _tell(loop, self._wake)
        service.start()
        return service

    async def _open_host(self, stack: AsyncExitStack, service: Service, files: dict[str, bytes]) -> PyTritonHost:
        config = self._config
        tokenizer = await asyncio.to_thread(_tokenizer, files)
        host = PyTritonHost(
            service,
            PublicModel(service, tokenizer),
            model=self._model,
            folder=self._scratch,
            host=config.host,
            grpc_port=config.grpc_port,
            http_port=config.http_port,
        )
        loop = asyncio.get_running_loop()

        def on_death(reason: str) -> None:
            self._host_failure = reason
            _tell(loop, self._wake)

        host.on_death = on_death
        stack.push_async_callback(asyncio.to_thread, host.stop)
        await asyncio.to_thread(host.start)  # on a thread of the loop's pool, which lives as long as we do
        return host

    def _card(self, engine: Engine, host: PyTritonHost, metrics_port: int, blob: str) -> InstanceCard:
        config, info, address = self._config, engine.info, self._address
        return InstanceCard(
            instance=self._instance,
            namespace=config.namespace,
            component=config.component,
            endpoint=config.endpoint,
            model=self._model,
            role=config.role,
            grpc_address=f"{address}:{host.grpc_port}",
            http_address=f"{address}:{host.http_port}",
            metrics_url=f"http://{address}:{metrics_port}/metrics",
            engine=info.name,
            engine_version=info.version,
            block_size=info.block_size,
            kv_blocks=info.kv_blocks,
            max_context=info.max_context,
            model_files=blob,
            epoch=self._epoch,
            pid=os.getpid(),
            started_s=time.time(),
        )

    async def _insist(self, action: Callable[[], Awaitable[T]]) -> T:
        """Try until Redis is there. Raises `_Interrupted` after a signal, and what will not get better by waiting."""
        pause_s, told = 0.1, False
        while not self._wake.is_set():
            try:
                return await action()
            except StoreUnavailable as error:
                if not told:
                    _say(f"waiting for Redis: {error}")
                told = True
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._wake.wait(), pause_s)
            pause_s = min(2 * pause_s, 2.0)
        raise _Interrupted

    def _on_signal(self) -> None:
        now_s = time.monotonic()
        if self._signalled_s is None:
            self._signalled_s = now_s
            self._wake.set()
        elif now_s - self._signalled_s > _SAME_SIGNAL_S:
            _say("stopped at once")
            process_tree.reap(_mark())
            shutil.rmtree(self._scratch, ignore_errors=True)
            os._exit(FAILED)  # whatever is still running, a model that is being loaded for one, would hold us


def _mark() -> str:
    """What tells our descendants from other processes; a supervisor's mark serves as well."""
    return os.environ.setdefault(process_tree.MARK_VARIABLE, f"worker-{uuid.uuid4().hex}")


@contextlib.contextmanager
def _scratch_folder(model: str) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="dynamo-llm-"))
    if not fits(folder, model):
        folder.rmdir()
        folder = Path(tempfile.mkdtemp(prefix="dynamo-llm-", dir="/tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _no_leftovers(scratch: Path) -> Iterator[None]:
    """Whatever carries our mark ends with us, be it in order or by kill -9."""
    guard = process_tree.Guard(_mark(), str(scratch))
    try:
        yield
    finally:
        process_tree.reap(_mark(), grace_s=1.0)
        guard.release()


def _tokenizer(files: dict[str, bytes]) -> Tokenizer | None:
    """None for a model without one. Raises `ConfigError` for one that cannot be read."""
    if "tokenizer.json" not in files:
        return None
    try:
        return Tokenizer.from_files(files)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _open_metrics(config: WorkerConfig, service: Service) -> MetricsServer:
    def trouble() -> str | None:
        return service.failure or ("draining" if service.draining else None)

    try:
        return MetricsServer(config.host, config.metrics_port, service.metrics.registry, trouble)
    except OSError as error:
        raise ConfigError(f"cannot listen on {config.host}:{config.metrics_port}: {error.strerror}") from None


def _own_address(host: str) -> str:
    """Where others reach a server that is bound to `host`. Raises `ConfigError` where only this machine would."""
    if host != "0.0.0.0":
        return host
    address = "127.0.0.1"
    with contextlib.suppress(OSError):
        address = socket.gethostbyname(socket.gethostname())
    if address.startswith("127."):  # Debian has the machine's own name in /etc/hosts with 127.0.1.1
        raise ConfigError(f"--host {host} does not say where routers find this worker: pass --advertise-host ADDRESS")
    return address


def _tell(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: we have ended already
        loop.call_soon_threadsafe(event.set)


async def _until(condition: Callable[[], bool], timeout_s: float) -> None:
    """Wait until it holds, or the time is up."""
    deadline_s = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline_s:  # noqa: ASYNC110 - it changes on threads without a loop
        await asyncio.sleep(_POLL_S)


def _say(text: str) -> None:
    print(f"dynamo-llm worker: {' '.join(text.split())}", file=sys.stderr, flush=True)
