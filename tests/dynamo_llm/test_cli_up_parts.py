"""What `dynamo-llm up` does with its parts, over small real processes that stand in for router and worker."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dynamo_llm.cli.plan import Mode, Plan, _gpu_of
from dynamo_llm.cli.up import _scratch
from kvstore.embedded import fits

DEMO = Path(__file__).parents[2] / "model_repository" / "demo"

# What the parts run: argv is role, name, log file, behaviour.
PART = """
import http.server, json, os, signal, sys, threading, time
role, name, log, behaviour = sys.argv[1:]

def leave(*_):
    with open(log, "a") as file:
        file.write(name + "\\n")
    os._exit(0)

class Status(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        instances = [{"instance": f"worker-{n}", "ready": True} for n in (1, 2)]
        body = json.dumps({"ready": True, "instances": instances}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_):
        pass

if role == "worker" and behaviour == "broken":
    sys.exit("out of memory")
signal.signal(signal.SIGTERM, signal.SIG_IGN if behaviour == "stubborn" else leave)
print("INFO chatter", file=sys.stderr, flush=True)
print("something to know", file=sys.stderr, flush=True)
if role == "router":
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Status)
    print(f"ready http://127.0.0.1:{server.server_port} grpc 127.0.0.1:1", flush=True)
    server.serve_forever()
print(f"ready demo instance={name}", flush=True)
time.sleep(600)
"""

UP = """
import sys
from dynamo_llm.cli import main, plan
from dynamo_llm.supervisor import ChildSpec
part, log, behaviour, model, *more = sys.argv[1:]
plan.Plan._child = lambda self, name, argv, environment=None: ChildSpec(
    name, [sys.executable, "-c", part, argv[0], name, log, behaviour])
sys.argv = ["dynamo-llm", "up", "--model", model, "--workers", "2", "--http-port", "0", "--grpc-port", "0", *more]
main()
"""

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def start(log: Path) -> Iterator[Start]:
    """Runs `up` with parts of some behaviour. No temporary file may be left."""
    folder = tempfile.mkdtemp(prefix="t", dir="/tmp")  # short, as the paths of unix sockets have to be
    started: list[subprocess.Popen[str]] = []

    def run(behaviour: str, *more: str) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-c", UP, PART, str(log), behaviour, str(DEMO), *more],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": folder},
        )
        started.append(process)
        return process

    try:
        yield run
        assert os.listdir(folder) == []
    finally:
        for process in started:
            process.kill()
            process.communicate()
        os.rmdir(folder)


def _lines_until(process: "subprocess.Popen[str]", words: str) -> list[str]:
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line.rstrip())
        if words in line:
            return lines
    pytest.fail(f"{words!r} was not said: {lines}")


def test_the_router_ends_before_the_workers(start: Start, log: Path) -> None:
    """A signal reaches the router first: workers go on until it has finished what is in flight."""
    process = start("well")
    assert process.stdout is not None
    assert process.stdout.readline().startswith("ready http://127.0.0.1:")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out == ""
    order = log.read_text().split()
    assert order[0] == "router"
    assert sorted(order[1:]) == ["worker-1", "worker-2"]
    assert err.splitlines()[-1].endswith("stopped")


def test_a_second_signal_stops_at_once(start: Start) -> None:
    """Parts that do not end are killed; the exit code says by which signal."""
    process = start("stubborn")
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    _lines_until(process, "router stopping")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT, err
    assert "router stopped" in err


def test_a_worker_that_cannot_start_ends_the_whole_with_its_reason(start: Start) -> None:
    """Three failures before it was ever ready: exit code 1, and the last line says who and why."""
    process = start("broken")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert out == ""
    last = err.splitlines()[-1]
    assert last.startswith("dynamo-llm: worker-")
    assert last.endswith("failed 3 times at its start: exit code 1: out of memory")


@pytest.mark.parametrize("verbose", [False, True])
def test_lines_of_the_parts_are_shown_after_their_name(start: Start, verbose: bool) -> None:
    """What is marked as information is shown only when asked for."""
    process = start("well", *(["--verbose"] if verbose else []))
    lines = _lines_until(process, "serving demo")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert "router | something to know" in lines
    assert "worker-2 | something to know" in lines
    assert ("router | INFO chatter" in lines) is verbose


def test_workers_get_the_engines_interpreter() -> None:
    """Where one is named, and no flag where none is."""
    argv = _plan(python="/env/bin/python").worker(1).argv
    assert argv[argv.index("--python") + 1] == "/env/bin/python"
    assert "--python" not in _plan().worker(1).argv


def test_the_dialect_is_passed_on() -> None:
    """As `--dialect` of each worker."""
    argv = _plan(dialect="tensorrtllm").worker(1).argv
    assert argv[argv.index("--dialect") + 1] == "tensorrtllm"


def _plan(**more: object) -> Plan:
    values = {
        "model_path": "/models/m",
        "model_name": "m",
        "engine": "torch",
        "engine_options": {},
        "role_options": {},
        "python": "",
        "dialect": "vllm",
        "mode": Mode.agg,
        "roles": ("agg", "agg"),
        "host": "127.0.0.1",
        "http_port": 1,
        "grpc_port": 2,
        "redis_url": "redis://u:secret@h/0",
        "redis_folder": "",
        "namespace": "n",
        "drain_timeout_s": 3.0,
        "start_timeout_s": 4.0,
        "verbose": False,
    }
    return Plan(**{**values, **more})  # type: ignore[arg-type]


def test_cores_are_shared_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of two workers on six cores gets three threads; an option of the user's wins; no worker gets none."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))
    assert "threads=3" in _plan().worker(1).argv
    assert "threads=1" in _plan(roles=("agg",) * 9).worker(1).argv
    argv = _plan(engine_options={"threads": 5}).worker(1).argv
    assert "threads=5" in argv
    assert "threads=3" not in argv


def test_modes_choose_the_policy() -> None:
    """The modes without a router's name are round robin, the others are KV-aware."""
    for mode in (Mode.agg, Mode.disagg):
        assert "round-robin" in _plan(mode=mode).router().argv
    for mode in (Mode.agg_router, Mode.disagg_router):
        assert "kv" in _plan(mode=mode).router().argv


def test_workers_get_their_role() -> None:
    """Prefill workers first; each part is named after its role, and gets its role's options over the common ones."""
    options = {"decode": {"threads": 7}, "prefill": {}}
    plan = _plan(roles=("prefill", "decode", "decode"), engine_options={"threads": 5}, role_options=options)
    specs = plan.workers()
    assert [spec.name for spec in specs] == ["prefill-1", "decode-1", "decode-2"]
    assert [spec.argv[spec.argv.index("--role") + 1] for spec in specs] == ["prefill", "decode", "decode"]
    assert ["threads=7" in spec.argv for spec in specs] == [False, True, True]
    assert ["threads=5" in spec.argv for spec in specs] == [True, False, False]
    assert [spec.name for spec in _plan().workers()] == ["worker-1", "worker-2"]


def test_the_redis_url_is_on_no_command_line() -> None:
    """It may hold a password, and command lines can be read by all users."""
    for spec in (_plan().router(), _plan().worker(1)):
        assert "secret" not in " ".join(spec.argv)
        assert spec.environment["DYNAMO_LLM_REDIS"] == "redis://u:secret@h/0"


def test_workers_take_the_visible_gpus_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs, three workers: the third one shares the first GPU. An empty list leaves the workers alone."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert [_gpu_of(n)["CUDA_VISIBLE_DEVICES"] for n in (1, 2, 3)] == ["4", "7", "4"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert _gpu_of(1) == {}


def test_a_long_tmpdir_is_left_for_a_shorter_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The socket of the embedded Redis has to fit into the kernel's 107 bytes; nothing is left in either folder."""
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with _scratch() as folder:
        assert Path(folder).is_dir()
        assert fits(Path(folder))
        assert list(deep.iterdir()) == []
    assert not Path(folder).exists()
