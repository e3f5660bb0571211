"""`M` on a tritonserver: Triton's requests become calls of the public model, on an event loop in a thread of its own.

The loop is ours because the stub stops its own before it calls `finalize`, so that nothing could drain there.
"""

import asyncio
import threading
from collections.abc import Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from dynamo_llm import instance
from dynamo_llm.config import ConfigError
from dynamo_llm.engines.base import EngineError
from dynamo_llm.hosts.base import HostError, refuse_numpy_2
from dynamo_llm.hosts.tritonserver import translate
from dynamo_llm.hosts.tritonserver.deployment import Deployment
from dynamo_llm.hosts.tritonserver.place import place_of
from dynamo_llm.instance import CreateEngine
from dynamo_llm.service import ServiceError
from kvstore.errors import StoreError
from kvstore.tasks import stop
from kvstore.wire import WireError

_LOOK_S = 0.1
"""How often a request looks whether its client has left. Asking Triton takes about 30 us."""

T = TypeVar("T")


def open_worker(arguments: dict[str, str], triton: Any, create: CreateEngine | None = None) -> "WorkerModel":
    """Load the model and let it serve. Raises Triton's exception with one line."""
    try:
        refuse_numpy_2()
        return WorkerModel(Deployment(place_of(arguments), triton, create or instance.create), triton)
    except (ConfigError, EngineError, HostError, StoreError, OSError) as error:
        raise triton.TritonModelException(f"{arguments['model_name']} cannot be loaded: {error}") from None


class WorkerModel:
    """See the module's docstring; `TritonModel` has the methods."""

    def __init__(self, deployment: Deployment, triton: Any) -> None:
        self._deployment = deployment
        self._triton = triton
        self._requests: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="dynamo-llm", daemon=True)
        self._thread.start()
        try:
            self._run(deployment.begin())
        except BaseException:
            self._stop()
            raise

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            self._loop.call_soon_threadsafe(self._take, request)

    def close(self) -> None:
        try:
            self._run(self._deployment.end())
            self._run(stop(*self._requests))
        finally:
            self._stop()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _stop(self) -> None:
        self._run(self._loop.shutdown_default_executor())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def is_ready(self) -> bool:
        return self._deployment.healthy

    # --- on the loop -------------------------------------------------------------------------------------------------

    def _take(self, request: Any) -> None:
        sender = request.get_response_sender()
        task = self._loop.create_task(self._answer(request, sender))
        self._requests.add(task)
        task.add_done_callback(self._requests.discard)
        self._loop.call_later(_LOOK_S, self._look, sender, task)

    def _look(self, sender: Any, task: asyncio.Task[None]) -> None:
        if task.done():
            return
        if sender.is_cancelled():
            task.cancel()
        self._loop.call_later(_LOOK_S, self._look, sender, task)

    async def _answer(self, request: Any, sender: Any) -> None:
        triton = self._triton
        try:
            tensors, parameters = translate.tensors_of(request), translate.parameters_of(request)
            async with aclosing(self._deployment.public.generate(tensors, parameters)) as answers:
                async for answer in answers:
                    sender.send(translate.response_of(triton, answer))
        except ServiceError as error:
            sender.send(translate.failed(triton, error.error))
        except Exception as error:  # noqa: BLE001 - a request's boundary: a bug must reach the client, too
            triton.Logger.log_error(f"dynamo_llm: a request failed: {error!r}")
            sender.send(translate.failed(triton, WireError("engine_failure", repr(error))))
        finally:
            sender.send(flags=triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
