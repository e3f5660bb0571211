"""One worker process: engines behind a Triton server, in the registry. `dynamo-llm worker` and tests call `run`.

Start: engines, Redis, Triton, registry, `ready`. End, on SIGINT or SIGTERM or a `Drain` command: the registry first, so
that no router sends more; then what is in flight; then the sessions, Triton, the engines. A second signal ends it all
at once. An engine that dies is no end: `instance.py` follows it with another, while Triton stays up.

Triton's processes do not die with us. Two things see to it that none is left: at an orderly end we look for them by the
mark in their environment, and when we are killed with -9, a guard process does (`process_tree`).
"""

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TypeVar

from dynamo_llm import process_tree
from dynamo_llm.card import make_card, own_address
from dynamo_llm.config import ConfigError, WorkerConfig, resolve_model
from dynamo_llm.engines.base import Engine, EngineError
from dynamo_llm.hosts.base import HostError, PublicModels, tokenizer_of
from dynamo_llm.hosts.pytriton import PyTritonHost
from dynamo_llm.hosts.pytriton_server import scratch_folder
from dynamo_llm.instance import CreateEngine, Instance, create, tell
from dynamo_llm.metrics import Joined, MetricsServer
from dynamo_llm.service import Service
from kvstore import model_files
from kvstore.cards import InstanceCard
from kvstore.connect import Redis, connect
from kvstore.errors import StoreError, StoreUnavailable
from kvstore.keys import Keys
from kvstore.registry import Registry
from kvstore.tasks import spawn, stop

OK, FAILED, CANNOT_START = 0, 1, 2
_SAME_SIGNAL_S = 1.0
"""A Ctrl-C may come twice at once, from the terminal and from a supervisor: what follows so soon is the same."""

T = TypeVar("T")


class _Interrupted(Exception):
    """A signal came before the worker was ready."""


def run(config: WorkerConfig, create: CreateEngine = create) -> int:
    """Serve until a signal comes. Returns the exit code: 0 drained, 1 failed while running, 2 could not start.

    Call it on the main thread. `create` makes the engines. Where one is still being loaded, the process ends here.
    """
    try:
        folder, model = resolve_model(config.model_path, config.model_name)
        address = own_address(config)
        with scratch_folder(model, config.instances) as scratch, process_tree.no_leftovers(str(scratch)):
            worker = _Worker(config, folder, model, address, scratch)
            code = asyncio.run(worker.run(create))
    except (ConfigError, EngineError, HostError, StoreError, OSError) as error:
        _say(f"cannot start: {error}")
        return CANNOT_START
    if worker.is_loading:
        os._exit(code)  # nothing interrupts a load, and the interpreter would wait for its threads
    return code


class _Worker:
    """One life of a worker process."""

    def __init__(self, config: WorkerConfig, folder: Path, model: str, address: str, scratch: Path) -> None:
        self._config = config
        self._folder = folder
        self._model = model
        self._address = address
        self._scratch = scratch
        self._instances: list[Instance] = []
        self._wake = asyncio.Event()
        """Set when there is a reason to end: a signal, a drain, an engine given up, the server's death."""
        self._signalled_s: float | None = None
        self._trouble: str | None = None
        self._host_died = False

    @property
    def is_loading(self) -> bool:
        return any(instance.loading for instance in self._instances)

    async def run(self, create: CreateEngine) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)
        async with AsyncExitStack() as stack:
            with contextlib.suppress(_Interrupted):
                return await self._run(stack, create)
        return OK

    async def _run(self, stack: AsyncExitStack, create: CreateEngine) -> int:
        """Everything that is opened closes in reverse order: Triton, metrics, the instances, Redis."""
        config = self._config
        for number in range(1, config.instances + 1):
            name = self._model if number == 1 else f"{self._model}.i{number}"
            instance = Instance(config, self._folder, self._model, name=name, create=create, say=_say)
            stack.push_async_callback(instance.close)  # now, in case that Redis does not come
            self._instances.append(instance)
            await self._load(instance)
        redis: Redis = await self._insist(lambda: stack.enter_async_context(connect(config.redis_url)))
        registry = Registry(redis, Keys(config.key_prefix, config.namespace))
        for instance in self._instances:
            stack.push_async_callback(instance.close)  # again: while there is a Redis
            await instance.begin(registry)
            self._watch(instance.service)
        server = _open_metrics(config, self._instances)
        stack.push_async_callback(asyncio.to_thread, server.close)
        files = model_files.read(self._folder)
        host = await self._open_host(stack, files)
        blob = await self._insist(lambda: registry.put_blob(model_files.pack(files)))
        cards = [await self._register(instance, host, server.port, blob) for instance in self._instances]
        keepers = [spawn(f"instance {instance.id}", self._keep(instance)) for instance in self._instances]
        stack.push_async_callback(stop, *keepers)
        print(
            f"ready {self._model} grpc={cards[0].grpc_address} http={cards[0].http_address} "
            f"metrics={cards[0].metrics_url} instance={','.join(card.instance for card in cards)}",
            flush=True,
        )
        await self._wake.wait()
        await stop(*keepers)
        return await self._end()

    async def _load(self, instance: Instance) -> None:
        """Raises `_Interrupted` when a signal comes first."""
        loading, signalled = asyncio.ensure_future(instance.load()), asyncio.ensure_future(self._wake.wait())
        try:
            await asyncio.wait((loading, signalled), return_when=asyncio.FIRST_COMPLETED)
            if self._wake.is_set():
                raise _Interrupted
            await loading
        finally:
            await stop(loading, signalled)

    async def _register(self, instance: Instance, host: PyTritonHost, metrics_port: int, blob: str) -> InstanceCard:
        def card(engine: Engine) -> InstanceCard:
            return self._card(instance, engine, host, metrics_port, blob)

        return await self._insist(lambda: instance.register(card))

    async def _keep(self, instance: Instance) -> None:
        try:
            self._trouble = await instance.keep()
        except Exception as error:
            # The worker's boundary: without a keeper it would stay up, and nothing would follow an engine that dies.
            self._trouble = f"instance {instance.id} cannot go on: {error!r}"
            raise  # `spawn` logs where it came from
        finally:
            self._wake.set()

    async def _end(self) -> int:
        """Drain, unless Triton died: nobody is there to read then."""
        timeout_s = self._config.drain_timeout_s
        drains = (instance.drain(timeout_s, hurry=lambda: self._host_died) for instance in self._instances)
        if cancelled := sum(await asyncio.gather(*drains)):
            _say(f"cancelled {cancelled} requests that were not done in {timeout_s:g} s")
        trouble = self._trouble or next((i.service.failure for i in self._instances if i.service.failure), None)
        if trouble is not None:
            _say(trouble)
            return FAILED
        return OK

    def _watch(self, service: Service) -> None:
        """A `Drain` command of one instance ends the worker, as a signal does."""
        loop, changed = asyncio.get_running_loop(), service.on_change

        def on_change() -> None:
            changed()
            if service.draining:
                tell(loop, self._wake)

        service.on_change = on_change

    async def _open_host(self, stack: AsyncExitStack, files: dict[str, bytes]) -> PyTritonHost:
        config = self._config
        tokenizer = await asyncio.to_thread(tokenizer_of, files)
        services = {instance.name: instance.service for instance in self._instances}
        public = PublicModels(self._model, services.values(), tokenizer, config.dialect, config.exclude_input_in_output)
        host = PyTritonHost(
            services,
            public,
            folder=self._scratch,
            host=config.host,
            grpc_port=config.grpc_port,
            http_port=config.http_port,
        )
        loop = asyncio.get_running_loop()

        def on_death(reason: str) -> None:
            self._trouble, self._host_died = reason, True
            tell(loop, self._wake)

        host.on_death = on_death
        stack.push_async_callback(asyncio.to_thread, host.stop)
        await asyncio.to_thread(host.start)  # on a thread of the loop's pool, which lives as long as we do
        return host

    def _card(
        self, instance: Instance, engine: Engine, host: PyTritonHost, metrics_port: int, blob: str
    ) -> InstanceCard:
        address = self._address
        return make_card(
            self._config,
            engine,
            model=self._model,
            triton_model=instance.name,
            grpc_address=f"{address}:{host.grpc_port}",
            http_address=f"{address}:{host.http_port}",
            metrics_url=f"http://{address}:{metrics_port}/metrics",
            model_files=blob,
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
            process_tree.reap(process_tree.own_mark())
            shutil.rmtree(self._scratch, ignore_errors=True)
            os._exit(FAILED)  # whatever is still running would hold us


def _open_metrics(config: WorkerConfig, instances: list[Instance]) -> MetricsServer:
    def trouble() -> str | None:
        services = [instance.service for instance in instances]
        failures = [service.failure for service in services if service.failure is not None]
        return failures[0] if failures else "draining" if any(service.draining for service in services) else None

    figures = Joined([instance.metrics for instance in instances])
    try:
        return MetricsServer(config.host, config.metrics_port, figures.registry, trouble)
    except OSError as error:
        raise ConfigError(f"cannot listen on {config.host}:{config.metrics_port}: {error.strerror}") from None


def _say(text: str) -> None:
    print(f"dynamo-llm worker: {' '.join(text.split())}", file=sys.stderr, flush=True)
