"""When a child process or an engine that died comes back, and when it is given up. Pure: `supervisor.Child` and
`instance.Instance` pass the time in."""

from dataclasses import dataclass
from typing import Literal

State = Literal["idle", "starting", "ready", "stopping", "waiting", "stopped", "failed"]


@dataclass(frozen=True)
class RestartPolicy:
    """When a child that died comes back."""

    first_delay_s: float = 1.0
    factor: float = 2.0
    max_delay_s: float = 30.0
    stable_after_s: float = 30.0
    """A child that was ready for so long has its failures forgotten."""
    start_attempts: int = 3
    """Give up on a child that fails so many times in a row before it was ever ready."""
    most_restarts: int | None = None
    """Give up on one that was ready, too, when it fails more often than this in a row; None: never."""


@dataclass
class Lifecycle:
    """The state machine of one child. All times are seconds of any monotonic clock."""

    policy: RestartPolicy = RestartPolicy()
    state: State = "idle"
    failures: int = 0
    """In a row."""
    starts: int = 0
    ever_ready: bool = False
    _ready_at_s: float | None = None

    def started(self) -> None:
        self.state = "starting"
        self.starts += 1
        self._ready_at_s = None

    def ready(self, now_s: float) -> None:
        if self.state == "starting":
            self.state, self.ever_ready, self._ready_at_s = "ready", True, now_s

    def stopping(self) -> None:
        """From now on its end is what we asked for."""
        self.state = "stopping"

    def exited(self, now_s: float, *, refused: bool = False) -> float | None:
        """The process is gone: seconds until the next start, or None where there is none (`stopped` or `failed`).

        `refused`: it said that it cannot be started as it was told to, so that a child never ready is given up at once.
        """
        if self.state == "stopping":
            self.state = "stopped"
            return None
        if self._ready_at_s is not None and now_s - self._ready_at_s >= self.policy.stable_after_s:
            self.failures = 0
        self.failures += 1
        most = self.policy.most_restarts
        never_ready = not self.ever_ready and (refused or self.failures >= self.policy.start_attempts)
        if never_ready or (most is not None and self.failures > most):
            self.state = "failed"
            return None
        self.state = "waiting"
        doublings = min(self.failures - 1, 64)  # beyond it a float overflows, and the limit is reached long before
        return min(self.policy.first_delay_s * self.policy.factor**doublings, self.policy.max_delay_s)
