"""Finds the running interpreter's shared library for Triton's python stubs. A host calls `prepend_to_library_path`.

A stub is linked against `libpython3.X.so.1.0` and takes the one that the loader finds first. On a machine with a
distribution's Python beside the interpreter's own that is the wrong one, and the stub dies with the standard library of
the one on the code of the other.
"""

import os
import sys
import sysconfig
from collections.abc import MutableMapping
from pathlib import Path

_VARIABLE = "LD_LIBRARY_PATH"
_BEFORE = "DYNAMO_LLM_LD_LIBRARY_PATH"
"""Keeps what the variable was, for children that are no Triton."""


class LibpythonError(RuntimeError):
    """This interpreter has no shared library. The message is one line."""


def soname() -> str:
    """What the stub asks the loader for."""
    return f"libpython{sys.version_info.major}.{sys.version_info.minor}.so.1.0"


def candidates() -> list[Path]:
    """Folders in which the interpreter's own library can be, likeliest first.

    `LIBDIR` is where it was built to be; an interpreter that was moved since has it below its base prefix.
    """
    configured = (sysconfig.get_config_var(name) for name in ("LIBDIR", "LIBPL"))
    folders = [Path(folder) for folder in configured if folder]
    folders += [Path(prefix, "lib") for prefix in (sys.base_exec_prefix, sys.base_prefix)]
    if multiarch := sysconfig.get_config_var("MULTIARCH"):
        folders.append(Path(sys.base_prefix, "lib", multiarch))
    return list(dict.fromkeys(folders))


def find(folders: list[Path]) -> Path:
    """The first folder that holds the library. Raises `LibpythonError`."""
    name = soname()
    for folder in folders:
        if (folder / name).is_file():
            return folder
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    install = f"install the package libpython{version}, or " if sys.base_prefix == "/usr" else ""  # a distribution's
    raise LibpythonError(
        f"no {name} beside {sys.executable}: {install}use an interpreter that was built with --enable-shared"
    )


def prepend_to_library_path(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let the children of this process find the interpreter's own library first. Raises `LibpythonError`."""
    folder = str(find(candidates()))
    environment.setdefault(_BEFORE, environment.get(_VARIABLE, ""))
    rest = [entry for entry in environment.get(_VARIABLE, "").split(":") if entry and entry != folder]
    environment[_VARIABLE] = ":".join([folder, *rest])


def restore_library_path(environment: MutableMapping[str, str]) -> None:
    """Take back what was prepended, for a child that runs another interpreter: ours must not be found first there."""
    before = environment.pop(_BEFORE, None)
    if before:
        environment[_VARIABLE] = before
    elif before is not None:
        environment.pop(_VARIABLE, None)
