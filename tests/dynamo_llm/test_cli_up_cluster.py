"""`dynamo-llm up` with two real workers on the demo model: it serves, heals, drains, and leaves nothing."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from up_process import Up

from dynamo_llm import process_tree

TOKEN = "DYNAMO_LLM_TEST_CLUSTER"
PATIENCE_S = 100

pytestmark = pytest.mark.timeout(300)


class Cluster(Up):
    """A running `up`, and all processes below it."""

    def __init__(self, folder: str) -> None:
        arguments = ("--workers", "2", "--engine-option", "kv_blocks=512")
        super().__init__(*arguments, environment={"TMPDIR": folder, TOKEN: folder, "DYNAMO_LLM_REDIS": ""})
        self.folder = folder
        self.pids: set[int] = set()
        self.regions: set[str] = set()

    def look(self) -> None:
        """Remember every process and region that is there now."""
        self.pids |= _family(self.process.pid, self.folder)
        self.regions |= process_tree.shm_regions(self.pids)

    def left(self) -> list[str]:
        """What it has not removed."""
        pids = [pid for pid in self.pids | _family(0, self.folder) if _alive(pid)]
        processes = [f"{pid}: {_read(f'/proc/{pid}/cmdline')}" for pid in pids]
        regions = [region for region in self.regions if os.path.exists(region)]
        return [*processes, *regions, *os.listdir(self.folder)]

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
        cluster.wait(PATIENCE_S)
        shutil.rmtree(folder, ignore_errors=True)


def test_a_cluster_serves_heals_and_leaves_nothing() -> None:
    """Ready means served; a worker killed with -9 is named and replaced; SIGTERM drains, exits 0 and leaves nothing."""
    with _cluster() as cluster:
        assert re.fullmatch(r"ready http://127\.0\.0\.1:\d+\n", cluster.read_ready_line()), cluster.log
        assert cluster.answer().strip() == "12 + 30 = 42."
        before = {instance["instance"] for instance in cluster.status()["instances"]}
        assert len(before) == 2

        killed = cluster.pid_of("worker-1", "ready")
        os.kill(killed, signal.SIGKILL)
        _until(lambda: cluster.pid_of("worker-1", "ready") != killed, "worker-1 did not come back")
        died = next(line for line in cluster.log if "worker-1 died" in line)
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
        assert cluster.wait(PATIENCE_S) == 0
        assert cluster.left() == []


def test_a_cluster_whose_supervisor_is_killed_leaves_nothing() -> None:
    """kill -9 of `up` itself: workers, Triton servers, Redis, sockets and shared memory go all the same."""
    with _cluster() as cluster:
        assert cluster.read_ready_line(), cluster.log
        cluster.look()
        os.kill(cluster.process.pid, signal.SIGKILL)
        cluster.wait(PATIENCE_S)
        _until(lambda: not cluster.left(), "something was left")


def test_a_stop_while_it_starts_is_orderly_too() -> None:
    """SIGINT before anything is ready: exit code 0, no ready line, and nothing is left."""
    with _cluster() as cluster:
        _until(lambda: "starting" in "".join(cluster.log), "it does not start")
        cluster.look()
        cluster.process.send_signal(signal.SIGINT)
        assert cluster.read_ready_line() == ""
        assert cluster.wait(PATIENCE_S) == 0
        assert cluster.left() == []
