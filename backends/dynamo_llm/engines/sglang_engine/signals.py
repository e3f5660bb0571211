"""SGLang tells its parent process with SIGQUIT that one of its processes failed; without a handler the parent dies.

The handler travels to SGLang's own processes as one of its server arguments, so it is a plain function of a module that
imports nothing of SGLang. `engine.py` enters its engine here.
"""

from typing import Protocol
from weakref import WeakSet


class _Mortal(Protocol):
    def die(self, reason: str) -> None: ...


ENGINES: "WeakSet[_Mortal]" = WeakSet()
"""Those that run in this process."""


def on_quit(signal: int, frame: object) -> None:
    """Whichever process it was: SGLang cannot go on without it."""
    for engine in tuple(ENGINES):
        engine.die("one of SGLang's processes failed; its log says why")
