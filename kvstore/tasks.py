"""Background tasks of this package: every one has an owner, which stops it by `stop` and learns here if it dies."""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

_log = logging.getLogger(__name__)


def spawn(name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """Start a task whose death by an error is logged at once, not only when its owner closes."""
    task = asyncio.create_task(work, name=name)
    task.add_done_callback(_report)
    return task


async def stop(*tasks: asyncio.Task[None] | None) -> None:
    """Cancel tasks and wait until they have ended. A cancellation of the caller goes through."""
    running = [task for task in tasks if task is not None]
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)


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
