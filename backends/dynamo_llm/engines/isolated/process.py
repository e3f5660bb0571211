"""The engine's process: its start, its words, its end and the end of all that it started. `engine.py` owns one.

Its end is what the kernel says of the process itself: a process of its own that outlives it may hold on to the socket
and the pipe.

It ends with us in any case: it asks the kernel for a signal at our death (`child.py`), sees the end of the socket, and
a guard process removes whatever is left, its own children among it. In an orderly end we do that ourselves, so that
the memory which they held is free when a next engine starts.
"""

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import uuid

from dynamo_llm import process_tree
from dynamo_llm.child_io import is_chatter
from dynamo_llm.engines.base import EngineError
from dynamo_llm.engines.isolated import interpreter

_MODULE = "dynamo_llm.engines.isolated.child"
_MAX_LINE = 8192
_WORDS = 300
"""Characters of its last line that a reason repeats."""
_REST_S = 2.0
"""How long its last lines may take after its end."""
_KILL_LIMIT_S = 5.0
"""How long it may take to die when it is killed: one that waits for a device or a disk may never."""

logger = logging.getLogger(__name__)


class EngineProcess:
    """Runs the child with one end of a socket; `socket` is the other end."""

    def __init__(self, python: str) -> None:
        """`python`: an absolute path. Raises `EngineError`."""
        outer = os.environ.get(process_tree.MARK_VARIABLE) or "alone"
        self._mark = f"{outer}/engine-{uuid.uuid4().hex}"  # below our own mark: who ends us ends it too
        self._last_line = ""
        self._lock = threading.Lock()
        self._ended = False
        self._spawned = threading.Event()
        self._gone = threading.Event()
        self._failure: OSError | None = None
        self._process: subprocess.Popen[bytes]
        self.socket, theirs = socket.socketpair()
        with theirs:
            # Its parent, to the kernel, is the thread that starts it, and it dies with it: so this one lives as long.
            self._keeper = threading.Thread(target=self._keep, args=(python, theirs), name="engine-keeper", daemon=True)
            self._keeper.start()
            self._spawned.wait()
        if self._failure is not None:
            self.socket.close()
            raise EngineError(f"python {python} cannot be run: {self._failure.strerror}")
        self._guard = process_tree.Guard(self._mark, "", self.pid)

    @property
    def pid(self) -> int:
        return self._process.pid

    def end(self, grace_s: float = 0.0) -> None:
        """Wait so long for it to end by itself, then kill it and everything that it started. May be called again."""
        with self._lock:
            if self._ended:
                return
            self._ended = True
            self._gone.wait(grace_s)
            process_tree.reap(self._mark, group=self.pid)
            if not self._gone.wait(_KILL_LIMIT_S):
                logger.error("the engine's process (pid %d) cannot be killed and is left behind", self.pid)
            self.hang_up()
            self._guard.release()
            self._keeper.join(_REST_S)

    def hang_up(self) -> None:
        """Whoever sends to it or receives from it comes to an end; what has come already can still be received."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def kill(self) -> None:
        """At once, whoever is waiting in `end`."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    def story(self, grace_s: float) -> str:
        """How it ended and what it said last, in one line; ends it."""
        by_itself = self._gone.wait(grace_s)
        self.end()
        code = self._process.returncode
        if not by_itself or code is None:
            how = "closed its connection"
        elif code < 0:
            how = f"was killed by {_signal_name(-code)}"
        else:
            how = f"ended with exit code {code}"
        return f"the engine's process (pid {self.pid}) {how}{self.last_words()}"

    def last_words(self) -> str:
        line = self._last_line[:_WORDS]
        return f"; its last line: {line}" if line else ""

    # --- the keeper's thread ------------------------------------------------------------------------------------------

    def _keep(self, python: str, theirs: socket.socket) -> None:
        number = theirs.fileno()
        try:
            self._process = subprocess.Popen(
                [python, *interpreter.FLAGS, "-m", _MODULE, str(number), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,  # never ours: there a worker says that it is ready
                stderr=subprocess.STDOUT,
                pass_fds=[number],
                start_new_session=True,  # a Ctrl-C in the terminal is for the worker, which drains first
                env={**interpreter.environment(os.environ), process_tree.MARK_VARIABLE: self._mark},
            )
        except OSError as error:
            self._failure = error
            return
        finally:
            self._spawned.set()
        words = threading.Thread(target=self._pass_on, name="engine-words", daemon=True)
        words.start()
        self._process.wait()
        self._gone.set()
        self.hang_up()
        words.join(_REST_S)

    def _pass_on(self) -> None:
        assert self._process.stdout is not None  # it is a pipe
        with self._process.stdout as lines:
            while line := lines.readline(_MAX_LINE):
                text = line.decode(errors="replace").rstrip()
                if not text:
                    continue
                if not is_chatter(text):
                    self._last_line = " ".join(text.split())
                with contextlib.suppress(OSError, ValueError):  # our own log is gone; the engine must not hang for it
                    print(f"engine {self.pid} | {text}", file=sys.stderr, flush=True)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
