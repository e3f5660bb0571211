"""A whole cluster as a user starts it, by `dynamo-llm up`: real Redis, Triton servers, torch engine and demo model."""

import json
import os
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from up_process import Up


class Cluster(Up):
    """A running `dynamo-llm up`."""

    def __init__(self, *arguments: str) -> None:
        super().__init__(*arguments)
        if not self.read_ready_line():
            self.stop()
            pytest.fail("the cluster did not start:\n" + "\n".join(self.log))

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

    def stop(self) -> int:
        """SIGTERM, and its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return super().wait(60)
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)


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
