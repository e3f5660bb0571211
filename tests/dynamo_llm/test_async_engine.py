"""The frame of engines that are asynchronous themselves, around one that says what its prompt says."""

from collections.abc import AsyncGenerator
from typing import Any

import pytest
from engine_driver import WAIT_S, Driver

from dynamo_llm.engines.async_engine import AsyncEngine
from dynamo_llm.engines.async_types import Delta
from dynamo_llm.engines.base import EngineInfo, EngineRequest, StepResult


class Echo(AsyncEngine):
    """Each request gets one token."""

    def __init__(self) -> None:
        super().__init__("echo")
        self.info = EngineInfo(
            name="echo",
            version="1",
            model="demo",
            block_size=16,
            kv_blocks=8,
            max_context=64,
            vocab_size=64,
            eos_token_ids=(),
        )

    def prepare(self, request: EngineRequest) -> None: ...

    async def generate(self, request: EngineRequest, prepared: Any) -> AsyncGenerator[Delta, None]:
        yield Delta(token_ids=[request.token_ids[0]], finish_reason="length")


def test_a_step_that_cannot_be_passed_on_is_a_death(caplog: pytest.LogCaptureFixture) -> None:
    """Its outputs are lost: by the engine's death, whoever waits for them is answered."""
    engine = Echo()
    driver = Driver(engine)
    driver.submit(1, [7])
    (outputs,) = driver.finish(1)
    assert outputs[-1].token_ids == [7]

    def fail(step: StepResult) -> None:
        raise ValueError("no room")

    engine._on_step = fail
    driver.submit(2, [8])
    assert driver.deaths.get(timeout=WAIT_S) == "a step could not be passed on: ValueError('no room')"
    assert "no room" in caplog.text
    engine.close()
    assert driver.deaths.empty()
