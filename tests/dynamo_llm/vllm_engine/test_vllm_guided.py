"""Guided decoding on the real vLLM."""

import json
import re
from typing import Any

import pytest
from vllm_driver import answer

from dynamo_llm.engines.base import RequestError

pytestmark = pytest.mark.filterwarnings("default")  # vLLM's own deprecations are not ours to mend

_SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"const": "get_weather"},
        "arguments": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "arguments"],
    "additionalProperties": False,
}
_REGEX = r"[a-c]{3}-[0-9]{2}"
_GRAMMAR = 'root ::= "yes, " ("Paris" | "Rome")'


def _is_call(text: str) -> bool:
    return json.loads(text) in [{"name": "get_weather", "arguments": {"city": city}} for city in ("Paris", "Rome")]


@pytest.fixture(scope="module")
def story(tokenizer: Any) -> list[int]:
    """After it the demo model, which is small, comes to an end of a free JSON object."""
    tokens: list[int] = tokenizer.encode("Once upon a time, there was a little girl named").ids
    return tokens


_CASES = {
    "json": (_SCHEMA, _is_call),
    "regex": (_REGEX, lambda text: re.fullmatch(_REGEX, text)),
    "choice": (["Madrid", "Rome"], lambda text: text in ("Madrid", "Rome")),
    "grammar": (_GRAMMAR, lambda text: text in ("yes, Paris", "yes, Rome")),
    "json_object": (True, lambda text: isinstance(json.loads(text), dict)),
}


@pytest.mark.parametrize("older", [False, True], ids=["structured_outputs", "guided"])
@pytest.mark.parametrize("kind", _CASES)
def test_the_answer_matches(driver: Any, tokenizer: Any, story: list[int], kind: str, older: bool) -> None:
    """By both names, each kind of constraint leaves only answers that fit, and ends the sequence after one."""
    value, fits = _CASES[kind]
    extra = {f"guided_{kind}": value} if older else {"structured_outputs": {kind: value}}
    outputs = driver.run(story, max_tokens=64, extra=extra)
    assert outputs[-1].finish_reason == "stop"
    assert fits(tokenizer.decode(answer(outputs), skip_special_tokens=True))


def test_a_schema_may_be_text(driver: Any, tokenizer: Any, story: list[int]) -> None:
    """Clients of vllm_backend send the schema as JSON text."""
    tokens = driver.tokens(story, max_tokens=64, extra={"guided_json": json.dumps(_SCHEMA)})
    assert _is_call(tokenizer.decode(tokens, skip_special_tokens=True))


def test_guided_and_free_requests_share_a_batch(driver: Any, tokenizer: Any, story: list[int]) -> None:
    """A constraint binds its own request only."""
    free = driver.tokens(story, max_tokens=8, ignore_eos=True)
    guided = driver.submit(story, max_tokens=32, extra={"structured_outputs": {"regex": _REGEX}})
    beside = driver.submit(story, max_tokens=8, ignore_eos=True)
    assert re.fullmatch(_REGEX, tokenizer.decode(answer(driver.finish(guided)), skip_special_tokens=True))
    assert answer(driver.finish(beside)) == free


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"guided_grammar": "root ::= ("}, "grammar"),
        ({"guided_regex": "[a-"}, "regex"),
        ({"guided_json": "{nope"}, "JSON"),
        ({"guided_json": {"type": "nonsense"}}, "nonsense"),
        ({"guided_choice": []}, "empty"),
        ({"structured_outputs": {"structural_tag": "{bad"}}, "grammar"),
        ({"structured_outputs": {"regex": "a", "json": "{}"}}, "one kind"),
        ({"structured_outputs": {"jsno": "{}"}}, "did you mean 'json'"),
        ({"structured_outputs": "json"}, "must be a map"),
    ],
)
def test_a_broken_constraint_is_refused_alone(
    driver: Any, story: list[int], extra: dict[str, Any], reason: str
) -> None:
    """The request is refused in one line; one that runs beside it, and those after it, are served."""
    beside = driver.submit(story, max_tokens=6, ignore_eos=True)
    with pytest.raises(RequestError, match=reason) as refusal:
        driver.submit(story, extra=extra)
    assert refusal.value.code == "invalid_request"
    assert "\n" not in refusal.value.message
    tokens = answer(driver.finish(beside))
    assert driver.tokens(story, max_tokens=6, ignore_eos=True) == tokens


def test_a_guided_request_does_not_go_on_from_another_worker(driver: Any, story: list[int]) -> None:
    """vLLM would take the tokens that are there for a prompt, and begin the constraint anew after them."""
    with pytest.raises(RequestError, match="send it anew"):
        driver.submit(story, generated=2, extra={"guided_regex": _REGEX})
