"""`dynamo-llm up` with two real workers on the demo model: it serves, heals, drains, and leaves nothing."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dynamo_llm import process_tree

DEMO = Path(__file__).parents[2] / "model_repository" / "demo"
TOKEN = "DYNAMO_LLM_TEST_CLUSTER"
PATIENCE_S = 100

pytestmark = pytest.mark.timeout(300)


class Cluster:
    """A running `up`, what it has said, and all processes below it."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        command = [sys.executable, "-m", "dynamo_llm", "up", "--model", str(DEMO), "--workers", "2"]
        command += ["--http-port", "0", "--grpc-port", "0", "--engine-option", "kv_blocks=512"]
        environment = {**os.environ, "TMPDIR": folder, TOKEN: folder}
        environment.pop("DYNAMO_LLM_REDIS", None)
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        assert self.process.stdout is not None
        self.told: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self.ready_line = self.process.stdout.readline()
        self.base = self.ready_line.split()[1] if self.ready_line else ""
        self.pids: set[int] = set()
        self.regions: set[str] = set()
        self.look()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.told.append(line.rstrip())

    def look(self) -> None:
        """Remember every process and region that is there now."""
        self.pids |= _family(self.process.pid, self.folder)
        self.regions |= process_tree.shm_regions(self.pids)

    def wait(self) -> int:
        """For the end of `up`: its exit code."""
        code = self.process.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()
        return code

    def left(self) -> list[str]:
        """What it has not removed."""
        pids = [pid for pid in self.pids | _family(0, self.folder) if _alive(pid)]
        processes = [f"{pid}: {_read(f'/proc/{pid}/cmdline')}" for pid in pids]
        regions = [region for region in self.regions if os.path.exists(region)]
        return [*processes, *regions, *os.listdir(self.folder)]

    def workers(self) -> dict[str, int]:
        """The pid of each worker, as the last `ready` line of it says."""
        found = (re.search(r"(worker-\d) ready \(pid (\d+)\)", line) for line in self.told)
        return {match[1]: int(match[2]) for match in found if match}

    def ask(self, **options: Any) -> Any:
        body = {"model": "demo", "messages": [{"role": "user", "content": "What is 12 + 30?"}], "temperature": 0}
        request = urllib.request.Request(
            f"{self.base}/v1/chat/completions",
            json.dumps({**body, **options}).encode(),
            {"content-type": "application/json"},
        )
        return urllib.request.urlopen(request, timeout=60)

    def answer(self) -> str:
        with self.ask() as response:
            content: str = json.load(response)["choices"][0]["message"]["content"]
            return content

    def status(self) -> dict[str, Any]:
        command = [sys.executable, "-m", "dynamo_llm", "status", "--json", "--url", self.base]
        document: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        return document


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _alive(pid: int) -> bool:
    return bool(status := _read(f"/proc/{pid}/status")) and "\nState:\tZ" not in status


def _family(root: int, token: str) -> set[int]:
    """`root` and all below it, and every process that inherited the token, wherever it hangs now."""
    parents, family = {}, {root} - {0}
    for name in os.listdir("/proc"):
        if name.isdigit() and (stat := _read(f"/proc/{name}/stat")):
            parents[int(name)] = int(stat.rpartition(")")[2].split()[1])
            if f"{TOKEN}={token}" in _read(f"/proc/{name}/environ"):
                family.add(int(name))
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    return family


def _until(condition: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.05)


@contextmanager
def _cluster() -> Iterator[Cluster]:
    folder = tempfile.mkdtemp(prefix="t", dir="/tmp")  # short, as the paths of unix sockets have to be
    cluster = Cluster(folder)
    try:
        yield cluster
    finally:
        cluster.look()
        for pid in cluster.pids:
            if _alive(pid):
                os.kill(pid, signal.SIGKILL)
        cluster.wait()
        shutil.rmtree(folder, ignore_errors=True)


def test_a_cluster_serves_heals_and_leaves_nothing() -> None:
    """Ready means served; a worker killed with -9 is named and replaced; SIGTERM drains, exits 0 and leaves nothing."""
    with _cluster() as cluster:
        assert re.fullmatch(r"ready http://127\.0\.0\.1:\d+\n", cluster.ready_line), cluster.told
        assert cluster.answer().strip() == "12 + 30 = 42."
        before = {instance["instance"] for instance in cluster.status()["instances"]}
        assert len(before) == 2

        killed = cluster.workers()["worker-1"]
        os.kill(killed, signal.SIGKILL)
        _until(lambda: cluster.workers()["worker-1"] != killed, "worker-1 did not come back")
        died = next(line for line in cluster.told if "worker-1 died" in line)
        assert f"(pid {killed}): killed by SIGKILL" in died

        def is_healed() -> bool:
            ready = {i["instance"] for i in cluster.status()["instances"] if i["ready"]}
            return len(ready) == 2 and ready != before

        _until(is_healed, "the router did not find the new worker")
        assert cluster.answer().strip() == "12 + 30 = 42."
        cluster.look()

        # The stream is in flight when the signal comes, and is answered to its end.
        with cluster.ask(stream=True, max_tokens=300, ignore_eos=True) as response:
            first = response.readline()
            cluster.process.send_signal(signal.SIGTERM)
            rest = response.read()
        assert first.startswith(b"data: ")
        assert rest.endswith(b"data: [DONE]\n\n")
        assert cluster.wait() == 0
        assert cluster.left() == []


def test_a_cluster_whose_supervisor_is_killed_leaves_nothing() -> None:
    """kill -9 of `up` itself: workers, Triton servers, Redis, sockets and shared memory go all the same."""
    with _cluster() as cluster:
        assert cluster.base, cluster.told
        os.kill(cluster.process.pid, signal.SIGKILL)
        cluster.wait()
        _until(lambda: not cluster.left(), "something was left")


def test_a_stop_while_it_starts_is_orderly_too() -> None:
    """SIGINT before anything is ready: exit code 0, no ready line, and nothing is left."""
    folder = tempfile.mkdtemp(prefix="t", dir="/tmp")
    try:
        command = [
            sys.executable,
            "-m",
            "dynamo_llm",
            "up",
            "--model",
            str(DEMO),
            "--http-port",
            "0",
            "--grpc-port",
            "0",
        ]
        environment = {**os.environ, "TMPDIR": folder, TOKEN: folder}
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            line = process.stderr.readline()
            assert "starting" in line
            pids = _family(process.pid, folder)
            process.send_signal(signal.SIGINT)
            assert process.stdout.read() == ""
            process.stderr.read()
        assert process.returncode == 0
        assert [pid for pid in pids | _family(0, folder) if _alive(pid)] == []
        assert os.listdir(folder) == []
    finally:
        shutil.rmtree(folder, ignore_errors=True)
