"""The supervisor over small real processes."""

import asyncio
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dynamo_llm import process_tree
from dynamo_llm.lifecycle import RestartPolicy
from dynamo_llm.supervisor import ChildFailed, ChildRefused, ChildSpec, Event, Supervisor

QUICK = RestartPolicy(first_delay_s=0.01, max_delay_s=0.05)

# Ready, with a helper in a session of its own, which maps a region of shared memory: what a Triton worker is made of.
WORKER = """
import mmap, os, signal, subprocess, sys, time
region = "/dev/shm/dynamo_llm_test_" + str(os.getpid())
helper = '''
import mmap, sys, time
with open(sys.argv[1], "wb+") as file:
    file.truncate(4096)
    held = mmap.mmap(file.fileno(), 4096)
print("mapped", flush=True)
time.sleep(600)
'''
child = subprocess.Popen([sys.executable, "-c", helper, region], stdout=subprocess.PIPE, start_new_session=True)
child.stdout.readline()

def leave(*_):
    child.kill(); child.wait(); os.unlink(region); sys.exit(0)

signal.signal(signal.SIGTERM, leave)
print("hello from", os.environ.get("GREETING"), file=sys.stderr, flush=True)
print("ready", region, child.pid, flush=True)
time.sleep(600)
"""


class Log:
    """What the supervisor told, and a way to wait for it."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._changed = asyncio.Event()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        self._changed.set()

    def of(self, kind: str, child: str = "") -> list[Event]:
        return [e for e in self.events if e.kind == kind and child in (e.child, "")]

    async def until(self, condition: Callable[[], bool]) -> None:
        async def wait() -> None:
            while not condition():
                self._changed.clear()
                await self._changed.wait()

        await asyncio.wait_for(wait(), 30)


@pytest.fixture
def log() -> Log:
    return Log()


def _alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def _spec(code: str, name: str = "worker-1", **more: object) -> ChildSpec:
    return ChildSpec(name, [sys.executable, "-c", code], **more)  # type: ignore[arg-type]


async def test_a_child_becomes_ready_and_is_stopped_in_order(log: Log, tmp_path: Path) -> None:
    """Starting, its own lines, ready and stopped are told; nothing of it is left."""
    async with Supervisor(log, str(tmp_path), QUICK) as supervisor:
        child = supervisor.start(_spec(WORKER, environment={"GREETING": "us"}))
        await asyncio.wait_for(child.became_ready.wait(), 30)
        region, helper = child.ready_line.split()[1:]
        await log.until(lambda: bool(log.of("line")))
        await supervisor.stop(["worker-1"], 30)
    assert [e.kind for e in log.events if e.kind != "line"] == ["starting", "ready", "stopping", "stopped"]
    assert log.of("line")[0].text == "hello from us"
    assert log.of("stopped")[0].text == "exit code 0"
    assert not _alive(int(helper))
    assert not os.path.exists(region)
    assert list(tmp_path.iterdir()) == []


async def test_a_killed_child_is_named_and_comes_back_without_its_leftovers(log: Log, tmp_path: Path) -> None:
    """kill -9: pid, signal and last line are told, its helper and shared memory go, a new one becomes ready."""
    async with Supervisor(log, str(tmp_path), QUICK) as supervisor:
        child = supervisor.start(_spec(WORKER))
        await log.until(lambda: len(log.of("ready")) == 1 and bool(log.of("line")))
        first, (region, helper) = child.pid, child.ready_line.split()[1:]
        os.kill(first, signal.SIGKILL)
        await log.until(lambda: len(log.of("ready")) == 2)
        died = log.of("died")[0]
        assert died.pid == first
        assert died.text.startswith("killed by SIGKILL: hello from")
        assert not _alive(int(helper))
        assert not os.path.exists(region)
        assert child.pid != first
        second_region, second_helper = child.ready_line.split()[1:]
    assert not _alive(int(second_helper))  # leaving the supervisor kills what still runs
    assert not os.path.exists(second_region)


async def test_a_child_that_cannot_start_is_given_up_with_its_reason(log: Log, tmp_path: Path) -> None:
    """The third failure in a row at the start ends the waiting, with the last line of stderr."""
    async with Supervisor(log, str(tmp_path), QUICK) as supervisor:
        supervisor.start(_spec("raise SystemExit('no such model')"))
        with pytest.raises(ChildFailed, match=r"worker-1 failed 3 times at its start: exit code 1: no such model"):
            await asyncio.wait_for(supervisor.wait(), 30)
    assert len(log.of("starting")) == 3


async def test_a_child_that_refuses_its_arguments_is_given_up_at_once(log: Log, tmp_path: Path) -> None:
    """Exit code 2 before it was ever ready: the reason is its last line, and nothing is tried again."""
    async with Supervisor(log, str(tmp_path), QUICK) as supervisor:
        supervisor.start(
            _spec("import sys; print('dynamo-llm worker: cannot start: no such option', file=sys.stderr); sys.exit(2)")
        )
        with pytest.raises(ChildRefused, match=r"^worker-1 cannot start: no such option$"):
            await asyncio.wait_for(supervisor.wait(), 30)
    assert len(log.of("starting")) == 1


async def test_a_program_that_is_not_there_is_a_failure_like_any_other(log: Log, tmp_path: Path) -> None:
    """A missing program is named."""
    async with Supervisor(log, str(tmp_path), QUICK) as supervisor:
        supervisor.start(ChildSpec("router", ["/nowhere/python"]))
        with pytest.raises(ChildFailed, match="cannot start /nowhere/python: No such file"):
            await asyncio.wait_for(supervisor.wait(), 30)


async def test_a_child_that_never_becomes_ready_is_killed(log: Log, tmp_path: Path) -> None:
    """A start that hangs is a failure once its time is over."""
    async with Supervisor(log, str(tmp_path), RestartPolicy(start_attempts=1)) as supervisor:
        supervisor.start(_spec("import time; time.sleep(600)", start_timeout_s=0.2))
        with pytest.raises(ChildFailed, match=r"killed by SIGKILL: not ready within 0.2 s"):
            await asyncio.wait_for(supervisor.wait(), 30)


async def test_a_child_that_ignores_the_stop_is_killed(log: Log, tmp_path: Path) -> None:
    """After the time for draining the child is killed, and that is not a failure."""
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print('ready', flush=True); time.sleep(600)"
    async with Supervisor(log, str(tmp_path), QUICK) as supervisor:
        child = supervisor.start(_spec(code))
        await asyncio.wait_for(child.became_ready.wait(), 30)
        await supervisor.stop(["worker-1"], 0.1)
        assert child.life.state == "stopped"
    assert log.of("stopped")[0].text == "killed by SIGKILL"


async def test_stopping_between_two_starts_ends_the_waiting(log: Log, tmp_path: Path) -> None:
    """A child that waits for its next start does not start again after a stop."""
    async with Supervisor(log, str(tmp_path), RestartPolicy(first_delay_s=600, max_delay_s=600)) as supervisor:
        supervisor.start(_spec("raise SystemExit(1)"))
        await log.until(lambda: bool(log.of("died")))
        await asyncio.wait_for(supervisor.stop(["worker-1"], 30), 30)
    assert len(log.of("starting")) == 1


async def test_killing_between_two_starts_ends_the_waiting(log: Log, tmp_path: Path) -> None:
    """The same for an end at once: the orderly stop that is under way then need not wait for another life."""
    async with Supervisor(log, str(tmp_path), RestartPolicy(first_delay_s=600, max_delay_s=600)) as supervisor:
        supervisor.start(_spec("raise SystemExit(1)"))
        await log.until(lambda: bool(log.of("died")))
        supervisor.kill()
        await asyncio.wait_for(supervisor.wait(), 30)
    assert len(log.of("starting")) == 1


async def test_only_those_that_are_late_are_killed(log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pid of a child that has ended may be another process's by then: no signal goes there."""
    late = "import signal, time; signal.signal(15, signal.SIG_IGN); print('ready', flush=True); time.sleep(600)"
    prompt = "import time; print('ready', flush=True); time.sleep(600)"
    sent: list[int] = []
    kill = os.kill
    monkeypatch.setattr(os, "kill", lambda pid, number: (sent.append(pid), kill(pid, number))[1])
    async with Supervisor(log, str(tmp_path), QUICK) as supervisor:
        children = [supervisor.start(_spec(code, name)) for name, code in (("late", late), ("prompt", prompt))]
        for child in children:
            await asyncio.wait_for(child.became_ready.wait(), 30)
        stopping = asyncio.create_task(supervisor.stop(["late", "prompt"], 1.0))
        await log.until(lambda: bool(log.of("stopped", "prompt")))
        await stopping
        children[1].kill()
    assert sent.count(log.of("starting", "late")[0].pid) == 2
    assert sent.count(log.of("starting", "prompt")[0].pid) == 1


async def test_an_end_is_seen_without_pidfds(log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels before Linux 5.3 have none."""

    def no_pidfd(pid: int) -> int:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(os, "pidfd_open", no_pidfd)
    async with Supervisor(log, str(tmp_path), RestartPolicy(start_attempts=1)) as supervisor:
        supervisor.start(_spec("raise SystemExit('over')"))
        with pytest.raises(ChildFailed, match="exit code 1: over"):
            await asyncio.wait_for(supervisor.wait(), 30)


async def test_a_line_without_an_end_is_cut(log: Log, tmp_path: Path) -> None:
    """A child that writes a megabyte without a newline costs bounded memory and is shown in pieces."""
    code = "import sys; sys.stderr.write('x' * 1_000_000)"
    async with Supervisor(log, str(tmp_path), QUICK) as supervisor:
        supervisor.start(_spec(code))
        await log.until(lambda: bool(log.of("stopped") or log.of("died")))
    assert log.of("line")
    assert max(len(e.text) for e in log.of("line")) <= 8192


def test_a_supervisor_killed_at_once_leaves_nothing(tmp_path: Path) -> None:
    """kill -9 of the supervisor itself: its guard kills all children and helpers, and deletes what they left."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    program = f"""
import asyncio, sys
from dynamo_llm.supervisor import ChildSpec, Supervisor
async def main():
    async with Supervisor(lambda e: None, {str(scratch)!r}) as supervisor:
        child = supervisor.start(ChildSpec("worker-1", [sys.executable, "-c", {WORKER!r}]))
        await child.became_ready.wait()
        print(child.pid, supervisor.guard_pid, *child.ready_line.split()[1:], flush=True)
        await asyncio.sleep(600)
asyncio.run(main())
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout:
        child, guard, region, helper = process.stdout.readline().split()
    process.kill()
    process.wait()
    pids = [int(child), int(guard), int(helper)]
    deadline_s = time.monotonic() + 30
    while any(_alive(pid) for pid in pids) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    assert not [pid for pid in pids if _alive(pid)]
    assert not os.path.exists(region)
    assert not scratch.exists()


def test_what_another_process_maps_is_not_unlinked(tmp_path: Path) -> None:
    """A client's region that a worker had mapped too stays: it is the client's."""
    region = Path(f"/dev/shm/dynamo_llm_test_shared_{os.getpid()}")
    holder = (
        f"import mmap, time\nfile = open({str(region)!r}, 'rb+')\nheld = mmap.mmap(file.fileno(), 4096)\n"
        "print('mapped', flush=True)\ntime.sleep(600)"
    )
    region.write_bytes(bytes(4096))
    processes = []
    try:
        for mark in ("", "test-run/worker-1/1"):
            environment = {**os.environ, process_tree.MARK_VARIABLE: mark}
            process = subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE, env=environment)
            processes.append(process)
            assert process.stdout is not None
            with process.stdout:
                process.stdout.readline()
        assert process_tree.reap("test-run/") == [processes[1].pid]
        assert region.exists()
        assert processes[0].poll() is None
    finally:
        region.unlink(missing_ok=True)
        for process in processes:
            process.kill()
            process.wait()


def test_marks_are_told_apart() -> None:
    """The mark of start 1 is not that of start 11, and a prefix that ends in a slash finds both."""
    processes = []
    try:
        for mark in ("test-marks/w/1", "test-marks/w/11"):
            environment = {**os.environ, process_tree.MARK_VARIABLE: mark}
            command = [sys.executable, "-c", "print('up', flush=True); input()"]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
            processes.append(process)
            assert process.stdout is not None
            process.stdout.readline()
        assert process_tree.members("test-marks/w/1") == [processes[0].pid]
        assert sorted(process_tree.members("test-marks/")) == sorted(p.pid for p in processes)
    finally:
        for process in processes:
            process.communicate(b"\n")
