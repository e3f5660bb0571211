"""What is kept for a client that reads slowly, and what becomes of runs at the end."""

import asyncio

import pytest

from router.errors import RouterError, Unavailable
from router.kserve.outbox import Outbox
from router.kserve.request import InferRequest, prepare

PROMPT = "one two three four five six seven eight"


@pytest.fixture
def prepared(model):
    """Makes the preparation of a streamed request."""

    def make(text=PROMPT, request_id="r"):
        async def prepared():
            request = InferRequest(
                model="demo",
                id=request_id,
                inputs={"text_input": [text.encode()], "stream": [True], "max_tokens": [100]},
            )
            return await prepare(request, model), model

        return prepared

    return make


def text_of(response):
    return b"".join(tensor.values[0] for tensor in response.outputs).decode()


async def drain(outbox):
    items = []
    while batch := await outbox.next():
        items += batch
    return items


async def settled(condition):
    """Wait until a condition of other tasks holds."""

    async def wait():
        while not condition():  # noqa: ASYNC110 - the generator has no event for it
            await asyncio.sleep(0.001)

    await asyncio.wait_for(wait(), 10)


async def test_slow_reader_gets_one_fuller_response(echo, prepared):
    """What comes while nobody reads is merged: nothing is lost and nothing piles up."""
    async with Outbox(echo) as outbox:
        outbox.start("r", prepared())
        outbox.close()
        await settled(lambda: echo.finished)
        (item,) = await drain(outbox)
    assert text_of(item.response) == PROMPT
    assert item.response.final
    assert item.response.parameters["instance"]


async def test_content_comes_before_the_error(echo, prepared):
    """A run that fails is told by its last item, after everything that it had produced."""
    echo.error, echo.fail_after = Unavailable("gone"), 3
    async with Outbox(echo) as outbox:
        outbox.start("r", prepared())
        outbox.close()
        *content, last = await drain(outbox)
    assert isinstance(last.response, Unavailable)
    assert PROMPT.startswith("".join(text_of(item.response) for item in content))
    assert content


async def test_leaving_cancels_what_is_in_flight(echo, prepared):
    """No run outlives its outbox."""
    echo.hold_after = 1
    async with Outbox(echo) as outbox:
        for name in "abc":
            outbox.start(name, prepared(request_id=name))
        await settled(lambda: len(echo.requests) == 3)
    assert sorted(echo.cancelled) == ["a", "b", "c"]


async def test_run_cancelled_from_below_still_answers(echo, prepared):
    """A generator that gives a request up by cancelling it does not leave its client waiting."""
    echo.error = asyncio.CancelledError()
    async with Outbox(echo) as outbox:
        outbox.start("r", prepared())
        outbox.close()
        (item,) = await drain(outbox)
    assert isinstance(item.response, Unavailable)


async def test_room_waits_for_a_run_to_end(echo, prepared):
    """A stream with its fill of runs is read no further until one of them is through."""
    echo.hold_after, echo.hold_only = 1, {"held"}
    async with Outbox(echo) as outbox:
        outbox.start("held", prepared(request_id="held"))
        outbox.start("free", prepared(request_id="free"))
        room = asyncio.create_task(outbox.room(2))
        done, _ = await asyncio.wait({room}, timeout=0)
        assert not done
        while not room.done():
            for item in await outbox.next():
                assert not isinstance(item.response, RouterError)
            await asyncio.sleep(0)
        assert outbox.in_flight == 1


async def test_sink_takes_what_it_can(echo, prepared):
    """What a sink took does not come again; the end always comes by `next`."""
    taken = []
    accept = True

    def sink(run):
        if accept:
            taken.extend(run.take())
        return accept

    async with Outbox(echo, sink) as outbox:
        outbox.start("r", prepared())
        outbox.close()
        items = await drain(outbox)
    assert len(items) == 1
    assert items[0].response.final
    assert "".join(map(text_of, [*taken, items[0].response])) == PROMPT
    assert len(taken) > 1
