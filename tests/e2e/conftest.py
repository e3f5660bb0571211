"""A whole cluster as a user starts it, by `dynamo-llm up`: real Redis, Triton servers, torch engine and demo model."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

DEMO = Path(__file__).parents[2] / "model_repository" / "demo"


class Cluster:
    """A running `dynamo-llm up`."""

    def __init__(self, *arguments: str) -> None:
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
        self.process = subprocess.Popen(
            [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        self.log: list[str] = []
        self._reader = threading.Thread(target=self._read_log)
        self._reader.start()
        words = self.process.stdout.readline().split()
        if words[:1] != ["ready"]:
            self.stop()
            pytest.fail("the cluster did not start:\n" + "\n".join(self.log))
        self.base = words[1]

    @property
    def grpc_address(self) -> str:
        return self.status()["grpc_address"]

    def status(self) -> dict[str, Any]:
        """The router's own view."""
        with urllib.request.urlopen(f"{self.base}/status", timeout=10) as response:
            return json.load(response)

    def instances(self) -> list[dict[str, Any]]:
        return self.status()["instances"]

    def wait(self, condition: Callable[[dict[str, Any]], Any], timeout_s: float = 30.0) -> dict[str, Any]:
        """Poll the status until the condition holds, also while the router is away; returns that status."""
        deadline_s, status = time.monotonic() + timeout_s, None
        while time.monotonic() < deadline_s:
            try:
                status = self.status()
                if condition(status):
                    return status
            except OSError:
                status = None
            time.sleep(0.02)
        pytest.fail(f"not within {timeout_s:g} s; last status {json.dumps(status)}\n" + "\n".join(self.log[-30:]))

    def pid_of(self, name: str) -> int:
        """Process id of a part, as the supervisor told it: `router`, `redis`, `worker-1` …"""
        told = [line for line in self.log if f"] {name} starting (pid " in line]
        return int(told[-1].rpartition("(pid ")[2].rstrip(")"))

    def stop(self) -> int:
        """SIGTERM, and its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)
            self._reader.join(10)
            self.process.stdout.close()
            self.process.stderr.close()

    def _read_log(self) -> None:
        for line in self.process.stderr:
            self.log.append(line.rstrip())


@pytest.fixture(scope="session")
def start_cluster() -> Iterator[Callable[..., Cluster]]:
    """Starts a cluster with these arguments; every one is stopped at the end and must have exited with 0."""
    started: list[Cluster] = []

    def start(*arguments: str) -> Cluster:
        started.append(Cluster(*arguments))
        return started[-1]

    yield start
    codes = [cluster.stop() for cluster in started]
    assert codes == [0] * len(started)


@pytest.fixture(scope="session")
def cluster(start_cluster: Callable[..., Cluster]) -> Cluster:
    """Two workers behind a KV-aware router, for all tests that leave it as they found it."""
    return start_cluster("--mode", "agg-router", "--workers", "2")


@pytest.fixture(scope="session", autouse=True)
def no_proxy() -> Iterator[None]:
    """A proxy of the environment is for the world outside."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "127.0.0.1")
        yield
