"""What `supervisor.Child` reads of a process: its lines, and its end."""

import asyncio
import os
import re
import subprocess
from collections.abc import Callable

LineHandler = Callable[[str], None]

_MAX_LINE = 8192
_POLL_S = 0.05
# Triton's `I1122 13:37:00.1 …` and its verbose lines, and what Python's logging writes with the level's name in it.
_CHATTER = re.compile(r"^[IV]\d{4} |^(INFO|DEBUG)\b|[\s\[-](INFO|DEBUG)[\s:\]-]")
# How our own commands begin their last line; said once is enough.
_OWN_WORDS = re.compile(r"^dynamo-llm[\w -]*: (cannot start: )?")


def is_chatter(line: str) -> bool:
    """Whether the line's logger marks it as information only."""
    return _CHATTER.search(line) is not None


def without_own_words(line: str) -> str:
    """`no such option` of `dynamo-llm worker: cannot start: no such option`."""
    return _OWN_WORDS.sub("", line)


class Lines(asyncio.Protocol):
    """Cuts a pipe into lines, none longer than `_MAX_LINE` bytes."""

    def __init__(self, handle: LineHandler) -> None:
        self._handle = handle
        self._rest = b""
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        *lines, rest = (self._rest + data).split(b"\n")
        if len(rest) > _MAX_LINE:
            lines, rest = [*lines, rest], b""
        self._rest = rest
        for line in lines:
            self._emit(line)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._rest:
            self._emit(self._rest)
        if not self.closed.done():
            self.closed.set_result(None)

    def _emit(self, line: bytes) -> None:
        text = line[:_MAX_LINE].decode(errors="replace").rstrip()
        if text:
            self._handle(text)


async def exit_of(process: subprocess.Popen[bytes]) -> None:
    """Wait until the process itself has ended, whoever else may still hold its pipes open."""
    try:
        handle = os.pidfd_open(process.pid)
    except (AttributeError, OSError):  # a Linux or a Python from before pidfds, or a sandbox that forbids them
        while process.poll() is None:  # noqa: ASYNC110 - nothing tells us
            await asyncio.sleep(_POLL_S)
        return
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(handle, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(handle)
        os.close(handle)
    process.wait()
