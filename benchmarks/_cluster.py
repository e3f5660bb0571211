"""Starts `dynamo-llm up` for a benchmark and stops it afterwards."""

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ["no_proxy"] = "127.0.0.1"  # a proxy of the environment is for the world outside
MODEL = Path(__file__).parents[1] / "model_repository" / "demo"


@contextmanager
def cluster(*arguments: str) -> Iterator[str]:
    """A cluster with the demo model on free ports; yields the router's base URL."""
    command = [sys.executable, "-m", "dynamo_llm", "up", "--model", str(MODEL), "--http-port", "0", "--grpc-port", "0"]
    process = subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, text=True)
    try:
        words = process.stdout.readline().split()
        if words[:1] != ["ready"]:
            raise SystemExit("the cluster did not start")
        yield words[1]
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()  # its guard ends what it had started


def status(base: str) -> dict[str, Any]:
    """The router's own view."""
    with urllib.request.urlopen(f"{base}/status", timeout=10) as response:
        return json.load(response)
