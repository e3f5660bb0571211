"""A request that lost its worker goes on as if nothing had happened, whatever its parameters."""

from collections.abc import Callable
from typing import Any

import pytest

Make = Callable[..., Any]


@pytest.mark.parametrize("done", [1, 7, 19])
@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 1.5, "seed": 11},
        {"presence_penalty": 1.5, "frequency_penalty": 0.5},
        {"repetition_penalty": 1.4, "temperature": 0.8, "seed": 3, "top_p": 0.9},
        {"ignore_eos": False, "min_tokens": 15, "temperature": 2.0, "seed": 5},
    ],
)
def test_a_replay_ends_as_the_whole_does(
    make: Make, prompts: list[list[int]], sampling: dict[str, Any], done: int
) -> None:
    """Output of an earlier attempt counts as output: to penalties, to limits and in the choice of each token."""
    driver = make()
    whole = driver.generate(prompts[3], **{"max_tokens": 20, **sampling})
    if done >= len(whole):
        pytest.fail("the whole answer is too short for this test")
    replay = driver.generate(prompts[3] + whole[:done], generated=done, **{"max_tokens": 20, **sampling})
    assert whole[:done] + replay == whole
