"""Which requests can be stopped by the id that their client gave them. Shared by a worker's public models."""

import contextlib
import threading
from collections.abc import Callable, Iterator


class Ticket:
    """One request that can be stopped, from its arrival on. Thread-safe in the sense of `Running`."""

    def __init__(self) -> None:
        self._stopped = False
        self._cancel: Callable[[], None] | None = None

    def on_stop(self, cancel: Callable[[], None]) -> None:
        """What a stop calls, perhaps twice; at once where the stop has come already."""
        self._cancel = cancel
        if self._stopped:
            cancel()

    def stop(self) -> None:
        self._stopped = True
        if self._cancel is not None:
            self._cancel()


class Running:
    """Requests in flight by id. Thread-safe: a stop may come on another event loop than the request did."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tickets: dict[str, list[Ticket]] = {}

    @contextlib.contextmanager
    def under(self, request_id: str) -> Iterator[Ticket]:
        """While it lasts, `stop(request_id)` stops the ticket. An empty id cannot be stopped."""
        ticket = Ticket()
        if not request_id:
            yield ticket
            return
        with self._lock:
            self._tickets.setdefault(request_id, []).append(ticket)
        try:
            yield ticket
        finally:
            with self._lock:
                tickets = self._tickets[request_id]
                tickets.remove(ticket)
                if not tickets:
                    del self._tickets[request_id]

    def stop(self, request_id: str) -> None:
        """All requests of that id; an unknown one may have ended already."""
        with self._lock:
            tickets = list(self._tickets.get(request_id, ()))
        for ticket in tickets:
            ticket.stop()
