"""Serves the models on a Triton server that PyTriton runs, with the engine in this process. The default host.

The server's process is in `pytriton_server.py`. What of PyTriton's ways matters here:

- Each model is a stub process of Triton's python backend, which talks to a thread with an event loop in this process.
- Tensors travel as base64 in JSON (`PYTRITON_NO_TENSORSTORE`): for payloads of a few kilobytes that takes less time
  than the round trips to PyTriton's shared-memory manager, and saves that manager and its tracker for each model.
- A client's cancellation never reaches us; `session.py` says what does.
"""

import sys
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
from pytriton.model_config import ModelConfig, Tensor
from pytriton.proxy.types import Request
from pytriton.triton import TritonConfig, TritonLifecyclePolicy, TritonSecurityConfig

from dynamo_llm import libpython
from dynamo_llm.hosts.base import HostError, PublicModels, refuse_numpy_2
from dynamo_llm.hosts.pytriton_server import (
    EXIT_TIMEOUT_S,
    PORT_TAKEN,
    START_ATTEMPTS,
    Server,
    await_ready,
    free_ports,
    last_line,
    put_first_in_path,
)
from dynamo_llm.public.tensors import Face
from dynamo_llm.service import Service, ServiceError
from kvstore.wire import CONTROL_SUFFIX, PAYLOAD, SESSION_SUFFIX

_PAYLOAD = [Tensor(name=PAYLOAD, dtype=np.uint8, shape=(-1,))]
_UNARY = ModelConfig(batching=False)
_DECOUPLED = ModelConfig(batching=False, decoupled=True)


class ModelError(Exception):
    """What a client is told. PyTriton sends an exception's traceback along, so this one has none to show."""

    __module__ = "builtins"
    __traceback__ = property(lambda self: None)


class PyTritonHost:
    """See the module's docstring, and `base.Host` for the methods."""

    def __init__(
        self,
        services: Mapping[str, Service],
        public: PublicModels,
        *,
        folder: Path,
        host: str = "127.0.0.1",
        grpc_port: int = 0,
        http_port: int = 0,
    ) -> None:
        """`services` by the name before `.control` and `.session`; `public` is the model itself and its companion.

        `folder` is for the server's files (`scratch_folder`). Port 0: a free one."""
        self.grpc_port = grpc_port
        self.http_port = http_port
        self.on_death: Callable[[str], None] = lambda reason: None
        self._services = services
        self._public = public
        self._host = host
        self._folder = folder
        self._server: Server | None = None
        self._starts = 0

    def start(self) -> None:
        """See `base.Host`. The server dies with the thread that calls this."""
        refuse_numpy_2()
        try:
            libpython.prepend_to_library_path()
        except libpython.LibpythonError as error:
            raise HostError(str(error)) from None
        put_first_in_path(Path(sys.executable).parent)
        wanted = (self.grpc_port, self.http_port)
        for attempt in range(1, START_ATTEMPTS + 1):
            self.grpc_port, self.http_port = free_ports(self._host, wanted)
            try:
                return self._start_once()
            except HostError as error:
                self.stop()
                free = 0 in wanted  # another process may have taken the port that we found free
                if not (free and PORT_TAKEN in str(error) and attempt < START_ATTEMPTS):
                    raise
            except BaseException:
                self.stop()
                raise

    def stop(self) -> None:
        """See `base.Host`."""
        server, self._server = self._server, None
        if server is not None:
            server.on_exit = lambda: None
            server.stop()

    def _start_once(self) -> None:
        self._starts += 1
        workspace = self._folder / f"w{self._starts}"
        log = self._folder / f"triton-{self._starts}.log"
        server = self._server = Server(
            config=TritonConfig(
                http_address=self._host,
                http_port=self.http_port,
                grpc_address=self._host,
                grpc_port=self.grpc_port,
                allow_metrics=False,
                log_file=log,
                exit_timeout_secs=EXIT_TIMEOUT_S,
            ),
            workspace=workspace,
            security_config=TritonSecurityConfig(restricted_endpoints=[]),
            triton_lifecycle_policy=TritonLifecyclePolicy(local_model_store=True),
        )
        self._bind(server)
        server.launch()
        await_ready(server, self._connect_host(), self.http_port, log)
        server.connect()
        server.on_exit = lambda: self.on_death(f"the Triton server ended: {last_line(log)}")
        if not server.is_alive():
            raise HostError(f"the Triton server ended: {last_line(log)}")

    def _bind(self, server: Server) -> None:
        for face in self._public.faces:
            inputs = [Tensor(name=name, dtype=dtype, shape=shape, optional=True) for name, dtype, shape in face.inputs]
            outputs = [Tensor(name=name, dtype=dtype, shape=shape) for name, dtype, shape in face.outputs]
            server.bind(face.model, self._generate, inputs, outputs, config=_config(face))
            server.hand_on_ids(face.model)
        for name, service in self._services.items():
            door = _Door(service)
            server.bind(name + CONTROL_SUFFIX, door.control, _PAYLOAD, _PAYLOAD, config=_UNARY)
            server.bind(name + SESSION_SUFFIX, door.frames, _PAYLOAD, _PAYLOAD, config=_DECOUPLED)

    def _connect_host(self) -> str:
        return "127.0.0.1" if self._host == "0.0.0.0" else self._host

    async def _generate(self, requests: list[Request]) -> AsyncGenerator[list[dict[str, Any]], None]:
        (request,) = requests
        try:
            async with aclosing(self._public.generate(request.data, request.parameters or {})) as answers:
                async for answer in answers:
                    yield [answer]
        except ServiceError as error:
            raise ModelError(str(error)) from None


class _Door:
    """The models of one service, each on a loop of its own; without batching PyTriton brings one request at a time."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def control(self, requests: list[Request]) -> list[dict[str, Any]]:
        return [_tensor(self._service.control(request[PAYLOAD].tobytes())) for request in requests]

    async def frames(self, requests: list[Request]) -> AsyncGenerator[list[dict[str, Any]], None]:
        (request,) = requests
        try:
            async with aclosing(self._service.frames(request[PAYLOAD].tobytes())) as frames:
                async for frame in frames:
                    yield [_tensor(frame)]
        except ServiceError as error:
            raise ModelError(str(error)) from None


def _config(face: Face) -> ModelConfig:
    if face.max_batch_size:
        return ModelConfig(max_batch_size=face.max_batch_size, batcher=None, decoupled=True)
    return _DECOUPLED


def _tensor(payload: bytes) -> dict[str, Any]:
    return {PAYLOAD: np.frombuffer(payload, np.uint8)}
