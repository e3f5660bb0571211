"""Whether an interpreter can run an engine, and its environment variables. `create_engine` and `process.py` ask."""

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import msgspec
from msgspec import Struct

from dynamo_llm import libpython
from dynamo_llm.engines.base import EngineError
from dynamo_llm.engines.isolated.messages import own_version

FLAGS = ("-I",)
"""An environment of its own: neither our PYTHONPATH nor the current folder counts there."""
_PROBE = """
import importlib.util, json, sys
from importlib.metadata import PackageNotFoundError, version
try:
    found = version("dynamo-llm")
except PackageNotFoundError:
    found = ""
missing = [name for name in ["dynamo_llm", *sys.argv[1:]] if importlib.util.find_spec(name) is None]
print("probe " + json.dumps({"version": found, "missing": missing}))
"""
_PROBE_LIMIT_S = 120.0
"""For the first start of an interpreter on a busy machine with a cold disk."""


def find_interpreter(python: str) -> str:
    """Absolute path of `python`, a path or a name on PATH. Raises `EngineError`."""
    path = Path(python).expanduser()
    if path.is_dir():
        inside = path / "bin" / "python"
        hint = f"name the interpreter in it: {inside}" if inside.exists() else "name an interpreter"
        raise EngineError(f"python {python} is a folder: {hint}")
    found = shutil.which(path)
    if found is None:
        reason = "is not executable" if path.exists() else "does not exist"
        raise EngineError(f"python {python} {reason}: name the engine's interpreter, as in DIR/bin/python")
    return os.path.abspath(found)  # no links followed: by its place an interpreter knows its environment


def check_interpreter(python: str, extra: str, package: str = "") -> str:
    """Path of the interpreter, if its environment has our version and the engine's package. Raises `EngineError`."""
    path = find_interpreter(python)
    found = _probe(path, [package] if package else [])
    wanted = f"dynamo-llm[{extra}]" if extra else "dynamo-llm"
    install = f"{path} -m pip install '{wanted}'"
    if "dynamo_llm" in found.missing:
        raise EngineError(f"the environment of {path} has no dynamo-llm: {install}")
    ours, theirs = own_version(), found.version
    if ours and theirs and ours != theirs:
        raise EngineError(
            f"the environment of {path} has dynamo-llm {theirs}, this one {ours}: "
            f"{path} -m pip install '{wanted}=={ours}'"
        )
    if found.missing:
        raise EngineError(f"the environment of {path} has no package {' or '.join(found.missing)}: {install}")
    return path


class _Found(Struct, frozen=True):
    """What the probe prints."""

    version: str
    missing: list[str]


def _probe(path: str, packages: list[str]) -> _Found:
    """Ask the interpreter itself. It imports nothing of what it is asked for."""
    try:
        run = subprocess.run(
            [path, *FLAGS, "-c", _PROBE, *packages],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PROBE_LIMIT_S,
            env=environment(os.environ),
        )
    except OSError as error:
        raise EngineError(f"python {path} cannot be run: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise EngineError(f"python {path} did not answer within {_PROBE_LIMIT_S:g} s; is it an interpreter?") from None
    for line in run.stdout.splitlines():  # something of the environment's may have printed before
        if line.startswith("probe "):
            return msgspec.json.decode(line.removeprefix("probe "), type=_Found)
    words = (run.stderr.strip().splitlines() or ["it printed nothing that we asked for"])[-1]
    raise EngineError(f"python {path} is no interpreter that can be used: {words[:300]}")


def environment(base: Mapping[str, str]) -> dict[str, str]:
    """`base` without what belongs to the interpreter that runs here."""
    result = {name: value for name, value in base.items() if name not in ("PYTHONHOME", "PYTHONPATH", "VIRTUAL_ENV")}
    libpython.restore_library_path(result)
    return result
