"""Runs the tritonserver that PyTriton carries, with our backend in its backend directory. `cli/tritonserver.py` calls
`run`.

Start: the server loads the repository, our models register; then `ready`. End, on SIGINT or SIGTERM: our models drain
while the server still sends what their sessions have to say; then the server ends. A second signal ends it all at once.

Triton 2.51 calls a model ready whose stub process has died, and can neither start that again nor unload it. So the
server is ended then, with exit code 1, for whoever supervises us to start it again.
"""

import asyncio
import contextlib
import http.client
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import msgspec
from msgspec import Struct

from dynamo_llm import libpython, process_tree
from dynamo_llm.child_io import exit_of
from dynamo_llm.hosts.base import HostError, refuse_numpy_2
from dynamo_llm.hosts.tritonserver.link import CallError, LinkLost, Status, ask_once, links_of
from dynamo_llm.hosts.tritonserver.options import REDIS_VARIABLE
from kvstore.tasks import stop
from kvstore.wire import CONTROL_SUFFIX, SESSION_SUFFIX

OK, FAILED, CANNOT_START = 0, 1, 2
MODEL_FILE = Path(__file__).parents[2] / "model.py"
_POLL_S = 0.1
_WATCH_S = 1.0
_STUB = "triton_python_backend_stub"
_NUMBERS = re.compile(r"(_\d+)+$")
_EXIT_TIMEOUT_S = 30.0
_DEAD_STUB_TIMEOUT_S = 3.0
"""It would wait in vain for the dead one."""
_SAME_SIGNAL_S = 1.0


T = TypeVar("T")


class Settings(Struct, frozen=True, kw_only=True):
    """What to run."""

    repositories: Sequence[Path]
    host: str = "127.0.0.1"
    http_port: int
    grpc_port: int
    metrics_port: int
    control_mode: str = "explicit"
    redis_url: str | None = None
    """For models that do not name one of their own."""
    arguments: Sequence[str] = ()
    """Further flags of tritonserver."""
    model_file: Path = MODEL_FILE

    @property
    def connect_host(self) -> str:
        return "127.0.0.1" if self.host == "0.0.0.0" else self.host


def run(settings: Settings) -> int:
    """Serve until a signal comes. Returns the exit code: 0 drained, 1 failed, 2 could not start. On the main thread."""
    folder = Path(tempfile.mkdtemp(prefix="dynamo-llm-"))
    try:
        with process_tree.no_leftovers(str(folder)):
            refuse_numpy_2()
            server = carried()
            make_backends(server, folder, settings.model_file)
            return asyncio.run(
                _Launcher(settings, command(server, folder, settings), environment(server, settings)).run()
            )
    except (HostError, OSError) as error:
        _say(f"cannot start: {error}")
        return CANNOT_START
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for region in Path("/dev/shm").glob(f"{folder.name}*"):
            region.unlink(missing_ok=True)  # a server that was killed, or aborted, does not clean up


class _Launcher:
    """One life of the server."""

    def __init__(self, settings: Settings, command: list[str], environment: dict[str, str]) -> None:
        self._settings = settings
        self._command = command
        self._environment = environment
        self._signal = asyncio.Event()
        self._signalled_s: float | None = None
        self._known: dict[str, str] = {}
        """Links and companions that have been there and were not unloaded, with Triton's path of their readiness."""
        self._process: subprocess.Popen[bytes]

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)
        self._process = subprocess.Popen(  # noqa: ASYNC220 - it returns at once
            self._command,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,  # ours says `ready` and nothing else
            start_new_session=True,  # a Ctrl-C in the terminal must not reach it: it has to outlast the drain
        )
        exited = asyncio.ensure_future(exit_of(self._process))
        signalled = asyncio.ensure_future(self._signal.wait())
        serving = asyncio.ensure_future(self._serve())
        try:
            await asyncio.wait({exited, signalled, serving}, return_when=asyncio.FIRST_COMPLETED)
            if exited.done():
                _say(f"the Triton server ended by itself with exit code {self._process.returncode}; its log says why")
                return FAILED if self._known else CANNOT_START
            if serving.done():
                _say(serving.result())
                await self._end(exited, _DEAD_STUB_TIMEOUT_S)
                return FAILED
            await self._end(exited, _EXIT_TIMEOUT_S)
            return OK
        finally:
            await stop(exited, signalled, serving)

    async def _serve(self) -> str:
        """Say when all of our models are ready, and then watch them. Returns why it cannot go on."""
        settings = self._settings
        await _until(lambda: _answers(settings, "/v2/health/ready"))
        links = links_of(self._process.pid)
        statuses = [await _until(lambda link=link: _status(link)) for link in links]  # type: ignore[misc]
        await asyncio.to_thread(self._look)
        host, instances = settings.connect_host, ",".join(status.instance for status in statuses)
        print(
            f"ready {settings.repositories[0]} grpc={host}:{settings.grpc_port} http={host}:{settings.http_port} "
            f"metrics=http://{host}:{settings.metrics_port}/metrics instance={instances}",
            flush=True,
        )
        return await self._dead_stub()

    async def _dead_stub(self) -> str:
        """Wait for a model that is ready without its process: in two looks, as one may fall into a reload."""
        missed: set[str] = set()
        while True:
            await asyncio.sleep(_WATCH_S)
            there = await asyncio.to_thread(self._look)
            dead = set()
            for name in self._known.keys() - there:
                if await asyncio.to_thread(_answers, self._settings, self._known[name]):
                    dead.add(name)
                else:
                    del self._known[name]
            if both := sorted(dead & missed):
                return f"the process of {' and '.join(name.rpartition('/')[2] for name in both)} has died"
            missed = dead

    def _look(self) -> set[str]:
        """What is there, by the names of links and of companions; takes in what is new."""
        links, stubs = links_of(self._process.pid), stubs_of(self._process.pid)
        for link in links:
            if (status := _status(link)) is not None:
                self._known[link] = f"/v2/models/{status.model}/versions/{status.version}/ready"
            model = link.rpartition("/")[2]
            companions = stubs & {model + CONTROL_SUFFIX, model + SESSION_SUFFIX}
            self._known |= {companion: f"/v2/models/{companion}/ready" for companion in companions}
        return stubs.union(links)

    async def _end(self, exited: "asyncio.Future[None]", timeout_s: float) -> None:
        await asyncio.gather(*(asyncio.to_thread(_ask, link, "drain") for link in links_of(self._process.pid)))
        self._process.terminate()
        await asyncio.wait({exited}, timeout=timeout_s)
        if not exited.done():
            _say(f"the Triton server was killed: it did not end within {timeout_s:g} s")
            self._process.kill()
            await exited

    def _on_signal(self) -> None:
        now_s = time.monotonic()
        if self._signalled_s is None:
            self._signalled_s = now_s
            self._signal.set()
        elif now_s - self._signalled_s > _SAME_SIGNAL_S:
            _say("stopped at once")
            process_tree.reap(process_tree.own_mark())
            os._exit(FAILED)


# --- the server that PyTriton carries ---------------------------------------------------------------------------------


def carried() -> Path:
    """PyTriton's folder of it, found without importing PyTriton. Raises `HostError`."""
    spec = find_spec("pytriton")
    if spec is None or not spec.submodule_search_locations:
        raise HostError("there is no tritonserver here: pip install 'dynamo-llm[worker]'")
    return Path(spec.submodule_search_locations[0], "tritonserver")


def make_backends(server: Path, folder: Path, model_file: Path) -> None:
    """A backend directory: `python`, real copies with the stub of this Python, and `dynamo_llm`."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = server / "python_backend_stubs" / version / _STUB
    if not stub.is_file():
        raise HostError(f"the tritonserver that PyTriton carries has no stub for Python {version}")
    shutil.copytree(server / "backends" / "python", folder / "python", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy2(stub, folder / "python")
    (folder / "dynamo_llm").mkdir()
    shutil.copyfile(model_file, folder / "dynamo_llm" / "model.py")


def environment(server: Path, settings: Settings) -> dict[str, str]:
    """Its libraries and the interpreter's own for the loader; this interpreter first in PATH, as stubs take the
    packages of the first one. Raises `HostError`."""
    found = dict(os.environ)
    try:
        libpython.prepend_to_library_path(found)
    except libpython.LibpythonError as error:
        raise HostError(str(error)) from None
    found["LD_LIBRARY_PATH"] += f":{server.parent.parent / 'nvidia_pytriton.libs'}"
    found["PATH"] = f"{Path(sys.executable).parent}:{found.get('PATH', '')}"
    if settings.redis_url is not None:
        found[REDIS_VARIABLE] = settings.redis_url
    return found


def command(server: Path, backends: Path, settings: Settings) -> list[str]:
    return [
        str(server / "bin" / "tritonserver"),
        *(f"--model-repository={repository}" for repository in settings.repositories),
        f"--backend-directory={backends}",
        f"--model-control-mode={settings.control_mode}",
        *(["--load-model=*"] if settings.control_mode == "explicit" else []),
        f"--http-address={settings.host}",
        f"--http-port={settings.http_port}",
        f"--grpc-address={settings.host}",
        f"--grpc-port={settings.grpc_port}",
        f"--metrics-address={settings.host}",
        f"--metrics-port={settings.metrics_port}",
        f"--backend-config=python,shm-region-prefix-name={backends.name}",
        *settings.arguments,
    ]


def stubs_of(server_pid: int) -> set[str]:
    """The models whose Python runs under a tritonserver; one that has died has no command line any more."""
    models = set()
    for children in Path(f"/proc/{server_pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread, or a child, that has ended meanwhile
            for pid in children.read_text().split():
                arguments = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").rstrip("\0").split("\0")
                if arguments[0].endswith(_STUB):
                    models.add(_NUMBERS.sub("", arguments[-2]))  # the model's instance, NAME_0 or NAME_0_0
    return models


async def _until(look: Callable[[], T | None]) -> T:
    """What it sees once it sees something; it may block."""
    while not (seen := await asyncio.to_thread(look)):  # noqa: ASYNC110 - nobody tells
        await asyncio.sleep(_POLL_S)
    return seen


def _ask(link: str, method: str) -> bytes:
    """Nothing from one that has gone."""
    with contextlib.suppress(LinkLost, CallError):
        return ask_once(link, method)
    return b""


def _status(link: str) -> Status | None:
    """None before it is registered, and when it has gone."""
    try:
        return msgspec.json.decode(_ask(link, "status"), type=Status)
    except msgspec.DecodeError:
        return None


def _answers(settings: Settings, path: str) -> bool:
    """Whether it is found, and well."""
    connection = http.client.HTTPConnection(settings.connect_host, settings.http_port, timeout=5.0)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _say(text: str) -> None:
    print(f"dynamo-llm tritonserver: {text}", file=sys.stderr, flush=True)
