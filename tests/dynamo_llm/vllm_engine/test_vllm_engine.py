"""The real vLLM, on the demo model and a CPU, behind the interface of all engines."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dynamo_llm.engines.base import EngineError, RequestError
from dynamo_llm.engines.vllm_engine.options import parse_options
from kvstore.cards import Stored
from kvstore.hashing import block_hashes, root_seed
from kvstore.wire import Output

pytestmark = pytest.mark.filterwarnings("default")  # vLLM's own deprecations are not ours to mend


def _tokens(outputs: list[Output]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def _stored(driver: Any) -> list[int]:
    return [block for op in driver.ops if isinstance(op, Stored) for block in op.hashes]


@pytest.mark.parametrize("salt", ["", "tenant"])
def test_blocks_bear_the_hashes_that_a_router_computes(driver: Any, salt: str) -> None:
    """vLLM's events come out as the hashes of the prompt's own blocks, with and without a salt."""
    prompt = list(range(100, 196))
    expected = block_hashes(np.array(prompt, np.uint32), 32, seed=root_seed("demo", "", salt)).tolist()
    driver.run(prompt, cache_salt=salt)
    while not set(expected) <= set(_stored(driver)):
        driver.step()
    outputs = driver.run(prompt, cache_salt=salt)
    assert outputs[0].started is not None
    assert outputs[0].started.cached_tokens == 64


def test_greedy_tokens_repeat_and_end_by_length(driver: Any) -> None:
    """The same prompt gives the same tokens, as many as asked for, and one final output."""
    first, second = (driver.run(list(range(20, 40)), max_tokens=6, ignore_eos=True) for _ in range(2))
    assert _tokens(first) == _tokens(second)
    assert len(_tokens(first)) == 6
    assert [output.finish_reason for output in first if output.finish_reason] == ["length"]


def test_a_stop_token_is_the_last_token(driver: Any) -> None:
    """A stop token ends the sequence and is reported, as by the torch engine."""
    prompt = list(range(20, 40))
    third = _tokens(driver.run(prompt, max_tokens=6, ignore_eos=True))[2]
    stopped = driver.run(prompt, max_tokens=6, ignore_eos=True, stop_token_ids=(third,))
    assert stopped[-1].finish_reason == "stop"
    assert _tokens(stopped)[-1] == third


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
    assert len(started.prompt_logprobs) == 20


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
    ],
)
def test_bad_requests_are_refused_at_once(driver: Any, more: dict[str, Any], reason: str) -> None:
    """What can never be served is refused in one line, before vLLM sees it."""
    with pytest.raises(RequestError, match=reason) as refusal:
        driver.submit([1, 2, 3], **more)
    assert "\n" not in refusal.value.message


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"blok_size": 16}, "did you mean 'block_size'"),
        ({"model": "other"}, "is the worker's to set"),
        ({"block_size": "many"}, "block_size"),
        ({"lora_modules": {"poet": "/nowhere"}}, "is no folder"),
    ],
)
def test_wrong_options_give_one_line(tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    """Engine options are checked before anything is loaded."""
    with pytest.raises(EngineError, match=reason) as refusal:
        parse_options(tmp_path, options, None)  # type: ignore[arg-type]
    assert "\n" not in str(refusal.value)


def test_guided_choice(driver: Any) -> None:
    """A choice leaves the model nothing else to say."""
    from tokenizers import Tokenizer

    folder = driver.engine._options.args.model
    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    outputs = driver.run(list(range(20, 40)), max_tokens=32, extra={"guided_choice": ["Paris", "Rome"]})
    assert tokenizer.decode(_tokens(outputs), skip_special_tokens=True) in ("Paris", "Rome")
