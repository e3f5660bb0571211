"""What router.py measures: our router with mock instances behind it, and Dynamo's frontend with its mockers.

Both serve the demo model's tokeniser and chat template without a model, as fast as they can. A system is started for
one round and stopped after it, so that nothing of the other one runs meanwhile.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from contextlib import ExitStack
from pathlib import Path

from _cluster import MODEL

INSTANCES = 4
BLOCK_SIZE, KV_BLOCKS = 16, 16384
START_TIMEOUT_S = 120.0
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class System(ABC):
    """Started as a context manager. `base` is its URL; `router` the one process that clients talk to."""

    name: str
    router: "subprocess.Popen[bytes]"

    def __init__(self, log: Path) -> None:
        self._log = log
        self._stack = ExitStack()
        port = free_port()
        self.base = f"http://127.0.0.1:{port}"
        self._port = port

    def __enter__(self) -> "System":
        began_s = time.monotonic()
        try:
            self._start()
            while not self._answers():
                if self.router.poll() is not None or time.monotonic() - began_s > START_TIMEOUT_S:
                    raise SystemExit(f"{self.name} did not start; its log is {self._log}")
                time.sleep(0.1)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @abstractmethod
    def _start(self) -> None: ...

    def _answers(self) -> bool:
        body = b'{"model":"demo","messages":[{"role":"user","content":"hello"}],"max_tokens":1}'
        request = urllib.request.Request(f"{self.base}/v1/chat/completions", body, {"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=5) as response:
                return response.status == 200
        except (OSError, urllib.error.URLError):
            return False

    def _spawn(self, *command: str, **variables: str) -> "subprocess.Popen[bytes]":
        """Ends with the system, and with it all that it has started."""
        log = self._stack.enter_context(self._log.open("ab"))
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env={**os.environ, **variables}, start_new_session=True
        )
        self._stack.callback(_end, process)
        return process

    # --- what its router process uses ---

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.router.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S

    def rss_mb(self) -> float:
        for line in Path(f"/proc/{self.router.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
        raise LookupError("the kernel tells no VmRSS")


class Ours(System):
    """Redis, a worker process with several mock instances, and a router."""

    name = "dynamo-llm"

    def _start(self) -> None:
        from kvstore.embedded import EmbeddedRedis

        redis = self._stack.enter_context(EmbeddedRedis())
        command = (sys.executable, "-m", "dynamo_llm")
        options = {"speed_up": "inf", "block_size": BLOCK_SIZE, "kv_blocks": KV_BLOCKS}
        engine = [word for name, value in options.items() for word in ("--engine-option", f"{name}={value}")]
        engine += ["--engine", "mock", "--instances", str(INSTANCES)]
        self._spawn(*command, "worker", "--model", str(MODEL), "--redis", redis.url, *engine)
        address = ("--http-port", str(self._port), "--grpc-port", "0")
        self.router = self._spawn(*command, "router", "--redis", redis.url, *address)


class Dynamo(System):
    """Its frontend in KV mode and its mockers, over TCP and ZMQ, found through files."""

    name = "dynamo"

    def __init__(self, log: Path, python: Path) -> None:
        super().__init__(log)
        self._python = str(python)

    def _start(self) -> None:
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        model = folder / "model"
        shutil.copytree(MODEL / "1" / "model", model)
        variables = {"DYN_FILE_KV": str(folder / "kv"), "HF_HUB_OFFLINE": "1", "DYN_LOG": "warn"}
        planes = ("--discovery-backend", "file", "--request-plane", "tcp", "--event-plane", "zmq")
        blocks = ("--block-size", str(BLOCK_SIZE), "--num-gpu-blocks-override", str(KV_BLOCKS))
        mockers = ("--num-workers", str(INSTANCES), "--speedup-ratio", "1000000", *blocks)
        names = ("--model-path", str(model), "--model-name", "demo")
        self._spawn(self._python, "-m", "dynamo.mocker", *names, *mockers, *planes, **variables)
        mode = ("--router-mode", "kv", "--kv-cache-block-size", str(BLOCK_SIZE), "--http-port", str(self._port))
        self.router = self._spawn(self._python, "-m", "dynamo.frontend", *mode, *planes, **variables)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
