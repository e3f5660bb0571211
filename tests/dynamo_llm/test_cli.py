"""The top of the command line: help, version, and what is imported for them."""

import re
import subprocess
import sys
from importlib.metadata import version

import pytest

from dynamo_llm.cli import main


def _run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["dynamo-llm", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


COMMANDS = ["up", "worker", "tritonserver", "router", "status", "role"]


def test_help_lists_the_commands_in_order(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`--help` shows every command, each with what it does, and examples."""
    assert _run(monkeypatch, "--help") == 0
    out = capsys.readouterr().out
    assert re.findall(r"^│ ([a-z]+) ", out, re.MULTILINE) == COMMANDS
    assert "dynamo-llm up --model" in out


def test_version_is_the_distribution_s(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`--version` prints name and version and nothing else."""
    assert _run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"dynamo-llm {version('dynamo-llm')}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help_with_defaults_and_examples(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every subcommand's help says what it does, shows its defaults and gives examples."""
    assert _run(monkeypatch, command, "--help") == 0
    out = capsys.readouterr().out
    assert f"Usage: dynamo-llm {command} [OPTIONS]" in out
    assert "[default: " in out
    assert f"dynamo-llm {command} " in out.split("Examples", 1)[1]


def test_a_mistyped_command_is_guessed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """An unknown command names its nearest neighbour and exits 2."""
    assert _run(monkeypatch, "statsu") == 2
    assert "'status'" in capsys.readouterr().err


def test_help_and_the_router_need_no_torch() -> None:
    """Neither the help of all commands nor the router's module imports torch, PyTriton or each other's packages."""
    code = """
import sys
from dynamo_llm.cli import app
for arguments in (["--help"], ["router", "--help"], ["up", "--help"], ["worker", "--help"]):
    try:
        app(arguments, prog_name="dynamo-llm")
    except SystemExit as ended:
        assert not ended.code, arguments
print("heavy:", sorted({"torch", "pytriton", "numba", "transformers"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "heavy: []", done.stderr
