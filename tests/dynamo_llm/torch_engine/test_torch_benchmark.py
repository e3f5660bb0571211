"""`benchmarks/engine.py` compares like with like and says with what it computed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).parents[3] / "benchmarks" / "engine.py"
NO_PEER = Path("/nowhere/python")


def run(*arguments: str) -> Any:
    """The benchmark's document, of the shortest measurement there is."""
    short = ["--json", "--sequences", "1", "--rounds", "1", "--prompt-tokens", "8", "--new-tokens", "2"]
    command = [sys.executable, str(PROGRAM), *short, "--vllm-python", str(NO_PEER), *arguments]
    done = subprocess.run(command, check=True, timeout=100, capture_output=True, text=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ((), {"device": "cpu", "dtype": "float32"}),
        (("--option", "dtype=bfloat16"), {"device": "cpu", "dtype": "bfloat16"}),
    ],
)
def test_device_and_dtype(arguments: tuple[str, ...], options: dict[str, str]) -> None:
    """The CPU in float32, as the peer, on a machine with a GPU too; other options are in the document."""
    document = run(*arguments)
    assert document["options"] == options
    assert document["tokens_per_s"]["torch"]["1"] > 0
    assert "ratio_to_vllm" not in document
