"""One instance in the registry: a `Service` that outlives its engines. The hosts' entry points (`worker.py`,
`hosts/tritonserver/deployment.py`) run it.

A *life* is one engine under one epoch: the engine, the publisher of its KV events, the lease on its card. When the
engine dies, what it had in flight gets `engine_failure`, the life ends (first the lease, so that no router sends more)
and after a pause the next one begins, under the same instance id and a later epoch. The Triton server stays up
throughout, and answers with `engine_failure` in the meantime. An engine that dies too often in a row is given up.
"""

import asyncio
import contextlib
import time
import uuid
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec

from dynamo_llm.card import own_address
from dynamo_llm.config import WorkerConfig
from dynamo_llm.duties import Duties
from dynamo_llm.engines import create_engine
from dynamo_llm.engines.base import ALONE, Duty, Engine, EngineError
from dynamo_llm.lifecycle import Lifecycle, RestartPolicy
from dynamo_llm.maker import Maker
from dynamo_llm.metrics import Metrics
from dynamo_llm.service import Limits, Service
from dynamo_llm.transfer.metrics import TransferMetrics
from kvstore.cards import InstanceCard, Role
from kvstore.errors import StoreError, StoreUnavailable
from kvstore.events import EventPublisher
from kvstore.lease import Lease
from kvstore.registry import Registry

ENDING_S = 2.0
"""How long cancelled requests and ending sessions may take."""
_FIRST_PAUSE_S = 0.25
_MOST_PAUSE_S = 2.0
"""Between attempts to reach Redis."""
_POLL_S = 0.01

CreateEngine = Callable[[WorkerConfig, Path, str], Engine]
"""Makes the engine of (options, model folder, model name). Raises `EngineError`."""


def create(config: WorkerConfig, folder: Path, model: str) -> Engine:
    """The engine that the options name."""
    duty = Duty(role=config.role, host=own_address(config)) if config.role != "agg" else ALONE
    return create_engine(config.engine, folder, model, config.engine_options, config.python, duty)


class Instance:
    """See the module's docstring. `load`, `begin`, `register`, `keep` and `end` are called in this order, `close` last.

    It lives on the event loop that calls these; the service may be used from everywhere.
    """

    def __init__(
        self,
        config: WorkerConfig,
        folder: Path,
        model: str,
        *,
        name: str = "",
        create: CreateEngine = create,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """`name`: the Triton model whose `.control` and `.session` are this instance's, `model` where empty.

        `say` takes a line for the operator.
        """
        self.id = uuid.uuid4().hex[:16]
        self.name = name or model
        labels = {"triton_model": self.name} if config.instances > 1 else {}
        self.metrics = Metrics(model, **labels)
        self.transfer_metrics = TransferMetrics(model, **labels)
        self._config = config
        self._create = lambda: create(config, folder, model)
        self._model = model
        self._say = say
        self._restarts = Lifecycle(RestartPolicy(first_delay_s=_FIRST_PAUSE_S, most_restarts=config.engine_restarts))
        self._changed = asyncio.Event()
        """Set when the service drains, is to have another role, or its engine has died."""
        self._life = AsyncExitStack()
        self._ending: asyncio.Task[None] | None = None
        self._lease: Lease | None = None
        self._maker: Maker | None = None
        """Of the engine that lives, or is to."""
        self._role = config.role
        self._duties: Duties
        self._service: Service | None = None
        self._epoch = 0
        self._batches = (0, 0)
        """KV event batches of earlier lives: published, dropped."""
        self._registry: Registry
        self._card: Callable[[Engine], InstanceCard]

    @property
    def service(self) -> Service:
        """The same one for good. Not before `begin`."""
        if self._service is None:
            raise RuntimeError("the instance has not begun")
        return self._service

    @property
    def loading(self) -> bool:
        """An engine is being made, be it that nobody waits for it any more."""
        return self._maker is not None and self._maker.busy

    async def load(self) -> None:
        """Make the first engine. Raises `EngineError`. May be cancelled, and then `close` does not wait for it."""
        self._restarts.started()
        await self._make()

    async def begin(self, registry: Registry) -> None:
        """Let it serve; `service` is there from now on."""
        self._registry = registry
        await self._live()

    async def register(self, card: Callable[[Engine], InstanceCard]) -> InstanceCard:
        """Enter the registry with the card of a life's engine; its instance and epoch are filled in. Raises
        `StoreError`, and may then be called again."""
        self._card = card
        made = msgspec.structs.replace(card(self.service.engine), instance=self.id, epoch=self._epoch)
        made = await self._duties.enter(made)
        self._lease = await self._registry.register(made, ttl_s=self._config.lease_ttl_s)
        self._life.push_async_callback(self._lease.close)
        await self._duties.begin()
        return made

    async def keep(self) -> str:
        """Follow each engine that dies with another, until that is given up: the reason. Take the roles that the
        service is told of."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            if self.service.role != self._role and self.service.healthy:
                await self._take_role(self.service.role)
            if self.service.failure is not None and (reason := await self._follow(self.service.failure)) is not None:
                return reason

    async def _take_role(self, role: Role) -> None:
        """Or keep the one it has, where that fails. With Redis away routers hear of it later."""
        lease, duties, pause_s = self._lease, self._duties, 0.1
        if lease is None:
            return
        try:
            await duties.take(role)
        except EngineError as error:
            self.service.role = self._role
            self._say(f"stays a worker of the role {self._role}: {error}")
            return
        self._role = role
        self._show_transfer()
        while self.service.healthy and self.service.role == role:
            try:
                await lease.update(await duties.enter(lease.card))
                await duties.begin()
            except StoreUnavailable:  # noqa: PERF203 - tried again
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _MOST_PAUSE_S)
            else:
                self._say(f"has the role {role} now")
                return

    async def leave(self) -> None:
        """Leave the registry, so that no router sends more."""
        if self._lease is not None:
            await self._lease.close()

    async def drain(self, timeout_s: float, hurry: Callable[[], bool] = lambda: False) -> int:
        """Leave the registry, take nothing new, let what is in flight end and readers have their blocks, then the
        sessions.

        Returns how many requests were cancelled because they outlasted `timeout_s`. `hurry` true: nobody is there to
        read any more.
        """
        await self.leave()
        self.service.drain()
        await until(lambda: not (self.service.in_flight or self.transfer_metrics.pinned()[0]) or hurry(), timeout_s)
        cancelled = 0 if hurry() else self.service.in_flight
        if cancelled:
            self.service.cancel_all()
            await until(lambda: not self.service.in_flight, ENDING_S)
        self.service.end_sessions("drained")
        await until(lambda: not self.service.streams, ENDING_S)
        return cancelled

    async def give_up_routers(self) -> None:
        """Leave the registry, take nothing new, and end routers' sessions: they go on elsewhere. Others finish."""
        await self.leave()
        self.service.drain()
        self.service.end_sessions("drained", local=False)
        await until(lambda: not self.service.streams, ENDING_S)

    async def close(self) -> None:
        """End the life and everything of it. May be called twice, and at any point."""
        await self._end_life()
        if self._maker is not None:  # its engine has never begun, or is still being made
            await self._maker.close()

    # --- one life after the other ------------------------------------------------------------------------------------

    async def _follow(self, reason: str) -> str | None:
        """From an engine's death to the next one's registration. Returns the reason where there is no next one."""
        await self._end_life()
        while (pause_s := self._restarts.exited(time.monotonic())) is not None:
            self._say(f"{reason}; the engine starts again in {pause_s:g} s")
            await asyncio.sleep(pause_s)
            self._restarts.started()
            try:
                await self._make()
                await self._live()
                await self._register_again()
            except (EngineError, StoreError) as error:
                await self._end_life()
                self.service.failure = reason = str(error)
                continue
            if self.service.failure is None:
                self._say(f"the engine is back, epoch {self._epoch}")
            return None
        return reason

    async def _make(self) -> None:
        self._maker = Maker(self._create)
        await self._maker.engine()

    async def _live(self) -> None:
        """Begin a life with the engine that was made."""
        if self._maker is None:
            raise RuntimeError("an engine is made before it lives")
        close, engine = self._maker.close, await self._maker.engine()
        self._epoch = max(time.time_ns() // 1_000_000, self._epoch + 1)
        self._life.push_async_callback(close)
        events = await self._life.enter_async_context(self._publisher(engine))
        self._life.callback(self._count_batches, events)
        self._life.push_async_callback(close)  # it must not outlive the publisher
        await self._take_duties(engine)
        before = self._batches
        self.metrics.events = lambda: _batches(before, events)
        if self._service is not None:
            self._service.restart(engine, epoch=self._epoch, events=events)
        else:
            self._service = self._first_service(engine, events)
            self._service.role = self._role
            self._service.start()
        self._restarts.ready(time.monotonic())

    async def _take_duties(self, engine: Engine) -> None:
        """Raises `EngineError`."""
        self._duties = Duties(
            self._registry,
            engine,
            self.transfer_metrics,
            instance=self.id,
            epoch=self._epoch,
            waiting_tokens=self._waiting_tokens,
        )
        self._life.push_async_callback(self._duties.close)
        await self._duties.take(self._role)
        self._show_transfer()

    def _show_transfer(self) -> None:
        if self._role != "agg" and self.transfer_metrics not in self.metrics.parts:
            self.metrics.parts.append(self.transfer_metrics)

    def _waiting_tokens(self) -> int | None:
        service = self.service
        if not (service.healthy and service.sessions):  # without a session nobody could send what was called for
            return None
        return service.load().waiting_prefill_tokens

    async def _end_life(self) -> None:
        """It goes on to its end however often the caller is cancelled; `close` waits for it then."""
        if self._ending is None or self._ending.done():
            self._ending = asyncio.create_task(self._life.aclose())
        await asyncio.shield(self._ending)

    async def _register_again(self) -> None:
        """As long as it takes: without Redis the engine serves all the same. Raises what waiting does not mend."""
        pause_s = 0.1
        while self.service.failure is None and not self.service.draining:
            try:
                await self.register(self._card)
                return
            except StoreUnavailable:  # noqa: PERF203 - tried again
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _MOST_PAUSE_S)

    def _publisher(self, engine: Engine) -> EventPublisher:
        return EventPublisher(
            self._registry.redis,
            self._registry.keys,
            instance=self.id,
            epoch=self._epoch,
            model=self._model,
            block_size=engine.info.block_size,
            heartbeat_s=self._config.heartbeat_s,
        )

    def _first_service(self, engine: Engine, events: EventPublisher) -> Service:
        config, loop = self._config, asyncio.get_running_loop()
        limits = Limits(
            max_inflight=config.max_inflight,
            max_payload_bytes=config.max_payload_bytes,
            session_timeout_s=config.session_timeout_s,
        )
        service = Service(
            engine, instance=self.id, epoch=self._epoch, events=events, metrics=self.metrics, limits=limits
        )
        self.metrics.block_size = engine.info.block_size
        self.metrics.load = service.load
        self.metrics.sessions = lambda: service.sessions
        service.on_change = lambda: tell(loop, self._changed)
        return service

    def _count_batches(self, events: EventPublisher) -> None:
        self._batches = _batches(self._batches, events)


def _batches(before: tuple[int, int], events: EventPublisher) -> tuple[int, int]:
    return before[0] + events.seq - events.dropped_batches, before[1] + events.dropped_batches


def tell(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    """Set an event of a loop, from any thread, also when the loop has ended already."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(event.set)


async def until(condition: Callable[[], bool], timeout_s: float) -> None:
    """Wait until it holds, or the time is up."""
    deadline_s = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline_s:  # noqa: ASYNC110 - it changes on threads without a loop
        await asyncio.sleep(_POLL_S)
