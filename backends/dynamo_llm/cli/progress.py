"""What `dynamo-llm up` shows on stderr: a live line on a terminal, one plain line for each change elsewhere."""

import time
from types import TracebackType

from rich.console import Console
from rich.markup import escape

from dynamo_llm.supervisor import Event

_WORDS = {"starting": "cyan", "ready": "green", "died": "red", "failed": "red", "stopping": "yellow", "stopped": "dim"}


class Progress:
    """Tells what happens, with the seconds since the start. A context manager; `notify` is for the supervisor."""

    def __init__(self, console: Console | None = None, *, verbose: bool = False) -> None:
        self._console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._verbose = verbose
        self._start_s = time.monotonic()
        self._states: dict[str, str] = {}
        self._live = self._console.status(_Line(self)) if self._console.is_terminal else None

    def __enter__(self) -> "Progress":
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.quiet()

    def quiet(self) -> None:
        """Take the live line away; plain lines go on."""
        if self._live:
            self._live.stop()
            self._live = None

    def notify(self, event: Event) -> None:
        """Show a child's change of state, or a line that it wrote (its chatter only when verbose)."""
        if event.kind in ("line", "chatter"):
            if self._verbose or event.kind == "line":
                self._console.print(f"[dim]{event.child} |[/dim] {escape(event.text)}")
            return
        self._states[event.child] = event.kind
        pid = f" (pid {event.pid})" if event.pid else ""
        detail = "" if event.kind == "ready" or not event.text else f": {escape(event.text)}"
        self.say(f"[{_WORDS[event.kind]}]{event.child} {event.kind}[/]{pid}{detail}")

    def say(self, markup: str) -> None:
        """One line of our own, after the elapsed time."""
        self._console.print(rf"[dim]\[{time.monotonic() - self._start_s:6.1f} s][/dim] {markup}")

    def summary(self) -> str:
        """The state of every child, and the seconds so far."""
        states = " · ".join(f"{name} [{_WORDS[state]}]{state}[/]" for name, state in self._states.items())
        return f"{states} · {time.monotonic() - self._start_s:.0f} s"


class _Line:
    """Drawn anew each time that the spinner turns."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def __rich__(self) -> str:
        return self._progress.summary()
