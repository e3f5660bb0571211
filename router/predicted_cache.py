"""What a worker's prefix cache probably holds, where its engine does not tell: what this router had computed there.

An engine announces its KV blocks by events, and the index follows them. One that does not (its events are switched off,
or it has none) says so on its card, and the router guesses: a block is there from the first token of a request that has
it until so many younger ones have come as the worker has room for, or until nobody has used it for a while. What other
routers had computed there is not known. `worker_client.WorkerConnection` has one for such a worker.
"""

from collections.abc import Sequence
from math import inf


class PredictedCache:
    """Block hashes by last use. Times are seconds of any one clock."""

    def __init__(self, capacity_blocks: int, ttl_s: float) -> None:
        self._capacity = capacity_blocks
        self._ttl_s = ttl_s
        self._used_s: dict[int, float] = {}
        """Least recently used first."""

    def __len__(self) -> int:
        return len(self._used_s)

    def hold(self, hashes: Sequence[int], now_s: float) -> None:
        """A request with these leading blocks was computed. Later ones are forgotten before those they follow."""
        used_s, capacity = self._used_s, self._capacity
        for block in reversed(hashes[:capacity]):
            used_s.pop(block, None)
            used_s[block] = now_s
        while len(used_s) > capacity or (used_s and now_s - used_s[next(iter(used_s))] > self._ttl_s):
            del used_s[next(iter(used_s))]

    def match(self, hashes: Sequence[int], now_s: float) -> int:
        """How many leading blocks are probably there."""
        used_s, since_s = self._used_s, now_s - self._ttl_s
        for count, block in enumerate(hashes):
            if used_s.get(block, -inf) < since_s:
                return count
        return len(hashes)

    def clear(self) -> None:
        """The engine has begun anew."""
        self._used_s.clear()
