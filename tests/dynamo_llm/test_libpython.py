"""The interpreter's own library comes first."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dynamo_llm import libpython


def test_the_library_found_is_the_running_interpreters() -> None:
    """Loaded in a process that has none, it calls itself by our exact version."""
    library = libpython.find(libpython.candidates()) / libpython.soname()
    code = (
        "import ctypes, sys; "
        f"lib = ctypes.CDLL({str(library)!r}); "
        "lib.Py_GetVersion.restype = ctypes.c_char_p; print(lib.Py_GetVersion().decode())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split()[0] == sys.version.split()[0]
    assert ctypes.sizeof(ctypes.c_void_p) == 8


def test_it_goes_in_front_once() -> None:
    """What was there stays behind it, in its order; a second call changes nothing."""
    folder = str(libpython.find(libpython.candidates()))
    environment = {"LD_LIBRARY_PATH": os.pathsep.join(["/one", folder, "/two"])}
    libpython.prepend_to_library_path(environment)
    libpython.prepend_to_library_path(environment)
    assert environment["LD_LIBRARY_PATH"].split(os.pathsep) == [folder, "/one", "/two"]
    empty: dict[str, str] = {}
    libpython.prepend_to_library_path(empty)
    assert empty["LD_LIBRARY_PATH"] == folder


@pytest.mark.parametrize(("prefix", "package"), [("/usr", True), ("/opt/python", False)])
def test_an_interpreter_without_one_is_one_line(
    prefix: str, package: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error says what to do; a package helps none but the distribution's own interpreter."""
    monkeypatch.setattr(sys, "base_prefix", prefix)
    with pytest.raises(libpython.LibpythonError) as caught:
        libpython.find([tmp_path])
    assert "--enable-shared" in str(caught.value)
    assert ("install the package" in str(caught.value)) is package
    assert "\n" not in str(caught.value)
