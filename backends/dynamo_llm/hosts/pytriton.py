"""Serves the models on a Triton server that PyTriton runs, with the engine in this process. The default host.

The only file that imports pytriton. What of PyTriton's ways matters here:

- Each model is a stub process of Triton's python backend, which talks to a thread with an event loop in this process.
- Tensors travel as base64 in JSON (`PYTRITON_NO_TENSORSTORE`): for payloads of a few kilobytes that takes less time
  than the round trips to PyTriton's shared-memory manager, and saves that manager and its tracker for each model.
- The models lie in the server's repository from the start, instead of being sent to the running server: they load at
  the same time, and no copies of theirs are left in /tmp.
- A client's cancellation never reaches us; `session.py` says what does.
"""

import contextlib
import http.client
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTRITON_NO_TENSORSTORE", "1")

import numpy as np
import sh
from pytriton.model_config import ModelConfig, Tensor
from pytriton.proxy.types import Request
from pytriton.triton import Triton, TritonConfig, TritonLifecyclePolicy, TritonSecurityConfig

from dynamo_llm import libpython
from dynamo_llm.hosts.base import HostError, PublicModels, refuse_numpy_2
from dynamo_llm.public.tensors import Face
from dynamo_llm.service import Service, ServiceError
from kvstore.wire import CONTROL_SUFFIX, PAYLOAD, SESSION_SUFFIX

START_TIMEOUT_S = 120.0
EXIT_TIMEOUT_S = 5
"""For the server to send what we gave it. A client's open stream makes it wait for the whole time, and then hang."""
_KILL_AFTER_S = EXIT_TIMEOUT_S + 2.0
_SOCKET_PATH_LIMIT = 107
_LONGEST_SOCKET = "/{}.session_0_0-server.sock"
_START_ATTEMPTS = 3
_PORT_TAKEN = "already in use"
_PAYLOAD = [Tensor(name=PAYLOAD, dtype=np.uint8, shape=(-1,))]
_UNARY = ModelConfig(batching=False)
_DECOUPLED = ModelConfig(batching=False, decoupled=True)

logging.getLogger("pytriton").setLevel(logging.CRITICAL)  # it logs a traceback for each bad request of a client
# A Ctrl-C in the terminal must not reach the server: it has to outlast the drain. PyTriton does not let us say so.
sh.Command._call_args["new_group"] = True


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
        self._server: _Server | None = None
        self._starts = 0

    def start(self) -> None:
        """See `base.Host`. The server dies with the thread that calls this."""
        refuse_numpy_2()
        try:
            libpython.prepend_to_library_path()
        except libpython.LibpythonError as error:
            raise HostError(str(error)) from None
        _put_first_in_path(Path(sys.executable).parent)
        wanted = (self.grpc_port, self.http_port)
        for attempt in range(1, _START_ATTEMPTS + 1):
            self.grpc_port, self.http_port = _ports(self._host, wanted)
            try:
                return self._start_once()
            except HostError as error:
                self.stop()
                free = 0 in wanted  # another process may have taken the port that we found free
                if not (free and _PORT_TAKEN in str(error) and attempt < _START_ATTEMPTS):
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
        server = self._server = _Server(
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
        _await_ready(server, self._connect_host(), self.http_port, log)
        server.connect()
        server.on_exit = lambda: self.on_death(f"the Triton server ended: {_last_line(log)}")
        if not server.is_alive():
            raise HostError(f"the Triton server ended: {_last_line(log)}")

    def _bind(self, server: Triton) -> None:
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


class _Server(Triton):  # type: ignore[misc]  # pytriton has no types
    """A Triton that keeps its log to itself and tells of its end."""

    on_exit: Callable[[], None] = staticmethod(lambda: None)

    def hand_on_ids(self, model: str) -> None:
        """See `pytriton_stub.py`. To be called between `bind` and `launch`."""
        folder = self._model_manager._model_store_path / model / "1"
        (folder / "model.py").rename(folder / "pytriton_model.py")
        shutil.copy(Path(__file__).with_name("pytriton_stub.py"), folder / "model.py")

    def launch(self) -> None:
        """Start the server's process without waiting for it: PyTriton would wait for a dead one, too."""
        self._run_server()

    def stop(self) -> bool:
        """End the server. PyTriton's threads look once a second whether they are to stop, so tell them beforehand."""
        for model in self._model_manager.models:
            for connector in model._requests_respones_connectors:
                connector.close()
        killer = threading.Timer(_KILL_AFTER_S, self._kill)  # PyTriton itself would wait for half a minute
        killer.start()
        try:
            stopped = bool(super().stop())
        finally:
            killer.cancel()
        _end_programs_of(self._workspace.path)
        for region in Path("/dev/shm").glob(f"{self._python_backend_config['shm-region-prefix-name']}*"):
            region.unlink(missing_ok=True)  # a server that ran out of time does not clean up
        return stopped

    def _kill(self) -> None:
        if self._is_alive_impl():
            with contextlib.suppress(ProcessLookupError):
                self._triton_server._tritonserver_running_cmd.process.kill()

    def _initialize_server(self) -> None:
        super()._initialize_server()
        self._triton_server._verbose = False  # else all that the server prints lands on our stdout

    def _on_tritonserver_exit(self, *_: Any) -> None:
        self.on_exit()


def _config(face: Face) -> ModelConfig:
    if face.max_batch_size:
        return ModelConfig(max_batch_size=face.max_batch_size, batcher=None, decoupled=True)
    return _DECOUPLED


def _tensor(payload: bytes) -> dict[str, Any]:
    return {PAYLOAD: np.frombuffer(payload, np.uint8)}


def _end_programs_of(workspace: Path) -> None:
    """Kill what a server that died has left running: its stubs, whose program is a copy in the workspace."""
    start = f"{workspace}/".encode()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone in the meantime
            if (entry / "cmdline").read_bytes().startswith(start):
                os.kill(int(entry.name), signal.SIGKILL)


@contextlib.contextmanager
def scratch_folder(model: str, instances: int) -> Iterator[Path]:
    """For the files of a server, deleted at the end. The paths of its sockets, which lie in it, must not be long."""
    longest = model if instances == 1 else f"{model}.i{instances}"
    folder = Path(tempfile.mkdtemp(prefix="dynamo-llm-"))
    if len(f"{folder}/w{_START_ATTEMPTS}{_LONGEST_SOCKET.format(longest)}") > _SOCKET_PATH_LIMIT:
        folder.rmdir()
        folder = Path(tempfile.mkdtemp(prefix="dynamo-llm-", dir="/tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _ports(host: str, wanted: tuple[int, int]) -> tuple[int, int]:
    """`wanted` with a free port for each 0. Raises `HostError` for one that is taken."""
    with contextlib.ExitStack() as probes:  # all open at once, so that they differ
        found = []
        for port in wanted:
            probe = probes.enter_context(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET))
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                raise HostError(f"cannot listen on {host}:{port}: {error.strerror}") from None
            found.append(int(probe.getsockname()[1]))
    return found[0], found[1]


def _put_first_in_path(folder: Path) -> None:
    """The stub takes the packages of the first `python3` in PATH, which must be ours."""
    rest = [entry for entry in os.environ.get("PATH", "").split(os.pathsep) if entry != str(folder)]
    os.environ["PATH"] = os.pathsep.join([str(folder), *rest])


def _await_ready(server: _Server, host: str, port: int, log: Path) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while not _is_ready(host, port):
        if not server._is_alive_impl():
            raise HostError(f"the Triton server did not start: {_last_line(log)}")
        if time.monotonic() > deadline_s:
            raise HostError(f"the Triton server was not ready within {START_TIMEOUT_S:g} s: {_last_line(log)}")
        time.sleep(0.02)


def _is_ready(host: str, port: int) -> bool:
    connection = http.client.HTTPConnection(host, port, timeout=5.0)
    try:
        connection.request("GET", "/v2/health/ready")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _last_line(log: Path) -> str:
    """What the server said last, errors before anything else."""
    try:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        lines = []
    errors = [line.partition("] ")[2] or line for line in lines if line.startswith("E")]
    return " ".join((errors or lines or ["it left no log"])[-1].split())
