"""An interpreter that will not do is refused in one line, before anything is loaded."""

import subprocess
import sys
from pathlib import Path

import pytest

from dynamo_llm.engines import create_engine
from dynamo_llm.engines.base import EngineError
from dynamo_llm.engines.isolated.interpreter import check_interpreter, environment, find_interpreter


def test_ours_will_do():
    """And stays what it is: followed to its target, it would lose its environment."""
    assert check_interpreter(sys.executable, "worker", "torch") == sys.executable


def test_what_is_no_interpreter_is_refused(tmp_path):
    """A missing file, a folder, a file that cannot be run, and a program that is something else."""
    plain, script = tmp_path / "plain", tmp_path / "script"
    plain.write_text("x")
    script.write_text("#!/bin/sh\necho this is no Python >&2\nexit 3\n")
    script.chmod(0o755)
    refusals = {
        tmp_path / "none": "does not exist",
        plain: "is not executable",
        tmp_path: "is a folder",
        script: "this is no Python",
        Path("/bin/true"): "it printed nothing",
    }
    for python, message in refusals.items():
        with pytest.raises(EngineError, match=message) as caught:
            check_interpreter(str(python), "vllm", "vllm")
        assert "\n" not in str(caught.value)


def test_a_folder_names_the_interpreter_in_it():
    """Whoever names the environment learns what to name."""
    with pytest.raises(EngineError, match=r"bin/python$"):
        find_interpreter(sys.prefix)


def test_an_environment_without_dynamo_llm_tells_how_to_install_it(tmp_path):
    """By that environment's own pip."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    python = tmp_path / "env" / "bin" / "python"
    with pytest.raises(EngineError, match="has no dynamo-llm") as caught:
        create_engine("vllm", tmp_path, "demo", {}, str(python))
    assert f"{python} -m pip install 'dynamo-llm[vllm]'" in str(caught.value)


def test_an_environment_without_the_engine_tells_how_to_install_it():
    """Ours has no such package."""
    with pytest.raises(EngineError, match=r"no package no_such_engine: .* install 'dynamo-llm\[trtllm\]'"):
        check_interpreter(sys.executable, "trtllm", "no_such_engine")


def test_the_childs_environment_is_not_ours():
    """What belongs to our interpreter is left out, and the library path is what it was before we changed it."""
    base = {"PYTHONPATH": "a", "PYTHONHOME": "b", "VIRTUAL_ENV": "c", "HOME": "d", "LD_LIBRARY_PATH": "ours:was"}
    assert environment({**base, "DYNAMO_LLM_LD_LIBRARY_PATH": "was"}) == {"HOME": "d", "LD_LIBRARY_PATH": "was"}
    assert environment({**base, "DYNAMO_LLM_LD_LIBRARY_PATH": ""}) == {"HOME": "d"}
    assert environment(base) == {"HOME": "d", "LD_LIBRARY_PATH": "ours:was"}
