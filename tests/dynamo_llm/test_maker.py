"""Engines that are made on a thread, and what becomes of those that nobody waits for."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
from scripted_engine import ScriptedEngine

from dynamo_llm.engines.base import EngineError
from dynamo_llm.maker import Maker


class Gated:
    """Creates a scripted engine when the gate opens, and knows the thread that did."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.engine = ScriptedEngine()
        self.closed = threading.Event()
        self.engine.close = self.closed.set

    def create(self) -> ScriptedEngine:
        self.thread = threading.current_thread()
        self.gate.wait()
        return self.engine


async def test_an_engine_is_closed_on_the_thread_that_made_it() -> None:
    """Which lives until then: processes that it started may be bound to its end."""
    gated = Gated()
    gated.gate.set()
    maker = Maker(gated.create)
    assert await maker.engine() is gated.engine
    assert await maker.engine() is gated.engine
    assert gated.thread.is_alive()
    await maker.close()
    await maker.close()
    assert gated.closed.is_set()
    gated.thread.join(10)


async def test_an_engine_that_was_given_up_is_closed_when_it_comes(eventually: Callable[..., Any]) -> None:
    """Neither who waited for it nor who closes it waits until then."""
    gated = Gated()
    maker = Maker(gated.create)
    waiting = asyncio.create_task(maker.engine())
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await asyncio.wait_for(maker.close(), 10)
    assert maker.busy
    gated.gate.set()
    await eventually(gated.closed.is_set)
    assert not maker.busy


@pytest.mark.parametrize("error", [TypeError("no\nsuch argument"), SystemExit(3)])
async def test_whatever_goes_wrong_is_an_engine_error_of_one_line(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    """Engines are somebody else's packages; some end the process where they should raise."""

    def create() -> ScriptedEngine:
        raise error

    maker = Maker(create)
    with pytest.raises(EngineError) as caught:
        await maker.engine()
    assert str(caught.value) == " ".join(f"the engine could not start: {type(error).__name__}: {error}".split())
    await maker.close()
    assert "the engine could not be made" in caplog.text


async def test_an_engine_that_cannot_be_closed_holds_nobody_up(caplog: pytest.LogCaptureFixture) -> None:
    """What broke is in the log."""
    gated = Gated()

    def close() -> None:
        raise ZeroDivisionError

    gated.engine.close = close
    gated.gate.set()
    maker = Maker(gated.create)
    await maker.engine()
    await asyncio.wait_for(maker.close(), 10)
    assert "ZeroDivisionError" in caplog.text
