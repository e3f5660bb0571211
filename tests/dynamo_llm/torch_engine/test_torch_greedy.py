"""Greedy token ids are transformers' own, however the work was cut into steps."""

from collections.abc import Callable
from typing import Any

import pytest

Make = Callable[..., Any]


@pytest.fixture(params=["native", "sdpa"])
def attention(request: pytest.FixtureRequest) -> str:
    """Both operator sets."""
    return request.param


def test_single_requests(make: Make, reference: Any, prompts: list[list[int]], attention: str) -> None:
    """One request at a time, prompts of every length relative to the block size."""
    driver = make(attention=attention)
    for prompt in prompts:
        assert driver.generate(prompt, max_tokens=24) == reference.greedy(prompt, 24)


def test_batch_that_changes(make: Make, reference: Any, prompts: list[list[int]], attention: str) -> None:
    """Requests join a running batch and leave it at different steps."""
    driver = make(attention=attention)
    lengths = [24, 3, 17, 9, 24, 12, 20, 5]
    keys = []
    for prompt, length in zip(prompts, lengths, strict=True):
        keys.append(driver.submit(prompt, max_tokens=length))
        driver.step()
        driver.step()
    driver.run()
    for key, prompt, length in zip(keys, prompts, lengths, strict=True):
        assert driver.tokens(key) == reference.greedy(prompt, 24)[:length]
        assert driver.finish(key) == "length"


@pytest.mark.parametrize("budget", [11, 8])
def test_chunked_prefill(make: Make, reference: Any, prompts: list[list[int]], attention: str, budget: int) -> None:
    """Prompts are cut into chunks of a few tokens, down to a single one, beside running decodes."""
    driver = make(attention=attention, max_batch_tokens=budget, max_seqs=8)
    keys = [driver.submit(prompt, max_tokens=24) for prompt in prompts]
    most = 0
    while not all(driver.finish(key) for key in keys):
        result = driver.step()
        assert result.prefill_tokens + result.decode_tokens <= budget
        most = max(most, min(result.prefill_tokens, result.decode_tokens))
    assert most > 0, "no step mixed prefill and decode"
    for key, prompt in zip(keys, prompts, strict=True):
        assert driver.tokens(key) == reference.greedy(prompt, 24)


def test_prefix_hits(make: Make, reference: Any, prompts: list[list[int]], attention: str) -> None:
    """A prompt that is cached, wholly or in part, gives the same tokens and says what was reused."""
    driver = make(attention=attention)
    prompt = prompts[5]
    first = driver.submit(prompt, max_tokens=24)
    driver.run()
    assert driver.started(first).cached_tokens == 0
    whole = driver.submit(prompt, max_tokens=24)
    driver.run()
    assert driver.started(whole).cached_tokens == 112, "the last block is computed again: its last token is needed"
    other = prompt[:80] + prompts[4]
    part = driver.submit(other, max_tokens=24)
    driver.run()
    assert driver.started(part).cached_tokens == 80
    assert driver.tokens(whole) == driver.tokens(first) == reference.greedy(prompt, 24)
    assert driver.tokens(part) == reference.greedy(other, 24)


def test_generated_blocks_are_reused(make: Make, reference: Any, prompts: list[list[int]]) -> None:
    """The next turn of a conversation reuses the blocks of the answer before."""
    driver = make()
    answer = driver.generate(prompts[2], max_tokens=40)
    turn = prompts[2] + answer + prompts[0]
    key = driver.submit(turn, max_tokens=8)
    driver.run()
    assert driver.started(key).cached_tokens == 64, "33 + 40 tokens, of which the last has no KV: four whole blocks"
    assert driver.tokens(key) == reference.greedy(turn, 8)


def test_concurrent_twins_share(make: Make, reference: Any, prompts: list[list[int]]) -> None:
    """Two requests with the same prompt in one step compute it twice and keep it once."""
    driver = make()
    keys = [driver.submit(prompts[4], max_tokens=24) for _ in range(2)]
    driver.run()
    assert driver.tokens(keys[0]) == driver.tokens(keys[1]) == reference.greedy(prompts[4], 24)
    assert len(driver.resident) == (70 + 23) // 16


def test_preemption(make: Make, reference: Any, prompts: list[list[int]], attention: str) -> None:
    """With too few blocks for all, sequences are preempted, recomputed, and say the same."""
    driver = make(attention=attention, kv_blocks=14, prefix_caching=attention == "native")
    chosen = prompts[:4]
    keys = [driver.submit(prompt, max_tokens=60) for prompt in chosen]
    driver.run()
    assert driver.engine._scheduler.preemptions > 0
    for key, prompt in zip(keys, chosen, strict=True):
        assert driver.tokens(key) == reference.greedy(prompt, 60)
    assert driver.engine.load().kv_blocks_used == 0


def test_salts_do_not_share(make: Make, prompts: list[list[int]]) -> None:
    """A request with another cache salt reuses nothing."""
    driver = make()
    driver.submit(prompts[4], cache_salt="one")
    driver.run()
    other = driver.submit(prompts[4], cache_salt="two")
    driver.run()
    same = driver.submit(prompts[4], cache_salt="one")
    driver.run()
    assert driver.started(other).cached_tokens == 0
    assert driver.started(same).cached_tokens == 64


def test_caching_off(make: Make, reference: Any, prompts: list[list[int]]) -> None:
    """Without prefix caching nothing is reused or announced."""
    driver = make(prefix_caching=False)
    for _ in range(2):
        key = driver.submit(prompts[4], max_tokens=24)
        driver.run()
        assert driver.started(key).cached_tokens == 0
        assert driver.tokens(key) == reference.greedy(prompts[4], 24)
    assert driver.ops == []


def test_pieces_of_one_token(make: Make, reference: Any, prompts: list[list[int]], attention: str) -> None:
    """Beside a decode the budget leaves one prompt token a step: a piece that is neither a chunk nor a decode."""
    driver = make(attention=attention, max_batch_tokens=2, max_seqs=2)
    keys = [driver.submit(prompt, max_tokens=24) for prompt in prompts[:2]]
    driver.run()
    for key, prompt in zip(keys, prompts, strict=False):
        assert driver.tokens(key) == reference.greedy(prompt, 24)
