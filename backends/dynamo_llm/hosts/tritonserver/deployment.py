"""An instance on a tritonserver: from the repository's entry to the registry, and back out when it is unloaded.

`worker_model.py` begins and ends it. Between them it lives on its own: it loads its companions once Triton has taken
the model in, registers, follows an engine that dies with another, and has itself unloaded when there is no engine left
or a router drained it.

A model that is loaded again is there twice for a while, as Triton starts the new one before it ends the old one: the
new one takes over the name, as the last thing that it does before it serves.
"""

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing
from typing import Any, TypeVar

import msgspec

from dynamo_llm.card import make_card, own_address
from dynamo_llm.config import ConfigError, resolve_model
from dynamo_llm.engines.base import Engine
from dynamo_llm.hosts.base import PublicModels, tokenizer_of
from dynamo_llm.hosts.tritonserver import model_config, options, translate
from dynamo_llm.hosts.tritonserver.companion_models import CompanionModels
from dynamo_llm.hosts.tritonserver.figures import Figures
from dynamo_llm.hosts.tritonserver.link import CallError, LinkLost, LinkServer, Method, Status, ask_once, link_name
from dynamo_llm.hosts.tritonserver.place import Place
from dynamo_llm.hosts.tritonserver.repository import Repository, RepositoryError
from dynamo_llm.instance import CreateEngine, Instance
from dynamo_llm.service import Service, ServiceError
from kvstore import model_files
from kvstore.cards import InstanceCard
from kvstore.connect import Redis, connect
from kvstore.errors import StoreUnavailable
from kvstore.keys import Keys
from kvstore.registry import Registry
from kvstore.tasks import Backoff, spawn, stop

_REDIS_TIMEOUT_S = 20.0
"""How long a load waits for Redis: the operator who asked for it waits, too."""
_POLL_S = 0.1
_FIGURES_S = 0.5
_WATCH_S = 1.0
_PATIENCE_S = 30.0
_TAKE_OVER_S = 20.0

T = TypeVar("T")


class Deployment:
    """See the module's docstring."""

    def __init__(self, place: Place, triton: Any, create: CreateEngine) -> None:
        """Raises `ConfigError`."""
        self._place = place
        self._triton = triton
        self._config = options.read(place.served_as, place.folder, place.parameters, place.server)
        if self._config.dialect != (model_config.parameter(place.config, "dialect") or "vllm"):
            raise ConfigError("dialect must be a parameter of config.pbtxt: Triton wants to know it beforehand")
        self._address = own_address(self._config)
        self._folder, self._model = resolve_model(self._config.model_path, self._config.model_name)
        self._files = model_files.read(self._folder)
        self._tokenizer = tokenizer_of(self._files)
        self._create = create
        self._stack = AsyncExitStack()
        self._tasks: list[asyncio.Task[None]] = []
        self._retiring: asyncio.Task[None] | None = None
        self._repository = Repository(place.grpc_address)
        companions = model_config.companions(place.name, self._config.dialect)
        config = model_config.companion(place.name, place.config) if place.explicit else None
        self._companions = CompanionModels(self._repository, companions[:2], companions[2:], config, self._say)
        self._ending = False
        self._handed_over = False
        self._registered = False
        self._figures: Figures
        self._link: LinkServer
        self._instance: Instance
        self.public: PublicModels

    @property
    def healthy(self) -> bool:
        return self._instance.service.healthy

    async def begin(self) -> None:
        """Serve, with the rest of the way to the registry to be gone in the background. Raises `EngineError`,
        `StoreError`."""
        try:
            await self._begin()
        except BaseException:
            await self._stack.aclose()
            raise

    async def end(self) -> None:
        """Let what is in flight end, and undo all else."""
        self._ending = True
        await stop(self._retiring, *self._tasks)
        await self._instance.drain(self._config.drain_timeout_s)
        await self._link.close()
        if not self._handed_over:
            await self._companions.unload()
        await self._stack.aclose()

    async def _begin(self) -> None:
        place, config = self._place, self._config
        instance = self._instance = Instance(
            config, self._folder, self._model, name=place.name, create=self._create, say=self._say
        )
        self._stack.push_async_callback(instance.close)
        await instance.load()
        redis: Redis = await self._redis()
        self._stack.push_async_callback(instance.close)  # again: while there is a Redis
        registry = Registry(redis, Keys(config.key_prefix, config.namespace))
        await instance.begin(registry)
        service = instance.service
        self.public = PublicModels(
            place.name, [service], self._tokenizer, config.dialect, config.exclude_input_in_output
        )
        await self._take_over()
        self._watch(service)
        figures = self._figures = Figures(self._triton, instance.metrics, model=place.model, version=place.version)
        self._stack.push_async_callback(asyncio.to_thread, figures.close)
        self._tasks = [
            spawn("figures", self._keep_up(figures)),
            spawn("announce", self._announce(registry)),
            spawn("leave", self._leave_with_triton()),
        ]

    async def _redis(self) -> Redis:
        deadline_s = time.monotonic() + _REDIS_TIMEOUT_S
        backoff = Backoff()
        while True:
            try:
                return await self._stack.enter_async_context(connect(self._config.redis_url))
            except StoreUnavailable:
                if time.monotonic() > deadline_s:
                    raise
            await backoff.pause()

    async def _take_over(self) -> None:
        """Have our name, from the same model in an older process if there is one."""
        service, name = self._instance.service, link_name(self._place.server_pid, self._place.name)
        methods: dict[str, Method] = {
            "control": _once(lambda payload: service.control(payload)),
            "session": _translated(service.frames),
            "generate": _translated(self._generate),
            "status": _once(lambda _: self._status()),
            "drain": self._drain,
            "hand_over": self._hand_over,
        }
        self._link = LinkServer(name, methods)
        self._stack.push_async_callback(self._link.close)
        give_up_s = time.monotonic() + _TAKE_OVER_S
        while True:
            with contextlib.suppress(LinkLost, CallError):  # there is none, or it is just ending
                await asyncio.to_thread(ask_once, name, "hand_over")
            try:
                return await self._link.open()
            except OSError:
                if time.monotonic() > give_up_s:
                    raise
            await asyncio.sleep(_POLL_S)

    async def _keep_up(self, figures: Figures) -> None:
        while True:
            await asyncio.to_thread(figures.update)
            await asyncio.sleep(_FIGURES_S)

    # --- the life of the instance ------------------------------------------------------------------------------------

    async def _announce(self, registry: Registry) -> None:
        """Into the registry once there is something to find, and out of Triton when the last engine has died."""
        await self._loaded()
        await self._companions.ready()
        blob = await _insist(lambda: registry.put_blob(model_files.pack(self._files)))
        await _insist(lambda: self._instance.register(lambda engine: self._card(engine, blob)))
        self._registered = True
        self._say(f"instance {self._instance.id} is registered in namespace {self._config.namespace}")
        reason = "it failed"
        try:
            reason = await self._instance.keep()
        finally:
            if not self._ending:
                self._say(f"{reason}; the engine is given up")
                self._retire()

    def _card(self, engine: Engine, blob: str) -> InstanceCard:
        config, address = self._config, self._address
        return make_card(
            config,
            engine,
            host="triton",
            model=self._model,
            triton_model=self._place.name,
            grpc_address=f"{address}:{config.grpc_port}",
            http_address=f"{address}:{config.http_port}",
            metrics_url=f"http://{address}:{config.metrics_port}/metrics",
            model_files=blob,
        )

    def _watch(self, service: Service) -> None:
        """A `Drain` command of a router ends as an operator's unload does."""
        loop, changed = asyncio.get_running_loop(), service.on_change

        def on_change() -> None:
            changed()
            if service.draining:
                loop.call_soon_threadsafe(self._retire)

        service.on_change = on_change

    def _retire(self) -> None:
        if self._retiring is None and not self._ending:
            self._retiring = spawn("retire", self._leave_triton())

    async def _leave_triton(self) -> None:
        """Triton 2.51 asks no model whether it is ready: one without an engine can only be unloaded."""
        await self._drain_all()
        if self._place.explicit:
            with contextlib.suppress(RepositoryError):  # the server is about to end
                await asyncio.to_thread(self._repository.unload, self._place.model)  # `end` comes of it

    # --- calls over the link -----------------------------------------------------------------------------------------

    async def _generate(self, payload: bytes) -> AsyncGenerator[bytes, None]:
        request = translate.decode_request(payload)
        async with aclosing(self.public.generate(translate.unpack(request.tensors), request.parameters)) as answers:
            async for answer in answers:
                yield translate.encode(translate.pack(answer))

    def _status(self) -> bytes:
        if not self._registered:
            return b""
        return msgspec.json.encode(Status(self._place.model, self._place.version, self._instance.id))

    async def _drain(self, _: bytes) -> AsyncGenerator[bytes, None]:
        """For the launcher, which ends the server next: while that still sends what sessions have to say."""
        self._ending = True
        await self._drain_all()
        yield b""

    async def _hand_over(self, _: bytes) -> AsyncGenerator[bytes, None]:
        """To the same model in a newer process. Routers replay there, or elsewhere, what is in flight here; clients of
        our own get the rest of their answers, and Triton ends us afterwards."""
        self._ending = self._handed_over = True
        await stop(self._retiring, *self._tasks)
        await self._instance.give_up_routers()
        # The other one's figures have the same names. Triton keeps one of each, and frees it with whoever goes first.
        await asyncio.to_thread(self._figures.close)
        self._link.free_name()
        self._retiring = spawn("drain", self._drain_all())
        yield b""

    async def _loaded(self) -> None:
        """Wait until Triton has taken us in, and calls."""
        patience_s = time.monotonic() + _PATIENCE_S
        while not (ready := await self._is_ready()):
            if ready is None and time.monotonic() > patience_s:
                self._say(f"routers cannot use it: Triton answers no gRPC without TLS at {self._place.grpc_address}")
                patience_s = math.inf
            await asyncio.sleep(_POLL_S)

    async def _leave_with_triton(self) -> None:
        """Triton ends a model that is unloaded only when its own requests have ended: routers leave at once, and the
        others have `drain_timeout`."""
        await self._loaded()
        while await self._is_ready() is not False:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(_WATCH_S)
        self._ending = True
        await self._drain_all()

    async def _is_ready(self) -> bool | None:
        return await asyncio.to_thread(self._repository.is_ready, self._place.model, self._place.version)

    async def _drain_all(self) -> None:
        await self._instance.drain(self._config.drain_timeout_s)

    def _say(self, text: str) -> None:
        self._triton.Logger.log_warn(f"dynamo_llm {self._place.name}: {' '.join(text.split())}")


async def _insist(action: Callable[[], Awaitable[T]]) -> T:
    """Try until Redis is there."""
    backoff = Backoff()
    while True:
        try:
            return await action()
        except StoreUnavailable:  # noqa: PERF203 - tried again
            await backoff.pause()


def _once(answer: Callable[[bytes], bytes]) -> Method:
    async def method(payload: bytes) -> AsyncGenerator[bytes, None]:
        yield answer(payload)

    return method


def _translated(method: Method) -> Method:
    """With the service's errors as the link's."""

    async def translated(payload: bytes) -> AsyncGenerator[bytes, None]:
        try:
            async with aclosing(method(payload)) as answers:
                async for answer in answers:
                    yield answer
        except ServiceError as error:
            raise CallError(error.error) from None

    return translated
