"""The real vLLM, on the demo model and a CPU, behind the interface of all engines."""

from typing import Any

import pytest
from vllm_driver import answer, hashes, resident

from dynamo_llm.engines.base import RequestError

pytestmark = pytest.mark.filterwarnings("default")  # vLLM's own deprecations are not ours to mend


@pytest.mark.parametrize("salt", ["", "tenant"])
def test_blocks_bear_the_hashes_that_a_router_computes(driver: Any, salt: str) -> None:
    """vLLM's events come out as the hashes of the prompt's own blocks, with and without a salt."""
    prompt = list(range(100, 196))
    driver.run(prompt, cache_salt=salt)
    while not set(hashes(prompt, salt=salt)) <= resident(driver.ops):
        driver.step()
    outputs = driver.run(prompt, cache_salt=salt)
    assert outputs[0].started is not None
    assert outputs[0].started.cached_tokens == 64


def test_greedy_tokens_repeat_and_end_by_length(driver: Any) -> None:
    """The same prompt gives the same tokens, as many as asked for, and one final output."""
    first, second = (driver.run(list(range(20, 40)), max_tokens=6, ignore_eos=True) for _ in range(2))
    assert answer(first) == answer(second)
    assert len(answer(first)) == 6
    assert [output.finish_reason for output in first if output.finish_reason] == ["length"]


def test_logprobs_of_output_and_prompt(driver: Any) -> None:
    """A greedy token is the likeliest of its own list; the prompt's first token has no logprob."""
    outputs = driver.run(list(range(40, 60)), logprobs=3, prompt_logprobs=1)
    for entry in (entry for output in outputs for entry in output.logprobs or ()):
        assert len(entry.top) == 3
        assert entry.top[0] == (entry.token_id, entry.logprob)
    started = outputs[0].started
    assert started is not None
    assert started.prompt_logprobs is not None
    assert started.prompt_logprobs[0] is None
    assert [entry.token_id for entry in started.prompt_logprobs[1:]] == list(range(41, 60))


def test_cancel_ends_a_running_request(driver: Any) -> None:
    """A cancelled request gets one final output that says so, and its blocks are free."""
    key = driver.submit(list(range(60, 80)), max_tokens=400, ignore_eos=True)
    while key not in driver.outputs:
        driver.step()
    driver.engine.cancel(key)
    assert driver.finish(key)[-1].finish_reason == "cancelled"
    assert driver.engine.load().running == 0
    assert driver.engine.load().kv_blocks_used == 0


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"lora": "poet"}, "there is no LoRA adapter 'poet'"),
        ({"extra": {"guided_jsn": "{}"}}, "did you mean 'guided_json'"),
        ({"logit_bias": {5: float("nan")}}, "logit_bias must be finite"),
        ({"extra": {"stop": ["\n"]}}, "does not concern the engine"),
        ({"extra": {"n": 2}}, "does not concern the engine"),
        ({"extra": {"allowed_token_ids": [5000]}}, "allowed_token_ids"),
        ({"extra": {"allowed_token_ids": "some"}}, "allowed_token_ids"),
    ],
)
def test_bad_requests_are_refused_at_once(driver: Any, more: dict[str, Any], reason: str) -> None:
    """What can never be served is refused in one line, before vLLM sees it."""
    with pytest.raises(RequestError, match=reason) as refusal:
        driver.submit([1, 2, 3], **more)
    assert "\n" not in refusal.value.message


@pytest.mark.parametrize("already", [1, 5, 9])
def test_a_request_goes_on_where_another_worker_left_it(driver: Any, question: list[int], already: int) -> None:
    """What an earlier attempt generated counts for `max_tokens`, and the rest is what the whole answer had there."""
    whole = driver.run(question, max_tokens=10, ignore_eos=True)
    rest = driver.run([*question, *answer(whole)[:already]], generated=already, max_tokens=10, ignore_eos=True)
    assert answer(rest) == answer(whole)[already:]
    assert rest[-1].finish_reason == "length"


def test_min_tokens_counts_what_another_worker_generated(driver: Any, question: list[int]) -> None:
    """Of six tokens at least, three are there: end-of-sequence is barred for three more, and not for longer."""
    (end,) = driver.engine.info.eos_token_ids
    bias = {end: 100.0}
    alone = driver.run(question, max_tokens=20, min_tokens=6, logit_bias=bias)
    assert alone[-1].finish_reason == "stop"
    assert len(answer(alone)) == 7
    rest = driver.run([*question, *answer(alone)[:3]], generated=3, max_tokens=20, min_tokens=6, logit_bias=bias)
    assert answer(rest) == answer(alone)[3:]
