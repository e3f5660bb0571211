"""`dynamo-llm up` on the demo model as a user starts it, for the tests of the command line and of whole clusters."""

import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

DEMO = Path(__file__).parents[1] / "model_repository" / "demo"


class Up:
    """The process, on free ports and in a session of its own, and what it has said on stderr."""

    def __init__(self, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
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
            [*command, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, **(environment or {})},
        )
        self.log: list[str] = []
        self.base = ""
        """The router's address, from the ready line on."""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def read_ready_line(self) -> str:
        """Waits for it; empty if the process ends without one."""
        line = self.process.stdout.readline()
        self.base = line.split()[1] if line.startswith("ready ") else ""
        return line

    def pid_of(self, name: str, event: str = "starting") -> int:
        """Process id of a part, as it was last told with `starting` or `ready`: `router`, `redis`, `worker-1` …"""
        told = [line for line in self.log if f"] {name} {event} (pid " in line]
        return int(told[-1].rpartition("(pid ")[2].rstrip(")"))

    def wait(self, timeout_s: float) -> int:
        """For the end of the process: its exit code."""
        code = self.process.wait(timeout_s)
        self._reader.join(timeout_s)
        self.process.stdout.close()
        self.process.stderr.close()
        return code

    def _read(self) -> None:
        for line in self.process.stderr:
            self.log.append(line.rstrip())
