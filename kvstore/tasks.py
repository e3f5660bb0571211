"""Tasks that have an owner, which stops them by `stop`, and waiting with a limit that loses no cancellation."""

import asyncio
import logging
from collections.abc import Awaitable, Coroutine
from typing import Any, TypeVar

_CANCEL_AGAIN_S = 0.5
_log = logging.getLogger(__name__)

_T = TypeVar("_T")


def spawn(name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """Start a task whose death by an error is logged at once, not only when its owner closes."""
    task = asyncio.create_task(work, name=name)
    task.add_done_callback(_report)
    return task


async def stop(*tasks: asyncio.Future[Any] | None) -> None:
    """Cancel tasks and wait until they have ended. A cancellation of the caller goes through.

    How they ended is not told: who wants to know has `spawn` log it, or awaits the task. Cancels again where once was
    not enough: up to Python 3.11 `asyncio.wait_for`, through which redis-py sends, loses a cancellation that comes just
    as the send completes.
    """
    given = {task for task in tasks if task is not None}
    for task in given:
        task.add_done_callback(_retrieve)  # by a callback, so that it also happens when our caller leaves before
    running = {task for task in given if not task.done()}
    while running:
        for task in running:
            task.cancel()
        _, running = await asyncio.wait(running, timeout=_CANCEL_AGAIN_S)


async def within(timeout_s: float, work: Awaitable[_T]) -> _T:
    """The work's result; raises `asyncio.TimeoutError` and cancels the work when the time is up.

    As `asyncio.wait_for`, except that a cancellation always goes through: that one loses it up to Python 3.11 where the
    work completes at the same moment, and its caller then goes on as if nobody had left.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task}, timeout=timeout_s)
        if task.done():
            return task.result()
        raise asyncio.TimeoutError
    finally:
        await stop(task)


def _retrieve(task: asyncio.Future[Any]) -> None:
    """Or asyncio complains of it when the task is collected, long after its owner has gone on."""
    if not task.cancelled():
        task.exception()


def _report(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.error("task %s died", task.get_name(), exc_info=error)


class Backoff:
    """Pauses between attempts: doubling from `first_s` to `most_s`, from the start again after `reset`."""

    def __init__(self, first_s: float = 0.1, most_s: float = 2.0) -> None:
        self._first_s = first_s
        self._most_s = most_s
        self._next_s = first_s

    def reset(self) -> None:
        self._next_s = self._first_s

    async def pause(self) -> None:
        pause_s, self._next_s = self._next_s, min(2 * self._next_s, self._most_s)
        await asyncio.sleep(pause_s)
