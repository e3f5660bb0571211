"""A pool in a process of its own, asked by lines of JSON on its standard input. `Peer` is the test's end of it."""

import base64
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any


class Peer:
    """Keyword arguments are those of `Pool`; `environment` is added to the process's."""

    def __init__(self, *, environment: dict[str, str] | None = None, **options: Any) -> None:
        self.name = options.setdefault("name", "writer-1")
        self._process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **(environment or {})},
            text=True,
        )
        self.metadata = base64.b64decode(self._read())

    def ask(self, command: str, *args: Any, **named: Any) -> Any:
        """Call a method of `Asked`, and wait for what it returns."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([command, args, named]) + "\n")
        self._process.stdin.flush()
        return self._read()

    def stop(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """As `kill -9` does."""
        self._process.kill()
        self._process.communicate()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"{self.name} has ended"
        return json.loads(line)


class Asked:
    """In the process: its methods are the commands."""

    def __init__(self, options: dict[str, Any]) -> None:
        from pools import Pool

        self.pool = Pool(**options)

    def fill(self, seed: int) -> None:
        self.pool.fill(seed)

    def flood(self, value: float) -> None:
        """Every number of the pool."""
        self.pool.data[:] = value

    def pin(self, request_id: str, blocks: list[int], lease_s: float = 60.0) -> dict[str, Any]:
        return self.pool.transfer.exporter.pin(request_id, blocks, lease_s)

    def release(self, request_id: str) -> bool:
        return self.pool.transfer.exporter.release(request_id)

    def wait_freed(self, request_id: str) -> bool:
        return self.pool.wait_freed(request_id)

    def pinned(self) -> list[int]:
        return list(self.pool.transfer.metrics.pinned())

    def expired(self) -> int:
        return self.pool.transfer.metrics.expired

    def pull(self, peer: str, metadata: str, params: dict[str, Any], local: list[int]) -> None:
        """Begin a pull and return: nobody waits for it."""
        self.pool.transfer.add_peer(peer, base64.b64decode(metadata))
        self.pool.pull(params, local)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # NIXL and UCX print
    sys.path.insert(0, str(Path(__file__).parent))
    asked = Asked(json.loads(sys.argv[1]))
    print(json.dumps(base64.b64encode(asked.pool.transfer.metadata).decode()), file=answers)
    for line in sys.stdin:
        command, args, named = json.loads(line)
        print(json.dumps(getattr(asked, command)(*args, **named)), file=answers)
    asked.pool.close()


if __name__ == "__main__":
    main()
