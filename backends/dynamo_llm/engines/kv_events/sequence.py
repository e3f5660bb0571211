"""Which message of a numbered stream is the next, a late one, the first after a gap, or one of a new engine. Pure."""

from typing import Literal, NamedTuple


class Arrival(NamedTuple):
    kind: Literal["next", "late", "gap"]
    """`late`: it came by replay already. `gap`: those from `Sequence.expected` on are missing."""
    restarted: bool
    """The numbers went back: another engine sends now, and what the one before held is gone."""


class Sequence:
    """Numbers are dense from 0 within the life of an engine, and the stream itself never turns their order."""

    def __init__(self) -> None:
        self.expected = 0
        """The number that follows what was applied last."""
        self._newest: int | None = None
        """Of the stream, replays not counted."""

    def arrived(self, number: int) -> Arrival:
        """A message came on the stream. Call `applied` when its content is in."""
        restarted = self._newest is not None and number <= self._newest
        if restarted:
            self.expected = 0
        self._newest = number
        if number == self.expected:
            return Arrival("next", restarted)
        return Arrival("late" if number < self.expected else "gap", restarted)

    def applied(self, number: int) -> None:
        """Everything up to this number is in, or given up."""
        self.expected = number + 1
