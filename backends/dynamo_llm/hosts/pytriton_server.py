"""The process of a Triton server as PyTriton runs it, for `pytriton.py`: its start, its log and a clean end.

PyTriton is imported here and there only. The models lie in the server's repository from the start, instead of being
sent to the running server: they load at the same time, and no copies of theirs are left in /tmp.
"""

import contextlib
import http.client
import logging
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import sh
from pytriton.triton import Triton

from dynamo_llm.hosts.base import HostError

START_TIMEOUT_S = 120.0
EXIT_TIMEOUT_S = 5
"""For the server to send what we gave it. A client's open stream makes it wait for the whole time, and then hang."""
START_ATTEMPTS = 3
PORT_TAKEN = "already in use"
_KILL_AFTER_S = EXIT_TIMEOUT_S + 2.0
_SOCKET_PATH_LIMIT = 107
_LONGEST_SOCKET = "/{}.session_0_0-server.sock"

os.environ.setdefault("PYTRITON_NO_TENSORSTORE", "1")  # see `pytriton.py`
logging.getLogger("pytriton").setLevel(logging.CRITICAL)  # it logs a traceback for each bad request of a client
# A Ctrl-C in the terminal must not reach the server: it has to outlast the drain. PyTriton does not let us say so.
sh.Command._call_args["new_group"] = True


class Server(Triton):  # type: ignore[misc]  # pytriton has no types
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
    if len(f"{folder}/w{START_ATTEMPTS}{_LONGEST_SOCKET.format(longest)}") > _SOCKET_PATH_LIMIT:
        folder.rmdir()
        folder = Path(tempfile.mkdtemp(prefix="dynamo-llm-", dir="/tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def free_ports(host: str, wanted: tuple[int, int]) -> tuple[int, int]:
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


def put_first_in_path(folder: Path) -> None:
    """The stub takes the packages of the first `python3` in PATH, which must be ours."""
    rest = [entry for entry in os.environ.get("PATH", "").split(os.pathsep) if entry != str(folder)]
    os.environ["PATH"] = os.pathsep.join([str(folder), *rest])


def await_ready(server: Server, host: str, port: int, log: Path) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while not _is_ready(host, port):
        if not server._is_alive_impl():
            raise HostError(f"the Triton server did not start: {last_line(log)}")
        if time.monotonic() > deadline_s:
            raise HostError(f"the Triton server was not ready within {START_TIMEOUT_S:g} s: {last_line(log)}")
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


def last_line(log: Path) -> str:
    """What the server said last, errors before anything else."""
    try:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        lines = []
    errors = [line.partition("] ")[2] or line for line in lines if line.startswith("E")]
    return " ".join((errors or lines or ["it left no log"])[-1].split())
