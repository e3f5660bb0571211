"""How vLLM's engine core dies, and what the engine says of it."""

import os
import signal
from typing import Any

import psutil
import pytest

pytestmark = pytest.mark.filterwarnings("default")


def test_a_killed_engine_core_is_reported_and_leaves_no_process(make_driver: Any) -> None:
    """A running request ends with `engine_failure`, the death is told, and `close` leaves no process."""
    processes = set(psutil.Process().children(recursive=True))
    driver = make_driver()
    key = driver.submit(list(range(60, 80)), max_tokens=400, ignore_eos=True)
    while key not in driver.outputs:
        driver.step()
    core = next(child for child in psutil.Process().children() if child not in processes and _is_core(child))
    os.kill(core.pid, signal.SIGKILL)
    last = driver.finish(key)[-1]
    assert last.finish_reason == "error"
    assert last.error.code == "engine_failure"
    assert "engine core died" in driver.deaths.get(timeout=60)
    driver.engine.close()
    left = [child for child in psutil.Process().children(recursive=True) if child not in processes]
    assert [child.cmdline() for child in left if not any("resource_tracker" in word for word in child.cmdline())] == []


def _is_core(process: psutil.Process) -> bool:
    return "EngineCore" in " ".join([process.name(), *process.cmdline()])
