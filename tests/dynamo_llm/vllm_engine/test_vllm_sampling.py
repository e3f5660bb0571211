"""Sampling parameters do in the real vLLM what they say."""

from typing import Any

import pytest
from vllm_driver import answer

pytestmark = pytest.mark.filterwarnings("default")  # vLLM's own deprecations are not ours to mend

_FORCED = 7


def _logprobs(outputs: list[Any]) -> list[Any]:
    return [entry for output in outputs for entry in output.logprobs or ()]


def test_a_seed_repeats_and_another_one_differs(driver: Any, question: list[int]) -> None:
    """Whatever else is in the batch."""
    more: dict[str, Any] = {"temperature": 2.0, "max_tokens": 12, "ignore_eos": True}
    alone = driver.tokens(question, seed=1, **more)
    keys = [driver.submit(question, seed=seed, **more) for seed in (2, 1, 3)]
    other, same, third = (answer(driver.finish(key)) for key in keys)
    assert same == alone
    assert len({tuple(alone), tuple(other), tuple(third)}) == 3


@pytest.mark.parametrize("filter_", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-3}], ids=str)
def test_the_narrowest_filters_are_greedy(driver: Any, question: list[int], filter_: dict[str, Any]) -> None:
    """Each leaves the likeliest token alone, at a temperature that would choose others."""
    greedy = driver.tokens(question, max_tokens=8, ignore_eos=True)
    assert driver.tokens(question, max_tokens=8, ignore_eos=True, seed=1, temperature=2.0) != greedy
    more = {"temperature": 2.0, "seed": 1, **filter_}
    assert driver.tokens(question, max_tokens=8, ignore_eos=True, **more) == greedy


def test_logit_bias_forces_and_bans(driver: Any, question: list[int]) -> None:
    """A token far above all others is the only one; a banned one never comes."""
    first = driver.tokens(question)[0]
    assert driver.tokens(question, logit_bias={_FORCED: 100.0}) == [_FORCED] * 4
    assert first not in driver.tokens(question, logit_bias={first: -100.0}, ignore_eos=True)


@pytest.mark.parametrize(
    "penalty", [{"presence": 2.0}, {"frequency": 2.0}, {"presence": -2.0, "frequency": 1.0}], ids=str
)
def test_penalties_fall_on_what_came(driver: Any, question: list[int], penalty: dict[str, float]) -> None:
    """Of two tokens the one comes that is likelier, less what the penalties take off for having come before."""
    named = (5, 6)
    extra = {"allowed_token_ids": [*named], "logprob_token_ids": [*named]}
    more = {f"{name}_penalty": value for name, value in penalty.items()}
    outputs = driver.run(question, max_tokens=12, extra=extra, **more)
    came: list[int] = []
    for entry in _logprobs(outputs):  # the model's own: before penalties
        scores = {
            token: logprob
            - penalty.get("presence", 0.0) * (token in came)
            - penalty.get("frequency", 0.0) * came.count(token)
            for token, logprob in entry.top
            if token in named
        }
        assert entry.token_id == max(scores, key=lambda token: scores[token])
        came.append(entry.token_id)
    assert set(came) == set(named)


def test_the_repetition_penalty_counts_the_prompt(driver: Any, question: list[int]) -> None:
    """A token of the prompt, the likeliest otherwise, does not come again."""
    (first, *_) = driver.tokens(question)
    prompt = [first, *question]
    assert driver.tokens(prompt)[0] == first
    assert first not in driver.tokens(prompt, repetition_penalty=50.0, ignore_eos=True)


def test_end_of_sequence_min_tokens_and_ignore_eos(driver: Any, question: list[int]) -> None:
    """The likeliest token is end-of-sequence: it ends at once, after `min_tokens`, or not at all."""
    (end,) = driver.engine.info.eos_token_ids
    more: dict[str, Any] = {"logit_bias": {end: 100.0}, "max_tokens": 8}
    assert driver.tokens(question, **more) == [end]
    late = driver.run(question, min_tokens=3, **more)
    assert late[-1].finish_reason == "stop"
    assert end not in answer(late)[:3]
    assert answer(late)[3:] == [end]
    assert driver.tokens(question, ignore_eos=True, **more) == [end] * 8


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_a_stop_token_is_the_last_token(driver: Any, question: list[int], ignore_eos: bool) -> None:
    """A stop token ends the sequence and is reported, as by the torch engine; not before `min_tokens`."""
    whole = driver.tokens(question, max_tokens=6, ignore_eos=True)
    stopped = driver.run(question, max_tokens=6, ignore_eos=ignore_eos, stop_token_ids=(whole[1], whole[3]))
    assert stopped[-1].finish_reason == "stop"
    assert answer(stopped) == whole[:2]
    late = driver.tokens(question, max_tokens=6, ignore_eos=True, min_tokens=3, stop_token_ids=(whole[1],))
    assert whole[1] not in late[:3]


def test_bad_words_do_not_come(driver: Any, tokenizer: Any, question: list[int]) -> None:
    """Words are text, which vLLM turns into tokens by the model's own tokenizer."""
    free = driver.tokens(question)
    word = tokenizer.decode(free[:1]).strip()
    assert word
    assert free[0] not in driver.tokens(question, extra={"bad_words": [word]})


def test_allowed_token_ids_leave_no_others(driver: Any, question: list[int]) -> None:
    """One of vLLM's own fields, by its name."""
    tokens = driver.tokens(question, extra={"allowed_token_ids": [5, 6]}, temperature=2.0, max_tokens=12)
    assert set(tokens) <= {5, 6}


def test_repetition_detection_ends_a_sequence(driver: Any, question: list[int]) -> None:
    """vLLM's reason for it is one of its own; ours is `stop`."""
    detection = {"max_pattern_size": 1, "min_pattern_size": 1, "min_count": 3}
    extra = {"allowed_token_ids": [5], "repetition_detection": detection}
    outputs = driver.run(question, max_tokens=8, extra=extra)
    assert outputs[-1].finish_reason == "stop"
    assert answer(outputs) == [5, 5, 5]


def test_a_wider_stream_interval_gives_fewer_outputs(driver: Any, question: list[int]) -> None:
    """And the same tokens, each once, with their log-probabilities."""
    plain = driver.run(question, max_tokens=9, ignore_eos=True, logprobs=1)
    wide = driver.run(question, max_tokens=9, ignore_eos=True, logprobs=1, extra={"stream_interval": 4})
    assert len(wide) < len(plain)
    assert answer(wide) == answer(plain)
    assert [entry.token_id for entry in _logprobs(wide)] == answer(plain)


@pytest.mark.parametrize("flat", [False, True])
def test_logprobs_in_both_of_vllms_shapes(driver: Any, question: list[int], flat: bool) -> None:
    """Lists and flat arrays say the same; the first token of the prompt has none."""
    more: dict[str, Any] = {"logprobs": 2, "prompt_logprobs": 2, "ignore_eos": True}
    plain = driver.run(question, **more)
    outputs = driver.run(question, extra={"flat_logprobs": flat}, **more)
    assert _logprobs(outputs) == _logprobs(plain)
    prompt = outputs[0].started.prompt_logprobs
    assert prompt[0] is None
    assert [entry.token_id for entry in prompt[1:]] == question[1:]
    assert prompt == plain[0].started.prompt_logprobs


@pytest.mark.parametrize("logprobs", [None, 2])
def test_logprobs_of_named_tokens(driver: Any, question: list[int], logprobs: int | None) -> None:
    """Those of the tokens that a request names, and of the chosen one, likeliest first."""
    outputs = driver.run(question, logprobs=logprobs, extra={"logprob_token_ids": [5, 6]}, ignore_eos=True)
    entries = _logprobs(outputs)
    assert [entry.token_id for entry in entries] == answer(outputs)
    for entry in entries:
        assert {token for token, _ in entry.top} == {5, 6, entry.token_id}
        assert sorted(entry.top, key=lambda one: -one[1]) == entry.top


def test_what_vllm_refuses_later_is_the_request_s_end_only(driver: Any, question: list[int]) -> None:
    """Some fields need an engine of another kind: vLLM says so when it enters the request, and serves the next."""
    outputs = driver.run(question, extra={"prompt_logprob_token_ids": [[1], [2], [3], [4]]})
    assert outputs[-1].finish_reason == "error"
    assert outputs[-1].error.code == "invalid_request"
    assert "prompt_logprob_token_ids" in outputs[-1].error.message
    assert len(driver.tokens(question, ignore_eos=True)) == 4
