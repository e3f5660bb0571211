"""Each sampling parameter changes what it should, and nothing depends on the rest of the batch."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from dynamo_llm.engines.torch_engine.sampling import sample, uniforms
from dynamo_llm.engines.torch_engine.sequence import Sequence
from kvstore.wire import SamplingParams

Make = Callable[..., Any]


def draws(logits: list[float], n: int = 2000, tokens: list[int] | None = None, **params: Any) -> Counter[int]:
    """How often each token is drawn for n different seeds."""
    rows = torch.tensor(logits).repeat(n, 1)
    sampling = SamplingParams(**params)
    sequences = [Sequence(i, list(tokens or [0]), sampling, max_tokens=99, seed=i) for i in range(n)]
    chosen, _ = sample(rows, sequences)
    return Counter(chosen)


LOGITS = [0.0, 1.0, 2.0, 3.0]
PROBABILITIES = torch.tensor(LOGITS).softmax(0).tolist()


def test_draws_follow_the_distribution() -> None:
    """Frequencies over many seeds are the softmax of the logits."""
    counts = draws(LOGITS, 20_000)
    for token, p in enumerate(PROBABILITIES):
        assert counts[token] / 20_000 == pytest.approx(p, abs=0.015)


def test_temperature() -> None:
    """Temperature divides the logits."""
    counts = draws(LOGITS, 20_000, temperature=2.0)
    for token, p in enumerate((torch.tensor(LOGITS) / 2).softmax(0).tolist()):
        assert counts[token] / 20_000 == pytest.approx(p, abs=0.015)


@pytest.mark.parametrize("temperature", [0.0, 1e-9])
def test_cold_is_greedy(temperature: float) -> None:
    """Temperature 0, and one too small to divide by, take the maximum."""
    assert set(draws(LOGITS, temperature=temperature, logprobs=1)) == {3}


@pytest.mark.parametrize(
    ("params", "left"),
    [
        ({"top_k": 1}, {3}),
        ({"top_k": 2}, {2, 3}),
        ({"top_k": 9}, {0, 1, 2, 3}),
        ({"top_p": 0.5}, {3}),
        ({"top_p": 0.7}, {2, 3}),
        ({"top_p": 0.95}, {1, 2, 3}),
        ({"min_p": 0.3}, {2, 3}),
        ({"min_p": 0.1}, {1, 2, 3}),
        ({"min_p": 1.0}, {3}),
        # 0.73 of the two that top_k leaves is the likeliest one's share, though only 0.64 of all.
        ({"top_k": 2, "top_p": 0.72}, {3}),
        ({"top_k": 2, "top_p": 0.74}, {2, 3}),
    ],
)
def test_filters(params: dict[str, Any], left: set[int]) -> None:
    """top_k, top_p and min_p leave exactly the tokens they should, each renormalised for the next."""
    counts = draws(LOGITS, **params)
    assert set(counts) == left
    total = sum(PROBABILITIES[token] for token in left)
    for token in left:
        assert counts[token] / 2000 == pytest.approx(PROBABILITIES[token] / total, abs=0.05)


def test_logit_bias() -> None:
    """A bias is added to a token's logit, for greedy and for drawn tokens."""
    assert set(draws(LOGITS, temperature=0, logit_bias={0: 3.5})) == {0}
    assert set(draws(LOGITS, logit_bias={3: -100.0, 2: -100.0, 1: -100.0})) == {0}


def penalised(**params: Any) -> list[float]:
    """What becomes of logits [2, 2, -2, 0.5] when the prompt is token 0 and the output tokens 1, 1 and 2."""
    logits = torch.tensor([[2.0, 2.0, -2.0, 0.5]])
    sequence = Sequence(0, [0], SamplingParams(temperature=0, **params), max_tokens=9)
    sequence.tokens += [1, 1, 2]
    sample(logits, [sequence])
    return logits[0].tolist()


@pytest.mark.parametrize(
    ("params", "logits"),
    [
        ({"repetition_penalty": 2.0}, [1.0, 1.0, -4.0, 0.5]),
        ({"presence_penalty": 0.5}, [2.0, 1.5, -2.5, 0.5]),
        ({"frequency_penalty": 0.5}, [2.0, 1.0, -2.5, 0.5]),
        ({"repetition_penalty": 2.0, "presence_penalty": 1.0, "frequency_penalty": 0.5}, [1.0, -1.0, -5.5, 0.5]),
    ],
)
def test_penalties(params: dict[str, float], logits: list[float]) -> None:
    """Repetition counts the prompt in, presence and frequency only the output."""
    assert penalised(**params) == logits


def test_penalty_counts_grow() -> None:
    """Counts follow the sequence from step to step."""
    sequence = Sequence(0, [9], SamplingParams(temperature=0, frequency_penalty=1.0), max_tokens=99)
    chosen = []
    for _ in range(4):
        tokens, _ = sample(torch.tensor([[2.5, 1.0, 0.0] + [-9.0] * 7]), [sequence])
        sequence.tokens += tokens
        chosen += tokens
    assert chosen == [0, 0, 1, 0] or chosen == [0, 0, 0, 1]


def test_mixed_batch() -> None:
    """Rows with different parameters in one batch get what each gets alone."""
    variants = [
        {"temperature": 0.0},
        {},
        {"temperature": 0.7, "top_p": 0.9},
        {"top_k": 3, "logit_bias": {5: 2.0}},
        {"min_p": 0.05, "repetition_penalty": 1.3},
        {"presence_penalty": 1.0, "logprobs": 2},
        {"temperature": 0.0, "min_tokens": 5},
    ]
    logits = torch.randn(len(variants), 50, generator=torch.Generator().manual_seed(3))

    def sequence(i: int) -> Sequence:
        made = Sequence(i, [1, 2, 3], SamplingParams(**variants[i]), max_tokens=99, seed=100 + i, stop_ids=(7, 8))
        made.tokens += [4, 4]
        return made

    together, logprobs = sample(logits.clone(), [sequence(i) for i in range(len(variants))])
    alone = [sample(logits[i : i + 1].clone(), [sequence(i)]) for i in range(len(variants))]
    assert together == [tokens[0] for tokens, _ in alone]
    assert [entry is not None for entry in logprobs] == [i == 5 for i in range(len(variants))]
    assert logprobs[5] is not None
    assert len(logprobs[5].top) == 2


def test_uniforms_are_uniform_and_stateless() -> None:
    """Equal mean and spread over seeds and over positions; the same pair always gives the same number."""
    for numbers in (uniforms(range(10_000), [7] * 10_000), uniforms([7] * 10_000, range(10_000))):
        assert numbers.min() > 0
        assert numbers.max() < 1
        assert np.histogram(numbers, 10, (0, 1))[0].min() > 850
    assert uniforms([2**64 - 1, 5], [3, 4])[1] == uniforms([5], [4])[0]


SAMPLED = {"temperature": 1.0, "max_tokens": 20, "top_p": 0.95}


def test_seed_reproduces(make: Make, prompts: list[list[int]]) -> None:
    """A seed gives the same tokens alone, in a batch, in chunks, after preemption; another seed others."""
    alone = make().generate(prompts[3], seed=11, **SAMPLED)
    assert make().generate(prompts[3], seed=12, **SAMPLED) != alone
    for options in ({}, {"max_batch_tokens": 16}, {"kv_blocks": 9}):
        driver = make(**options)
        others = [driver.submit(prompt, temperature=1.0, max_tokens=30) for prompt in prompts[:3]]
        driver.step()
        key = driver.submit(prompts[3], seed=11, **SAMPLED)
        driver.run()
        assert driver.tokens(key) == alone
        assert all(driver.finish(other) == "length" for other in others)
    assert driver.engine._scheduler.preemptions > 0


def test_seeds_of_any_size(make: Make, prompts: list[list[int]]) -> None:
    """Negative and huge seeds are seeds too."""
    driver = make()
    first = driver.generate(prompts[0], seed=-1, **SAMPLED)
    assert driver.generate(prompts[0], seed=2**64 - 1, **SAMPLED) == first
    assert driver.generate(prompts[0], seed=2**80, **SAMPLED) == driver.generate(prompts[0], seed=0, **SAMPLED)


def test_without_seed_answers_differ(make: Make, prompts: list[list[int]]) -> None:
    """Requests without a seed draw one each."""
    driver = make()
    answers = {tuple(driver.generate(prompts[0], temperature=2.0, max_tokens=20)) for _ in range(4)}
    assert len(answers) == 4


def test_replay_goes_on_as_it_would_have(make: Make, prompts: list[list[int]]) -> None:
    """Prompt and first tokens replayed with the same seed give the same rest: another worker can take over."""
    driver = make()
    whole = driver.generate(prompts[0], seed=5, **SAMPLED)
    rest = driver.generate(prompts[0] + whole[:8], seed=5, **(SAMPLED | {"max_tokens": 12}))
    assert whole[:8] + rest == whole


def test_stop_token_ends(make: Make, reference: Any, prompts: list[list[int]]) -> None:
    """A stop token is the last token of the answer, and the reason is `stop`."""
    expected = reference.greedy(prompts[0], 24)
    stop = expected[6]
    driver = make()
    key = driver.submit(prompts[0], max_tokens=24, stop_token_ids=(stop,))
    driver.run()
    assert driver.tokens(key) == expected[: expected.index(stop) + 1]
    assert driver.finish(key) == "stop"


def test_end_of_sequence(make: Make, prompts: list[list[int]]) -> None:
    """The model's own end-of-sequence ends an answer unless it is ignored."""
    driver = make()
    eos = driver.engine.info.eos_token_ids[0]
    bias = {eos: 1000.0}
    ended = driver.submit(prompts[0], max_tokens=5, logit_bias=bias, ignore_eos=False)
    ignored = driver.submit(prompts[0], max_tokens=5, logit_bias=bias, ignore_eos=True)
    driver.run()
    assert (driver.tokens(ended), driver.finish(ended)) == ([eos], "stop")
    assert (driver.tokens(ignored), driver.finish(ignored)) == ([eos] * 5, "length")


def test_min_tokens(make: Make, prompts: list[list[int]]) -> None:
    """Neither end-of-sequence nor a stop token comes before `min_tokens`, however likely."""
    driver = make()
    eos = driver.engine.info.eos_token_ids[0]
    key = driver.submit(
        prompts[0],
        max_tokens=9,
        min_tokens=4,
        logit_bias={eos: 1000.0, 77: 900.0},
        stop_token_ids=(77,),
        ignore_eos=False,
    )
    driver.run()
    tokens = driver.tokens(key)
    assert len(tokens) == 5
    assert tokens[-1] == eos
    assert not {eos, 77} & set(tokens[:4])


def test_max_tokens_and_context(make: Make, prompts: list[list[int]]) -> None:
    """An answer ends at `max_tokens`, and without one where the context is full."""
    driver = make(max_context=64)
    assert len(driver.generate(prompts[2], max_tokens=1)) == 1
    assert len(driver.generate(prompts[2], max_tokens=None)) == 64 - 33
    assert len(driver.generate(prompts[2], max_tokens=500)) == 64 - 33


def test_logprobs(make: Make, reference: Any, prompts: list[list[int]]) -> None:
    """Logprobs are the raw model's, whatever penalties and temperature did to the choice."""
    driver = make()
    plain = driver.submit(prompts[4], max_tokens=12, logprobs=5)
    edited = driver.submit(
        prompts[4], max_tokens=12, logprobs=3, temperature=0.8, seed=1, repetition_penalty=1.5, logit_bias={9: 2.0}
    )
    bare = driver.submit(prompts[4], max_tokens=12, logprobs=0)
    driver.run()
    for key, count in ((plain, 5), (edited, 3), (bare, 0)):
        tokens = driver.tokens(key)
        expected = reference.logprobs(prompts[4] + tokens)[len(prompts[4]) - 1 :]
        entries = driver.logprobs(key)
        assert [entry.token_id for entry in entries] == tokens
        for entry, row in zip(entries, expected, strict=False):
            assert entry.logprob == pytest.approx(row[entry.token_id].item(), abs=1e-4)
            top = row.topk(max(count, 1))
            assert len(entry.top) == count
            for (token, logprob), value in zip(entry.top, top.values.tolist(), strict=False):
                assert logprob == pytest.approx(value, abs=1e-4)
                assert logprob == pytest.approx(row[token].item(), abs=1e-4)


@pytest.mark.parametrize("options", [{}, {"max_batch_tokens": 16}])
def test_prompt_logprobs(make: Make, reference: Any, prompts: list[list[int]], options: dict[str, int]) -> None:
    """Prompt logprobs are transformers', also when the prompt is cached or computed in chunks."""
    driver = make(**options)
    driver.generate(prompts[4])
    key = driver.submit(prompts[4], max_tokens=3, prompt_logprobs=2)
    driver.run()
    entries = driver.started(key).prompt_logprobs
    expected = reference.logprobs(prompts[4])
    assert len(entries) == len(prompts[4])
    assert entries[0] is None
    for position in range(1, len(entries)):
        entry, row = entries[position], expected[position - 1]
        assert entry.token_id == prompts[4][position]
        assert entry.logprob == pytest.approx(row[entry.token_id].item(), abs=1e-4)
        assert [logprob for _, logprob in entry.top] == pytest.approx(row.topk(2).values.tolist(), abs=1e-4)
    assert driver.tokens(key) == reference.greedy(prompts[4], 3)


def test_prompt_logprobs_of_one_token(make: Make, prompts: list[list[int]]) -> None:
    """A prompt of one token has nothing to be judged by."""
    driver = make()
    key = driver.submit(prompts[6], prompt_logprobs=0)
    driver.run()
    assert driver.started(key).prompt_logprobs == [None]


def test_more_logprobs_than_tokens() -> None:
    """Asking for more alternatives than the vocabulary has gives them all."""
    sequence = Sequence(0, [0], SamplingParams(logprobs=100), max_tokens=9)
    _, logprobs = sample(torch.tensor([LOGITS]), [sequence])
    assert logprobs[0] is not None
    assert [token for token, _ in logprobs[0].top] == [3, 2, 1, 0]


HOPELESS = [
    {"repetition_penalty": 1e-39},
    {"stop_token_ids": tuple(range(2048)), "min_tokens": 4},
]


@pytest.mark.parametrize("filters", [{}, {"top_k": 5}])
@pytest.mark.parametrize("params", HOPELESS)
def test_a_row_without_a_distribution_harms_nobody(
    make: Make, prompts: list[list[int]], params: dict[str, Any], filters: dict[str, Any]
) -> None:
    """Parameters that leave no probability to any token cost their own request its sense, and no other one anything."""
    driver = make(prefix_caching=False)
    alone = driver.generate(prompts[1], temperature=1.0, seed=5, **filters)
    hopeless = driver.submit(prompts[0], temperature=1.0, seed=5, **params, **filters)
    assert driver.generate(prompts[1], temperature=1.0, seed=5, **filters) == alone
    assert driver.finish(hopeless) in ("stop", "length")
    assert all(0 <= token < 2048 for token in driver.tokens(hopeless))


@pytest.mark.parametrize("params", [{}, {"top_p": 0.5}])
def test_logits_that_are_no_numbers(params: dict[str, Any]) -> None:
    """A model whose arithmetic overflowed still gives a token of the vocabulary."""
    assert set(draws([float("nan")] * 4, 10, **params)) <= {0, 1, 2, 3}


def test_penalties_that_overflow_are_refused() -> None:
    """The wire knows no repetition penalty so small that float32 would overflow."""
    with pytest.raises(msgspec.ValidationError, match="repetition_penalty"):
        msgspec.convert({"repetition_penalty": 1e-39}, SamplingParams)
