"""`benchmarks/disagg.py`: what it prints, and what it is told."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "disagg.py"
SHORT = ["--workers", "2", "--shapes", "1P1D", "--policies", "auto", "--agg-batch-tokens", "2048", "--rates", "5"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PROGRAM), *SHORT, "--requests", "60", *arguments]
    return subprocess.run(command, check=False, timeout=100, capture_output=True, text=True)


def document(*arguments: str) -> Any:
    done = run("--json", *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_document() -> None:
    """It names each cluster and what was assumed, meets the limits at the rate it found, and is the same every time."""
    result = document("--itl-ms", "40")
    assert [entry["cluster"] for entry in result["results"]] == ["2 agg, 2048 a step", "1P1D auto"]
    assert result["assumptions"]["settings"]["busy_prefill_tokens"] == 8192
    assert result["assumptions"]["link"]["tokens_per_s"] == 190735
    for entry in result["results"]:
        assert set(entry["at_rate"]) == {"5"}
        assert entry["highest_rate_within_limits"] > 0
        assert entry["figures_there"]["itl_p99_ms"] <= 40
        assert sum(entry["at_rate"]["5"]["prefills"].values()) == pytest.approx(1, abs=0.01)
    assert document("--itl-ms", "40") == result


def test_a_trace(tmp_path: Path) -> None:
    """Its requests are stretched to the rates, and the document names the file and no folder."""
    lines = [{"timestamp": 10 * n, "input_length": 1000, "output_length": 5, "hash_ids": [0, n + 1]} for n in range(60)]
    path = tmp_path / "some.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    result = document("--trace", str(path))
    assert result["workload"]["trace"] == "some.jsonl"
    assert (result["workload"]["mean_prompt_tokens"], result["workload"]["mix"]) == (1000, None)
    assert result["results"][0]["at_rate"]["5"]["reused"] > 0.3


def test_tables() -> None:
    """For people: a line for each cluster at each rate and one for its highest rate, progress on stderr."""
    done = run("--set", "itl_weight=0.5", "--drop-first-token")
    assert sum("1P1D auto" in line for line in done.stdout.splitlines()) == 2
    assert "of the best aggregated" in done.stdout
    assert "2 of 2: 1P1D auto" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--set", "itl_weights=1"), "itl_weights"),
        (("--set", "itl_weight"), "NAME=VALUE"),
        (("--shapes", "2x3"), "not like 2P6D"),
        (("--trace", "/nowhere/trace.jsonl"), "No such file"),
        (("--rates", "0"), "above 0"),
        (("--workers", "0"), "above 0"),
        (("--requests", "1"), "2 requests"),
        (("--documents", "2"), "0 to 1"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(arguments: tuple[str, ...], words: str) -> None:
    """No traceback for an argument."""
    done = run(*arguments)
    assert done.returncode != 0
    assert words in done.stderr
    assert "Traceback" not in done.stderr
