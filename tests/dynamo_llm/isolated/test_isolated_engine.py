"""An engine in a process of its own: what happens when that process, or the worker, goes wrong."""

import io
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from array import array
from pathlib import Path

import msgspec
import pytest
from engine_driver import Driver

from dynamo_llm.channel import Channel
from dynamo_llm.engines import create_engine
from dynamo_llm.engines.base import EngineError, EngineInfo, EngineRequest, StepResult
from dynamo_llm.engines.isolated import child, messages
from dynamo_llm.engines.isolated.engine import IsolatedEngine
from kvstore.wire import Load, Output, SamplingParams

MODEL = Path(__file__).parents[3] / "model_repository" / "demo" / "1" / "model"
LONG = SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True)
WAIT_S = 20.0
_FAKE = """
import os, socket, subprocess, sys, time
from dynamo_llm.engines.base import EngineInfo
from dynamo_llm.channel import Channel
from dynamo_llm.engines.isolated.messages import *
from kvstore.wire import Load
end = socket.socket(fileno=int(sys.argv[1]))
channel = Channel(end)
send = lambda report: channel.send(encode(report))
hello = lambda: (send(Hello(PROTOCOL, own_version())), channel.receive(decode_order))
info = EngineInfo(name="fake", version="1", model="demo", block_size=16, kv_blocks=8, max_context=512,
                  vocab_size=512, eos_token_ids=())
ready = lambda: (hello(), send(Ready(info, Load(kv_blocks_total=8))))
"""


def mock(**options):
    """A mock engine in a process of our own interpreter."""
    return create_engine("mock", MODEL, "demo", {"speed_up": 1, **options}, sys.executable)


@pytest.fixture
def fake(tmp_path):
    """Makes an engine whose process runs the given lines instead of the child's."""

    def make(code: str) -> IsolatedEngine:
        child, python = tmp_path / "child.py", tmp_path / "python"
        child.write_text(_FAKE + code)
        python.write_text(f'#!/bin/sh\nexec {sys.executable} {child} "$4"\n')  # after -I -m MODULE
        python.chmod(0o755)
        return IsolatedEngine("mock", MODEL, "demo", {}, str(python))

    return make


def assert_ends(pid: int) -> None:
    """The process is over within `WAIT_S`."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([handle], [], [], WAIT_S)[0], f"{pid} still runs"
    finally:
        os.close(handle)


def assert_all_failed(driver: Driver, keys, reason: str) -> None:
    for outputs in driver.finish(*keys):
        errors = [output.error for output in outputs if output.finish_reason]
        assert [error.code for error in errors] == ["engine_failure"]
        assert reason in errors[0].message
    told = driver.deaths.get(timeout=WAIT_S)
    assert reason in told
    assert "\n" not in told
    driver.engine.close()
    assert driver.deaths.empty()


def test_a_killed_process_fails_each_request_once():
    """With twenty in flight, some that decode and some that wait."""
    driver = Driver(mock())
    keys = range(1, 21)
    for key in keys:
        driver.submit(key, [5 + key] * 40, LONG)
    driver.wait(lambda: driver.outputs.get(1))
    os.kill(driver.engine.pid, signal.SIGKILL)
    assert_all_failed(driver, keys, "SIGKILL")
    assert driver.load.running == driver.load.waiting == 0


def test_garbage_fails_each_request_once_and_ends_the_process(fake):
    """Something that writes to the socket what is no message is not waited for."""
    driver = Driver(fake("ready(); channel.receive(decode_order); end.sendall(b'garbage!' * 9); time.sleep(600)"))
    driver.submit(1, [5, 6], LONG)
    assert_all_failed(driver, [1], "what is no message")
    assert_ends(driver.engine.pid)


def test_half_a_message_is_told_by_how_the_process_ended(fake):
    """And by its last line."""
    half = r"end.sendall(b'dyn\1\xff\0\0\0abc')"
    code = f"ready(); channel.receive(decode_order); {half}; print('out of luck'); sys.exit(7)"
    driver = Driver(fake(code))
    driver.submit(1, [5, 6], LONG)
    assert_all_failed(driver, [1], "ended with exit code 7; its last line: out of luck")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("end.sendall(b'hello, world'); time.sleep(600)", "what is no message"),
        ("print('no memory'); sys.exit(9)", "exit code 9; its last line: no memory before it was ready"),
        ("hello(); os.kill(os.getpid(), 11)", "SIGSEGV"),
        ("send(Hello(PROTOCOL + 1, '')); time.sleep(600)", "install the same version there"),
        ("hello(); send(Closed()); time.sleep(600)", "Closed instead of Ready"),
        ("hello(); send(Failed('no such model')); time.sleep(600)", "no such model"),
    ],
)
def test_a_start_that_fails_is_one_line(fake, code, message):
    """Whatever the process does before it is ready."""
    with pytest.raises(EngineError, match=message) as caught:
        fake(code)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("engine", ["mock", "torch"])
def test_the_engines_own_refusal_comes_through(engine):
    """As if it were made here."""
    with pytest.raises(EngineError) as here:
        create_engine(engine, MODEL, "demo", {"no_such_option": 1})
    with pytest.raises(EngineError) as there:
        create_engine(engine, MODEL, "demo", {"no_such_option": 1}, sys.executable)
    assert str(there.value) == str(here.value)


def test_close_ends_all_that_the_process_started(fake):
    """Also what left its group and would live on."""
    code = (
        "sleep = ['/bin/sleep', '600']\n"
        "pids = [subprocess.Popen(sleep, start_new_session=new).pid for new in (False, True)]\n"
        "hello(); send(Ready(EngineInfo(**{**{f: getattr(info, f) for f in info.__struct_fields__}, "
        "'version': ' '.join(map(str, pids))}), Load()))\n"
        "channel.receive(decode_order); send(Closed())"
    )
    engine = fake(code)
    pids = [int(pid) for pid in engine.info.version.split()]
    for pid in pids:
        os.kill(pid, 0)
    engine.close()
    engine.close()
    for pid in (engine.pid, *pids):
        assert_ends(pid)


def test_the_process_ends_with_its_worker():
    """One that is killed cannot close anything."""
    code = (
        "import sys, signal; from dynamo_llm.engines import create_engine\n"
        f"engine = create_engine('mock', {str(MODEL)!r}, 'demo', {{}}, sys.executable)\n"
        "print(engine.pid, flush=True); signal.pause()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as worker:
        pid = int(worker.stdout.readline())
        os.kill(pid, 0)
        worker.kill()
    assert_ends(pid)


def test_the_next_engine_follows_a_dead_one():
    """In the same process, without a rest of the last one."""
    first = Driver(mock())
    os.kill(first.engine.pid, signal.SIGKILL)
    assert "SIGKILL" in first.deaths.get(timeout=WAIT_S)
    first.engine.close()
    second = Driver(mock())
    second.submit(1, [5, 6, 7])
    second.finish(1)
    assert len(second.tokens(1)) == 4
    second.engine.close()
    assert second.deaths.empty()


def test_load_counts_what_the_process_has_not_taken_yet(fake):
    """A worker that is asked at once must not look idle."""
    engine = fake("ready(); time.sleep(600)")
    driver = Driver(engine)
    driver.submit(1, [5] * 40, LONG)
    assert (engine.load().waiting, engine.load().waiting_prefill_tokens) == (1, 40)
    os.kill(engine.pid, signal.SIGKILL)
    assert_all_failed(driver, [1], "SIGKILL")


def test_a_process_that_outlives_it_does_not_hide_its_end(fake):
    """One of the engine's own, which has inherited its socket and its output."""
    driver = Driver(fake("ready(); subprocess.Popen(['/bin/sleep', '600'], close_fds=False); time.sleep(600)"))
    driver.submit(1, [5, 6], LONG)
    os.kill(driver.engine.pid, signal.SIGKILL)
    assert_all_failed(driver, [1], "SIGKILL")


def test_requests_are_answered_before_the_process_is_gone(fake, monkeypatch):
    """Nobody waits for what cannot be killed: the answers come first, and `close` returns."""
    engine = fake("ready(); channel.receive(decode_order); send(Died('out of memory')); time.sleep(600)")
    driver = Driver(engine)
    ended = threading.Event()
    end = engine._process.end

    def slow(grace_s: float = 0.0) -> None:
        assert ended.wait(WAIT_S)
        assert grace_s == 0.0
        end()

    monkeypatch.setattr(engine._process, "end", slow)
    driver.submit(1, [5, 6], LONG)
    (outputs,) = driver.finish(1)
    assert outputs[-1].error.message == "out of memory"
    assert driver.deaths.empty()
    ended.set()
    assert driver.deaths.get(timeout=WAIT_S) == "out of memory"
    engine.close()


def test_a_log_that_is_gone_ends_nothing(fake, monkeypatch):
    """The engine is bound to the thread that started it, which must not die of a closed standard error."""

    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Gone())
    engine = fake("print('one\\ntwo', flush=True); ready(); channel.receive(decode_order); send(Closed())")
    engine.close()
    assert engine._process.last_words() == "; its last line: two"


class _Quick:
    """An engine whose only step comes before `submit` returns."""

    info = EngineInfo(
        name="quick", version="1", model="demo", block_size=16, kv_blocks=8, max_context=64, vocab_size=64,
        eos_token_ids=(),
    )  # fmt: skip

    def start(self, on_step, on_death):
        self._on_step = on_step

    def submit(self, request):
        output = Output(request.key, [1], "length")
        self._on_step(StepResult(outputs=[output], ops=[], load=Load()))

    def load(self):
        return Load()

    def close(self):
        pass


def test_a_request_is_counted_as_taken_before_its_first_step():
    """Or the worker would take an idle engine for a busy one."""
    ours, theirs = (Channel(end) for end in socket.socketpair())
    order = EngineRequest(key=1, token_ids=array("I", [5]).tobytes(), sampling=LONG)
    ours.send(messages.encode(messages.Submit(1, msgspec.Raw(messages.encode(order)))))
    ours.send(messages.encode(messages.Close()))
    assert child._Child(_Quick(), theirs).serve()
    reports = [ours.receive(messages.decode_report) for _ in range(3)]
    assert reports[1].taken == 1
    for end in (ours, theirs):
        end.close()
