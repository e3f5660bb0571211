"""The wire's sampling parameters and vLLM's own, field by field, in the object that vLLM is given. No engine."""

from array import array
from typing import Any

import pytest

from dynamo_llm.engines.base import EngineInfo, EngineRequest, RequestError
from dynamo_llm.engines.vllm_engine.sampling import _EXTRA, prompt_ids, to_vllm
from kvstore import wire

pytestmark = pytest.mark.filterwarnings("default")  # vLLM's own deprecations are not ours to mend

_INFO = EngineInfo(
    name="vllm",
    version="0",
    model="demo",
    block_size=32,
    kv_blocks=63,
    max_context=100,
    vocab_size=2048,
    eos_token_ids=(1,),
)

_WIRE: dict[str, tuple[Any, Any]] = {
    "max_tokens": (7, 7),
    "min_tokens": (3, 3),
    "temperature": (0.7, 0.7),
    "top_p": (0.8, 0.8),
    "top_k": (40, 40),
    "min_p": (0.1, 0.1),
    "seed": (11, 11),
    "repetition_penalty": (1.2, 1.2),
    "presence_penalty": (0.3, 0.3),
    "frequency_penalty": (0.4, 0.4),
    "logit_bias": ({5: -2.0}, {5: -2.0}),
    "stop_token_ids": ((9, 8), [9, 8]),
    "ignore_eos": (True, True),
    "logprobs": (4, 4),
    "prompt_logprobs": (2, 2),
}
"""What the wire says, and what vLLM is told by the same name."""

_VLLM: dict[str, Any] = {
    "allowed_token_ids": [5, 6],
    "bad_words": ["never"],
    "extra_args": {"one": 1},
    "flat_logprobs": True,
    "logprob_token_ids": [5, 6],
    "prompt_logprob_start": 1,
    "prompt_logprob_token_ids": [[5], [6]],
    "repetition_detection": {"max_pattern_size": 2, "min_pattern_size": 1, "min_count": 3},
    "routed_experts_prompt_start": 1,
    "skip_reading_prefix_cache": True,
    "stream_interval": 4,
    "thinking_token_budget": 16,
    "trace_decode_token_ids": [5, 6],
    "watermarking": False,
}
_NEEDS = {
    "prompt_logprob_start": {"prompt_logprob_token_ids": [[5], [6]]},
    "prompt_logprob_token_ids": {"prompt_logprob_start": 1},
}
"""Fields that vLLM takes only together with others."""


def _request(
    tokens: int = 10, *, generated: int = 0, kv_transfer_params: dict[str, Any] | None = None, **sampling: Any
) -> EngineRequest:
    return EngineRequest(
        key=1,
        token_ids=array("I", range(20, 20 + tokens)).tobytes(),
        sampling=wire.SamplingParams(**sampling),
        generated=generated,
        kv_transfer_params=kv_transfer_params,
    )


@pytest.mark.parametrize("field", [field for field in wire.SamplingParams.__struct_fields__ if field != "extra"])
def test_each_parameter_of_the_wire_arrives(field: str) -> None:
    """By its own name, and nothing else changes with it: a new field of the wire needs a row here."""
    value, expected = _WIRE[field]
    assert getattr(to_vllm(_request(), _INFO), field) != expected
    assert getattr(to_vllm(_request(**{field: value}), _INFO), field) == expected


@pytest.mark.parametrize("field", _EXTRA)
def test_each_parameter_of_vllm_passes_through(field: str) -> None:
    """In `extra`, by vLLM's name: a field of a new vLLM needs a row here."""
    value = _VLLM[field]
    params = to_vllm(_request(extra={field: value, **_NEEDS.get(field, {})}), _INFO)
    arrived = getattr(params, field)
    assert getattr(to_vllm(_request(), _INFO), field) != value
    if isinstance(value, dict) and not isinstance(arrived, dict):
        assert {name: getattr(arrived, name) for name in value} == value
    else:
        assert arrived == value or arrived.tolist() == value


def test_defaults_are_the_wire_s_and_not_the_model_s() -> None:
    """A request that says nothing samples from the whole distribution until the context is full, as tokens only."""
    params = to_vllm(_request(), _INFO)
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (1.0, 1.0, 0, 0.0)
    assert (params.max_tokens, params.min_tokens, params.seed, params.logit_bias) == (90, 0, None, None)
    assert (params.n, params.detokenize, params.stop, params.extra_args) == (1, False, [], None)


@pytest.mark.parametrize(
    ("asked", "generated", "expected"),
    [
        ({"max_tokens": 8}, 3, (5, 0)),
        ({"max_tokens": 8, "min_tokens": 5}, 3, (5, 2)),
        ({"max_tokens": 8, "min_tokens": 2}, 3, (5, 0)),
        ({"max_tokens": 4, "min_tokens": 8}, 0, (4, 4)),
        ({"max_tokens": 500}, 0, (90, 0)),
        ({}, 3, (90, 0)),
        # Nothing ends it early, so that end-of-sequence need not be barred: with `ignore_eos` it may come.
        ({"max_tokens": 8, "min_tokens": 5, "ignore_eos": True}, 0, (8, 0)),
        ({"max_tokens": 8, "min_tokens": 5, "ignore_eos": True, "stop_token_ids": (9,)}, 0, (8, 5)),
    ],
)
def test_counts_are_of_the_whole_answer(asked: dict[str, Any], generated: int, expected: tuple[int, int]) -> None:
    """What an earlier attempt generated is taken off, and the context has an end."""
    params = to_vllm(_request(generated=generated, **asked), _INFO)
    assert (params.max_tokens, params.min_tokens) == expected


def test_an_earlier_attempt_s_tokens_bear_the_penalties() -> None:
    """vLLM takes them for a prompt: a bias stands for the penalties, beside the request's own."""
    more = {"presence_penalty": 0.5, "frequency_penalty": 0.25, "logit_bias": {28: 1.0, 5: 2.0}}
    params = to_vllm(_request(generated=2, **more), _INFO)
    assert params.logit_bias == {28: 0.25, 29: -0.75, 5: 2.0}


def test_the_seed_moves_on_with_the_tokens() -> None:
    """An attempt that goes on must not draw the first tokens' random numbers again."""
    assert to_vllm(_request(generated=4, seed=7), _INFO).seed == 11
    assert to_vllm(_request(generated=4, seed=2**63 - 1), _INFO).seed == 3


def test_arguments_of_plugins_and_transfers_ride_together() -> None:
    """`extra_args`, `vllm_xargs` and the transfer's parameters are one map in vLLM."""
    extra = {"extra_args": {"one": 1, "two": 1}, "vllm_xargs": {"two": 2}}
    params = to_vllm(_request(extra=extra, kv_transfer_params={"host": "there"}), _INFO)
    assert params.extra_args == {"one": 1, "two": 2, "kv_transfer_params": {"host": "there"}}


def test_a_prompt_is_cut_to_its_last_tokens() -> None:
    """What an earlier attempt generated is no prompt, and stays."""
    assert prompt_ids(_request(extra={"truncate_prompt_tokens": 3})) == [27, 28, 29]
    assert prompt_ids(_request(generated=2, extra={"truncate_prompt_tokens": 3})) == [25, 26, 27, 28, 29]
    with pytest.raises(RequestError, match="must be at least 1"):
        prompt_ids(_request(extra={"truncate_prompt_tokens": 0}))


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"structured_outputs": {"regex": 5}}, "structured_outputs: .*5"),
        ({"structured_outputs": {"regex": "a", "jsno": "{}"}}, "did you mean 'json'"),
        ({"bad_words": 5}, "bad_words"),
        ({"stream_interval": "often"}, "stream_interval"),
        ({"min_tokens": 5}, "unknown sampling option 'min_tokens'"),
        ({"skip_special_tokens": False}, "does not concern the engine"),
    ],
)
def test_wrong_values_are_refused_in_one_line(extra: dict[str, Any], reason: str) -> None:
    """Each names its field."""
    with pytest.raises(RequestError, match=reason) as refusal:
        to_vllm(_request(extra=extra), _INFO)
    assert "\n" not in refusal.value.message
