"""Keeps child processes running: starts them, names the one that dies, restarts it with back-off, leaves nothing over.

`cli/up.py` is the caller. What to do when is `lifecycle.Lifecycle`'s to say; `Child` does the I/O of one process;
`Supervisor` owns the children and their tasks. A child says that it is ready by a line on its stdout that begins with
`ready`.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import IO, Literal

from dynamo_llm import process_tree
from dynamo_llm.child_io import LineHandler, Lines, exit_of, is_chatter, without_own_words
from dynamo_llm.lifecycle import Lifecycle, RestartPolicy

READY = "ready"
REFUSED = 2
"""Exit code of a child that cannot be started with these arguments; the command line's own."""
_LEFTOVER_GRACE_S = 1.0
"""What a child left behind gets this long to end by itself: a resource tracker unlinks what it knows of then."""


@dataclass(frozen=True)
class ChildSpec:
    """What to run."""

    name: str
    """Shown before each of its lines: `worker-1`."""
    argv: list[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    """On top of the supervisor's own."""
    start_timeout_s: float = 300.0
    """A child that is not ready by then is killed, which counts as a failure."""


@dataclass(frozen=True)
class Event:
    """Something to tell the user about a child."""

    child: str
    kind: Literal["starting", "ready", "died", "failed", "stopping", "stopped", "line", "chatter"]
    """`line` and `chatter` are what it wrote; a line that its logger marks as information is chatter."""
    text: str = ""
    pid: int = 0


class ChildFailed(Exception):
    """A child failed so often at its start that it was given up. The message is one line with the last reason."""


class ChildRefused(ChildFailed):
    """A child cannot be started as it was told to: it ended with exit code `REFUSED`, and trying again is no use."""


class Child:
    """One supervised process and, through its mark, everything that it started."""

    def __init__(
        self, spec: ChildSpec, run: str, scratch: str, notify: Callable[[Event], None], policy: RestartPolicy
    ) -> None:
        self.spec = spec
        self.life = Lifecycle(policy)
        self.ready_line = ""
        """What it printed on stdout when it became ready last."""
        self.reason = ""
        """Why it ended last: `exit code 1: ModuleNotFoundError: …`."""
        self.became_ready = asyncio.Event()
        self._notify = notify
        self._run = run
        self._scratch = scratch
        self._mark = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._last_line = ""
        self._returncode = 0
        self._shm: set[str] = set()
        self._grace_s = _LEFTOVER_GRACE_S

    @property
    def pid(self) -> int:
        """Of its last life; 0 between two of them."""
        return self._process.pid if self._process else 0

    async def keep(self) -> None:
        """Run, and run again after each end, until it is stopped or given up (`ChildFailed`)."""
        while True:
            await self._run_once()
            refused = self._returncode == REFUSED
            delay_s = self.life.exited(time.monotonic(), refused=refused)
            if self.life.state == "stopped":
                return self._tell("stopped", self.reason)
            if delay_s is None:
                self._tell("failed", self.reason)
                if refused:
                    raise ChildRefused(f"{self.spec.name} cannot start: {without_own_words(self._last_line)}")
                raise ChildFailed(f"{self.spec.name} failed {self.life.failures} times at its start: {self.reason}")
            self._tell("died", f"{self.reason}; starts again in {delay_s:g} s")
            self._process = None
            await asyncio.sleep(delay_s)

    def stop(self) -> None:
        """Ask it to end in order (SIGTERM). Does nothing where it does not run."""
        if self.life.state in ("starting", "ready"):
            self.life.stopping()
            self._tell("stopping")
            self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it at once, with all that it started."""
        self.life.stopping()
        self._grace_s = 0.0
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)  # nothing once it has been waited for: its pid may be another's by then

    def _tell(self, kind: str, text: str = "") -> None:
        self._notify(Event(self.spec.name, kind, text, self.pid))  # type: ignore[arg-type]

    async def _run_once(self) -> None:
        """One life of the process: returns when it and all that it started are gone. Cancelling it kills them."""
        self.life.started()
        self._last_line, self._shm = "", set()
        self._mark = f"{self._run}/{self.spec.name}/{self.life.starts}"
        scratch = os.path.join(self._scratch, self.spec.name)  # short, as the paths of unix sockets have to be
        os.makedirs(scratch, exist_ok=True)
        try:
            await self._attend(self._spawn(scratch))
        except OSError as error:
            self._returncode = 1
            self.reason = f"cannot start {self.spec.argv[0]}: {error.strerror}"
        finally:
            process_tree.reap(self._mark, self._shm)
            shutil.rmtree(scratch, ignore_errors=True)

    def _spawn(self, scratch: str) -> "subprocess.Popen[bytes]":
        # Not asyncio's own: some of its versions wait for the pipes too, which a dead child's leftovers hold open.
        process = self._process = subprocess.Popen(
            self.spec.argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C in the terminal is for the supervisor to pass on, in its order
            env={**os.environ, "TMPDIR": scratch, **self.spec.environment, process_tree.MARK_VARIABLE: self._mark},
        )
        self._tell("starting")
        return process

    async def _attend(self, process: "subprocess.Popen[bytes]") -> None:
        deadline = asyncio.get_running_loop().call_later(self.spec.start_timeout_s, self._start_timed_out)
        async with contextlib.AsyncExitStack() as pipes:
            await self._read(pipes, process.stdout, self._on_stdout)
            await self._read(pipes, process.stderr, self._on_line)
            try:
                await exit_of(process)
            finally:
                deadline.cancel()
                process.kill()  # nothing where it has ended
                process.wait()
                self.became_ready.clear()
            await asyncio.to_thread(process_tree.reap, self._mark, self._shm, self._grace_s)
        self._returncode = process.returncode
        self.reason = _describe(process.returncode, self._last_line)

    async def _read(self, pipes: contextlib.AsyncExitStack, pipe: IO[bytes] | None, handle: LineHandler) -> None:
        loop = asyncio.get_running_loop()
        transport, protocol = await loop.connect_read_pipe(lambda: Lines(handle), pipe)

        async def close() -> None:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(protocol.closed, 1.0)
            transport.close()

        pipes.push_async_callback(close)

    def _on_stdout(self, line: str) -> None:
        if line.split(" ", 1)[0] == READY and self.life.state == "starting":
            self.life.ready(time.monotonic())
            self.ready_line = line
            self._shm = process_tree.shm_regions(process_tree.members(self._mark))
            self.became_ready.set()
            self._tell("ready", line)
        else:
            self._tell("chatter", line)

    def _on_line(self, line: str) -> None:
        if is_chatter(line):
            self._tell("chatter", line)
        else:
            self._last_line = line
            self._tell("line", line)

    def _start_timed_out(self) -> None:
        if self.life.state == "starting":
            self._last_line = f"not ready within {self.spec.start_timeout_s:g} s"
            self._signal(signal.SIGKILL)


def _describe(returncode: int, last_line: str) -> str:
    if returncode == 0:
        return "exit code 0"  # what it wrote last is no reason then
    text = f"exit code {returncode}"
    if returncode < 0:
        with contextlib.suppress(ValueError):
            text = f"killed by {signal.Signals(-returncode).name}"
    return f"{text}: {last_line}" if last_line else text


class Supervisor:
    """Owns the children. Use it as `async with`: on the way out everything that still runs is killed."""

    def __init__(self, notify: Callable[[Event], None], scratch: str, policy: RestartPolicy | None = None) -> None:
        """`scratch`: a folder for the children's temporary files; the guard deletes it where the supervisor cannot."""
        self._notify = notify
        self._scratch = scratch
        self._policy = policy or RestartPolicy()
        self._run = uuid.uuid4().hex
        self._children: dict[str, Child] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._guard: process_tree.Guard | None = None

    async def __aenter__(self) -> "Supervisor":
        self._guard = process_tree.Guard(f"{self._run}/", self._scratch)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.kill()
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        if self._guard is not None:
            self._guard.release()

    @property
    def guard_pid(self) -> int:
        return self._guard.pid if self._guard else 0

    def start(self, spec: ChildSpec) -> Child:
        """Start a child and keep it running from now on."""
        child = Child(spec, self._run, self._scratch, self._notify, self._policy)
        self._children[spec.name] = child
        self._tasks[spec.name] = asyncio.create_task(child.keep(), name=spec.name)
        return child

    async def wait(self) -> None:
        """Until all children have been stopped. Raises `ChildFailed` as soon as one is given up."""
        ended, _ = await asyncio.wait(self._tasks.values(), return_when=asyncio.FIRST_EXCEPTION)
        for task in ended:
            if not task.cancelled():
                task.result()

    async def stop(self, names: list[str], timeout_s: float) -> None:
        """End these children in order, all at the same time; kill what still runs after `timeout_s`."""
        for name in names:
            if not self._end_waiting(name):
                self._children[name].stop()
        if not names:
            return
        _, late = await asyncio.wait([self._tasks[name] for name in names], timeout=timeout_s)
        if late:
            self.kill(names)
            await asyncio.wait(late)

    def kill(self, names: Iterable[str] | None = None) -> None:
        """End these children at once; without names, all."""
        for name in list(self._tasks) if names is None else names:
            if not self._end_waiting(name) and not self._tasks[name].done():
                self._children[name].kill()

    def _end_waiting(self, name: str) -> bool:
        """Whether a child waits for its start; if so, there will be none."""
        waiting = self._children[name].life.state in ("idle", "waiting")
        if waiting:
            self._tasks[name].cancel()
        return waiting
