"""Requests of one client stream and what they have produced that the client has not been sent yet.

The transport (`grpc.py`: a ModelStreamInfer call, `event_stream.py`: a generate_stream response) starts runs and
empties the outbox as fast as its client reads. What a run produces meanwhile is merged into one response, so a slow
client has at most one response pending for each request.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from kvstore.tasks import stop, within
from router.errors import DeadlineExceeded, RouterError, Unavailable
from router.kserve.request import Job
from router.kserve.response import Responder, Response, result_parameters
from router.models import Model
from router.types import Delta, Generator, Placed, Result

log = logging.getLogger(__name__)

Prepare = Callable[[], Awaitable[tuple[Job, Model]]]


class Item(NamedTuple):
    """Something to send."""

    run: "Run"
    response: Response | RouterError
    """An error is the last item of its run."""


class Run:
    """One request, from preparation to its last response."""

    def __init__(self, request_id: str, prepare: Prepare, generator: Generator, wake: Callable[["Run"], None]) -> None:
        self.request_id = request_id
        self.model = ""
        """Name of the model, once it is known to exist."""
        self.finished = False
        self._prepare = prepare
        self._generator = generator
        self._wake = wake
        self._job: Job | None = None
        self._responder: Responder | None = None
        self._deltas: list[Delta] = []
        self._result: Result | None = None
        self._error: RouterError | None = None

    async def serve(self) -> None:
        """Prepare and generate; raises nothing but `CancelledError`."""
        try:
            self._job, model = await self._prepare()
            self.model = model.name
            self._responder = responder = Responder(self._job, model.tokenizer)
            on_delta = self._on_delta if self._job.stream else None
            self._result = await generate(self._generator, self._job, on_delta, responder.placed)
        except RouterError as error:
            self._error = error
        except Exception:
            # A request's boundary: a fault of ours must still answer the client.
            log.exception("request %s failed", self.request_id)
            self._error = RouterError("internal error, see the router's log")

    def ended(self) -> None:
        """The task that served it is done: what is pending can go out."""
        self.finished = True
        if self._result is None and self._error is None:
            self._error = Unavailable("the router gave up the request because it is shutting down")
        self._wake(self)

    def _on_delta(self, delta: Delta) -> None:
        self._deltas.append(delta)
        if delta.finish_reason is None:  # the last one goes out with the result, which follows at once
            self._wake(self)

    def take(self) -> list[Response | RouterError]:
        """What can be sent now."""
        ready: list[Response | RouterError] = []
        if self._job is not None and self._responder is not None:
            if self._deltas and (self.finished or self._deltas[-1].finish_reason is None):
                deltas, self._deltas = self._deltas, []
                ready.append(self._responder.delta(deltas))
            if self._result is not None and self.finished:
                ready[:] = _finish(ready, self._job, self._responder, self._result)
        if self._error is not None and self.finished:
            ready.append(self._error)
        return ready


class Outbox:
    """Owns the runs of one client stream: leaving the context cancels those still in flight.

    A transport that can write without waiting gives a `sink`, which is offered a run that has something new and is not
    at its end. It takes it and returns True, or returns False and leaves it to `next`: no task wakes for what it took.
    """

    def __init__(self, generator: Generator, sink: Callable[["Run"], bool] | None = None) -> None:
        self._sink = sink
        self._generator = generator
        self._tasks: dict[Run, asyncio.Task[None]] = {}
        self._ready: dict[Run, None] = {}
        self._changed = asyncio.Event()
        self._freed = asyncio.Event()
        self.closed = False

    async def __aenter__(self) -> "Outbox":
        return self

    async def __aexit__(self, *_: object) -> None:
        await stop(*self._tasks.values())

    def start(self, request_id: str, prepare: Prepare) -> Run:
        """Begin to serve a request."""
        run = Run(request_id, prepare, self._generator, self._wake)
        task = asyncio.create_task(run.serve())
        task.add_done_callback(lambda _: run.ended())
        self._tasks[run] = task
        return run

    def close(self) -> None:
        """No more runs will be started: `next` ends after the last one's last item."""
        self.closed = True
        self._changed.set()

    @property
    def runs(self) -> list[Run]:
        """Those whose last item was not taken yet."""
        return list(self._tasks)

    @property
    def in_flight(self) -> int:
        """Runs whose last item was not taken yet."""
        return len(self._tasks)

    async def room(self, most: int) -> None:
        """Wait until fewer than `most` runs are in flight."""
        while len(self._tasks) >= most:
            self._freed.clear()
            await self._freed.wait()

    async def next(self) -> list[Item]:
        """What can be sent now, at least one item: those of one run in order. Empty: all runs are through."""
        while self._tasks or not self.closed:
            items: list[Item] = []
            ready, self._ready = self._ready, {}
            for run in ready:
                finished = run.finished
                items += [Item(run, response) for response in run.take()]
                if finished:
                    del self._tasks[run]
                    self._freed.set()
            if items:
                return items
            if self._tasks or not self.closed:
                self._changed.clear()
                await self._changed.wait()
        return []

    def _wake(self, run: Run) -> None:
        if self._sink is not None and not run.finished and self._sink(run):
            return
        self._ready[run] = None
        self._changed.set()


def _finish(
    ready: list[Response | RouterError], job: Job, responder: Responder, result: Result
) -> list[Response | RouterError]:
    """Make the last response the final one, or add an empty one where the client asked for it."""
    parameters = result_parameters(result)
    content = ready[0] if ready else None
    if not job.stream:
        content = responder.whole(result)
    if not isinstance(content, Response):
        return [Response([], parameters, True)]
    if job.empty_final:
        return [content._replace(final=False), Response([], parameters, True)]
    return [Response(content.outputs, {**content.parameters, **parameters}, True)]


async def generate(
    generator: Generator,
    job: Job,
    on_delta: Callable[[Delta], None] | None = None,
    on_placed: Callable[[Placed], None] | None = None,
) -> Result:
    """As the generator's method, within the client's own time limit. Raises `RouterError`."""
    answer = generator.generate(job.generation, on_delta, on_placed)
    if job.timeout_s is None:
        return await answer
    try:
        return await within(job.timeout_s, answer)
    except asyncio.TimeoutError:
        raise DeadlineExceeded(f"the request's own time limit of {job.timeout_s:g} s passed") from None
