"""Starts the servers that hosts.py measures, and reads the CPU time of their processes."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from _cluster import MODEL

HERE = Path(__file__).parent
ENGINE_OPTIONS = {"block_size": 64, "kv_blocks": 65536, "max_context": 1 << 20, "prefill_ms": [0, 0, 0]}
_TICKS = os.sysconf("SC_CLK_TCK")


TRITON = ["tritonserver", "--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]


def mock_options(step_ms: float) -> dict[str, Any]:
    """0: steps follow each other at once."""
    return {**ENGINE_OPTIONS, "decode_ms": [step_ms, 0, 0], "speed_up": 1 if step_ms else "inf"}


def worker_command(redis: str, folder: Path, step_ms: float) -> list[str]:
    options = [f"--engine-option={name}={json.dumps(value)}" for name, value in mock_options(step_ms).items()]
    return ["worker", "--model", str(MODEL), "--engine", "mock", "--redis", redis, *options]


def triton_command(redis: str, folder: Path, step_ms: float) -> list[str]:
    """A repository with one entry, which is all that a model needs."""
    entry = folder / "repository" / "demo"
    (entry / "1").mkdir(parents=True)
    (entry / "config.pbtxt").write_text('backend: "dynamo_llm"\n')
    options = mock_options(step_ms)
    settings = {"model": str(MODEL / "1" / "model"), "engine": "mock", "redis": redis, "engine_options": options}
    (entry / "1" / "model.json").write_text(json.dumps(settings))
    return [*TRITON, "--model-repository", str(entry.parent)]


def raw_command(redis: str, folder: Path, step_ms: float) -> list[str]:
    """Its requests say how long a step is."""
    return [*TRITON, "--model-repository", str(HERE / "raw_repository")]


COMMANDS = {"pytriton": worker_command, "tritonserver": triton_command, "raw": raw_command}


@contextmanager
def started(host: str, redis: str, step_ms: float) -> Iterator[tuple[int, dict[str, str]]]:
    """A running host: its process, and the fields of its ready line."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as log:
        command = [sys.executable, "-m", "dynamo_llm", *COMMANDS[host](redis, Path(folder), step_ms)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            words = process.stdout.readline().split()
            if words[:1] != ["ready"]:
                log.seek(0)
                raise SystemExit(f"{host} did not start: {log.read().strip()}")
            yield process.pid, dict(word.split("=", 1) for word in words if "=" in word)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def cpu_s(root: int, engine: int) -> Counter[str]:
    """CPU seconds so far of the host's processes, by what they are for; `engine` is the process of the engine."""
    parents, used, programs = {}, {}, {}
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            fields = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
            programs[int(name)] = Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0")[0].decode()
        except OSError:
            continue
        parents[int(name)], used[int(name)] = int(fields[1]), (int(fields[11]) + int(fields[12])) / _TICKS
    family = {root}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    seconds: Counter[str] = Counter()
    for pid in family & used.keys():
        seconds[role(pid, engine, Path(programs[pid]).name)] += used[pid]
    seconds["client"] = time.process_time()
    return seconds


def role(pid: int, engine: int, program: str) -> str:
    if pid == engine:
        return "engine"
    return {"tritonserver": "server", "triton_python_backend_stub": "stubs"}.get(program, "helpers")
