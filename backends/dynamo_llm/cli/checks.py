"""What `dynamo-llm up` makes sure of before it starts anything. Each check raises `StartError` with one line."""

import contextlib
import errno
import importlib.util
import json
import socket
from typing import Any

from dynamo_llm.cli.errors import StartError
from dynamo_llm.engines import check_engine
from dynamo_llm.engines.base import EngineError
from dynamo_llm.engines.isolated.interpreter import find_interpreter
from kvstore.connect import connect
from kvstore.embedded import find_server
from kvstore.errors import StoreError

_REASONS = {
    errno.EADDRINUSE: "is in use",
    errno.EACCES: "needs more privileges than this user has",
    errno.EADDRNOTAVAIL: "cannot be opened: this machine does not have the address",
}


def check_ports(host: str, ports: dict[str, int]) -> list[int]:
    """`ports` by the flag that set them. Returns them, 0 replaced by a free one: a server that is started again has to
    come back at the same address."""
    taken: dict[int, str] = {}
    for flag, port in ports.items():
        if port and port in taken:
            raise StartError(f"{taken[port]} and {flag} are both {port}: choose two ports")
        taken[port] = flag
    with contextlib.ExitStack() as probes:  # held until all are chosen, so that no two are the same
        return [_check_port(host, port, flag, probes) for flag, port in ports.items()]


def _check_port(host: str, port: int, flag: str, probes: contextlib.ExitStack) -> int:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        probe = probes.enter_context(socket.socket(family, kind, protocol))
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do, past connections in TIME_WAIT
        probe.bind(address)
        return int(probe.getsockname()[1])
    except socket.gaierror as error:
        raise StartError(f"--host {host} is no address of this machine: {error.strerror}") from None
    except OSError as error:
        reason = _REASONS.get(error.errno or 0, f"cannot be opened: {error.strerror}")
        raise StartError(f"port {port} of {host} {reason}; choose another one by {flag}") from None


def check_embedded_redis() -> None:
    try:
        find_server()
    except StoreError as error:
        raise StartError(str(error)) from None


async def check_redis(url: str) -> None:
    """Connects, so that a Redis that refuses is told before anything runs."""
    try:
        async with connect(url):
            pass
    except StoreError as error:
        raise StartError(str(error)) from None


def check_engine_packages(engine: str, python: str = "") -> None:
    """The engine's name and interpreter, and the packages of the extra `worker`, which are not imported here: that
    takes seconds."""
    try:
        check_engine(engine)
        if python:
            find_interpreter(python)
    except EngineError as error:
        raise StartError(str(error)) from None
    wanted = ["pytriton", *(["torch"] if engine == "torch" and not python else [])]
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    if missing:
        raise StartError(f"a worker needs {' and '.join(missing)}: pip install 'dynamo-llm[worker]'")


def parse_engine_options(pairs: list[str]) -> dict[str, Any]:
    """`KEY=VALUE` pairs; a value that is no JSON is taken as a string."""
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise StartError(f"--engine-option {pair!r} is not of the form KEY=VALUE")
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    return options
