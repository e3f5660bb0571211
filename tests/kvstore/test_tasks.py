"""Waiting with a limit, and stopping what was started."""

import asyncio
import gc
from typing import Any

import pytest

from kvstore.tasks import stop, within


async def test_a_cancellation_goes_through_when_the_work_completes_at_once() -> None:
    """The caller is cancelled in the same turn of the loop in which its work completes."""
    done: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    caller = asyncio.create_task(within(10, done))
    await asyncio.sleep(0)
    done.set_result("too late")
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller


async def test_work_that_takes_too_long_is_cancelled() -> None:
    """Nothing of it is left when the limit is reported."""
    work = asyncio.create_task(asyncio.sleep(60))
    with pytest.raises(asyncio.TimeoutError):
        await within(0.01, work)
    assert work.cancelled()


async def test_results_and_errors_come_through() -> None:
    """As if the work had been awaited itself."""
    assert await within(10, asyncio.sleep(0, "done")) == "done"
    with pytest.raises(ZeroDivisionError):
        await within(10, _fail())


async def _fail() -> None:
    raise ZeroDivisionError


async def test_a_task_that_loses_a_cancellation_is_stopped_all_the_same() -> None:
    """It is told again."""
    told = []

    async def deaf() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            told.append(1)
        await asyncio.Event().wait()

    task = asyncio.create_task(deaf())
    await asyncio.sleep(0)
    await asyncio.wait_for(stop(task), 10)
    assert task.cancelled()
    assert told == [1]


@pytest.mark.parametrize("died_before", [True, False])
async def test_the_error_of_a_stopped_task_makes_no_noise(died_before: bool) -> None:
    """Whether it died before it was stopped or of being stopped: asyncio does not complain that nobody looked."""
    complaints: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))

    async def fail() -> None:
        try:
            await asyncio.sleep(0 if died_before else 60)
        finally:
            raise ZeroDivisionError

    task = asyncio.create_task(fail())
    for _ in range(3):
        await asyncio.sleep(0)
    assert task.done() is died_before
    await stop(task)
    await asyncio.sleep(0)
    del task
    gc.collect()
    assert complaints == []
