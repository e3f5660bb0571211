"""Finds and ends all processes that a child left behind, with their shared memory. Linux, standard library only.

A Triton server outlives the process that started it: killed with -9, a worker leaves its tritonserver, stubs and
helpers running, on their ports, with their regions in /dev/shm. Process groups do not hold them all (a helper may open
a session of its own), but an environment variable is inherited by every one: the *mark*. The supervisor gives each
child one.

Run as a script this file is the supervisor's *guard*: a small process that waits for the supervisor's end of a pipe to
close and then removes what the supervisor no longer can, because it was itself killed with -9.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

MARK_VARIABLE = "DYNAMO_LLM_PROCESS"
"""Holds `RUN/CHILD/START`, and what a child starts may add to it: a mark stands for all values below it, too."""
_SHM = "/dev/shm/"
_ALL_WELL = b"done"
_KILL_ROUNDS = 50


def members(mark: str, group: int = 0) -> list[int]:
    """Pids of the living processes (zombies are not) that carry `mark` or are of the process group, this one excepted.

    A process that writes a title of its own over its environment is only to be found by its group.
    """
    return [pid for pid in _pids() if _carries(pid, mark) or (group and _group_of(pid) == group)]


def _carries(pid: int, mark: str) -> bool:
    needle = f"\0{MARK_VARIABLE}={mark}".encode()
    try:
        environ = b"\0" + Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # gone in the meantime, or another user's
        return False
    at = environ.find(needle)
    return at >= 0 and (mark.endswith("/") or environ[at + len(needle) : at + len(needle) + 1] in (b"\0", b"", b"/"))


def _group_of(pid: int) -> int:
    """0 for a zombie."""
    try:
        state, _, group = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[:3]
    except OSError:
        return 0
    return 0 if state == "Z" else int(group)


def shm_regions(pids: Iterable[int]) -> set[str]:
    """Paths in /dev/shm that these processes map. Processes that are gone are passed over."""
    regions: set[str] = set()
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines()
        except OSError:
            continue
        regions.update(line[line.index(_SHM) :] for line in lines if _SHM in line and not line.endswith("(deleted)"))
    return regions


def reap(mark: str, regions: Iterable[str] = (), grace_s: float = 0.0, group: int = 0) -> list[int]:
    """Kill all `members` and unlink their shared memory; returns the pids that were killed.

    They have `grace_s` to end by themselves first. `regions` are further paths in /dev/shm that belonged to them. What
    any other process maps stays: a client's region that was registered with a Triton server is the client's. Blocks.
    """
    deadline_s = time.monotonic() + grace_s
    while time.monotonic() < deadline_s and members(mark, group):
        time.sleep(0.05)
    killed: set[int] = set()
    owned = set(regions)
    for _ in range(_KILL_ROUNDS):  # until nobody is left, as one may fork while we look
        pids = members(mark, group)
        if not pids:
            break
        owned |= shm_regions(pids)
        killed.update(pids)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    owned = {path for path in owned if os.path.exists(path)}
    if owned:
        for path in owned - shm_regions(_pids()):
            with contextlib.suppress(OSError):
                os.unlink(path)
    return sorted(killed)


def _pids() -> list[int]:
    me = os.getpid()
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != me]


class Guard:
    """The supervisor's hold on its guard process: `release()` at an orderly end, nothing at a sudden one."""

    def __init__(self, mark: str, scratch: str, group: int = 0) -> None:
        """`mark`, `group`: whom to kill; `scratch`: a folder to delete, if any. The guard itself has no mark."""
        environment = {name: value for name, value in os.environ.items() if name != MARK_VARIABLE}
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, mark, scratch, str(group)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # a signal to the supervisor's group does not reach it
            env=environment,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def release(self) -> None:
        """Tell the guard that there is nothing left to do, and wait for it to go."""
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate(_ALL_WELL, timeout=10)


def own_mark() -> str:
    """What tells this process' descendants from others; a supervisor's mark serves as well."""
    return os.environ.setdefault(MARK_VARIABLE, f"worker-{uuid.uuid4().hex}")


@contextlib.contextmanager
def no_leftovers(scratch: str) -> Iterator[None]:
    """Whatever carries our mark ends with us, be it in order or by kill -9; then, `scratch` is deleted, too."""
    guard = Guard(own_mark(), scratch)
    try:
        yield
    finally:
        reap(own_mark(), grace_s=1.0)
        guard.release()


def _stand_guard(mark: str, scratch: str, group: int) -> None:
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, signal.SIG_IGN)
    if sys.stdin.buffer.read() != _ALL_WELL:
        reap(mark, group=group)
        if scratch:
            shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    _stand_guard(sys.argv[1], sys.argv[2], int(sys.argv[3]))
