"""The mock engine as the service sees it: its words, its ends, its refusals, its time and its threads."""

import math
import shutil
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_driver import Driver
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_llm.engines import create_engine
from dynamo_llm.engines.base import EngineError, EngineRequest, RequestError
from dynamo_llm.engines.mock_engine import engine as engine_module
from dynamo_llm.engines.mock_engine.engine import MockEngine
from dynamo_llm.engines.mock_engine.timing import Timing
from kvstore.cards import Cleared, Removed, Stored
from kvstore.hashing import block_hashes, root_seed
from kvstore.text import Tokenizer
from kvstore.wire import Output, SamplingParams

DEMO = Path(__file__).parents[3] / "model_repository" / "demo" / "1" / "model"
EOS = 1
Make = Callable[..., MockEngine]


def make_engine(folder: Path = DEMO, **options: Any) -> MockEngine:
    engine = create_engine("mock", folder, "demo", {"speed_up": math.inf} | options)
    assert isinstance(engine, MockEngine)
    return engine


@pytest.fixture
def make() -> Iterator[Make]:
    """Engines on the demo model, as fast as can be, closed at the end of the test."""
    engines: list[MockEngine] = []

    def make_one(folder: Path = DEMO, **options: Any) -> MockEngine:
        engines.append(make_engine(folder, **options))
        return engines[-1]

    yield make_one
    for engine in engines:
        engine.close()


def request(key: int, prompt: list[int], *, generated: int = 0, **more: Any) -> EngineRequest:
    fields = {k: more.pop(k) for k in ("lora", "cache_salt", "priority", "kv_transfer_params") if k in more}
    return EngineRequest(
        key=key,
        token_ids=array("I", prompt).tobytes(),
        generated=generated,
        sampling=SamplingParams(**more),
        **fields,
    )


def step_out(engine: MockEngine, *requests: EngineRequest) -> dict[int, list[Output]]:
    """Submit, and step on this thread until all have ended."""
    for item in requests:
        engine.submit(item)
    outputs: dict[int, list[Output]] = {item.key: [] for item in requests}
    while any(not got or got[-1].finish_reason is None for got in outputs.values()):
        for output in engine.step().outputs:
            outputs[output.rid].append(output)
    return outputs


def tokens_of(outputs: list[Output]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def answer(engine: MockEngine, prompt: list[int], **more: Any) -> tuple[list[int], str | None]:
    [outputs] = step_out(engine, request(1, prompt, **more)).values()
    return tokens_of(outputs), outputs[-1].finish_reason


# --- words ------------------------------------------------------------------------------------------------------------


def test_every_token_is_a_word(make: Make) -> None:
    """Each token has text of its own, a space and a word, at once and in a stream."""
    tokenizer = Tokenizer((DEMO / "tokenizer.json").read_text())
    tokens, _ = answer(make(), [5, 6, 7], max_tokens=500)
    stream = tokenizer.stream()
    texts = [stream.feed([token]) for token in tokens]
    assert all(text[0] == " " and text[1:].isalpha() and len(text) > 3 for text in texts)
    assert len(set(texts)) > 100
    assert tokenizer.decode(tokens) == "".join(texts)


def test_answers_depend_on_the_prompt_alone(make: Make) -> None:
    """Another engine gives the same answer, whatever else is in the batch; another prompt gets another one."""
    alone = answer(make(), [5, 6, 7], max_tokens=40)
    crowd = [request(key, [key + 10], max_tokens=50) for key in range(2, 9)]
    together = step_out(make(block_size=4, max_context=512), *crowd, request(1, [5, 6, 7], max_tokens=40))
    assert tokens_of(together[1]) == alone[0]
    assert len({tuple(tokens_of(outputs)[:40]) for outputs in together.values()}) == 8


def test_seeds_matter_unless_greedy(make: Make) -> None:
    """A seed changes the answer of a request that samples, and only of such a one."""
    engine = make()
    sampled = [answer(engine, [5, 6], max_tokens=9, seed=seed) for seed in (1, 2, 1)]
    assert sampled[0] == sampled[2] != sampled[1]
    greedy = [answer(engine, [5, 6], max_tokens=9, seed=seed, temperature=0.0) for seed in (1, 2)]
    assert greedy[0] == greedy[1]


def test_adapters_answer_differently(make: Make) -> None:
    """Each LoRA name has answers and blocks of its own; a cache salt has only blocks of its own."""
    engine = make(block_size=4)
    plain = step_out(engine, request(1, [5] * 9, max_tokens=9))[1]
    lora = step_out(engine, request(1, [5] * 9, max_tokens=9, lora="pirate"))[1]
    salted = step_out(engine, request(1, [5] * 9, max_tokens=9, cache_salt="tenant"))[1]
    assert tokens_of(plain) != tokens_of(lora)
    assert tokens_of(plain) == tokens_of(salted)
    assert [got[0].started and got[0].started.cached_tokens for got in (plain, lora, salted)] == [0, 0, 0]


ENDS = [
    {"max_tokens": 20},
    {},
    {"min_tokens": 150},
    {"max_tokens": 60, "stop_token_ids": "sixth", "ignore_eos": True},
    {"max_tokens": 60, "stop_token_ids": "sixth", "min_tokens": 9},
    {"stop_token_ids": "sixth", "min_tokens": 9},
]


@pytest.mark.parametrize("sampling", ENDS)
def test_replay_goes_on_with_the_same_words(make: Make, sampling: dict[str, Any]) -> None:
    """Wherever an answer is cut and replayed on another worker, it goes on and ends as it would have."""
    engine, other = make(block_size=4), make(block_size=8)
    prompt, more = [5, 6, 7, 8, 9], dict(sampling)
    if more.get("stop_token_ids"):
        more["stop_token_ids"] = (answer(engine, prompt, max_tokens=6)[0][5],)
    whole, reason = answer(engine, prompt, **more)
    for cut in {*range(1, len(whole), 7), len(whole) - 1}:
        rest, end = answer(other, prompt + whole[:cut], generated=cut, **more)
        assert (whole[:cut] + rest, end) == (whole, reason)


# --- ends -------------------------------------------------------------------------------------------------------------


def test_ends(make: Make) -> None:
    """`max_tokens` is reached exactly; without it an answer ends by itself, or where the context does."""
    engine = make(max_context=400, mean_output_tokens=30)
    assert [len(answer(engine, [5], max_tokens=n)[0]) for n in (1, 2, 77)] == [1, 2, 77]
    lengths = set()
    for prompt in range(20, 60):
        tokens, reason = answer(engine, [prompt])
        assert (tokens.index(EOS), reason) == (len(tokens) - 1, "stop")
        lengths.add(len(tokens))
    assert 15 <= min(lengths) < 25
    assert 35 < max(lengths) <= 45
    for more in ({"ignore_eos": True}, {"max_tokens": 1000}, {"min_tokens": 500}):
        tokens, reason = answer(engine, [5] * 10, **more)
        assert (len(tokens), reason) == (390, "length")
        assert EOS not in tokens
    tokens, reason = answer(engine, [5], min_tokens=100)
    assert (len(tokens), reason) == (101, "stop")


def test_stop_tokens(make: Make) -> None:
    """A stop token ends the answer and is reported, but does not come before `min_tokens`."""
    engine = make()
    plain, _ = answer(engine, [5, 6], max_tokens=200)
    stop = plain[7]
    first = plain.index(stop)
    assert answer(engine, [5, 6], max_tokens=200, stop_token_ids=(stop,)) == (plain[: first + 1], "stop")
    later, reason = answer(engine, [5, 6], max_tokens=200, stop_token_ids=(stop,), min_tokens=first + 1)
    assert len(later) > first + 1
    assert stop not in later[: first + 1]
    assert later[:first] == plain[:first]
    assert reason == ("stop" if later[-1] == stop else "length")


def test_replay_after_the_end(make: Make) -> None:
    """A replay of more tokens than we would have given gets one more and ends."""
    engine = make()
    assert len(answer(engine, [5, 6, 7, 8], generated=3, max_tokens=2)[0]) == 1
    tokens, reason = answer(engine, [5] * 400, generated=399)
    assert (tokens, reason) == ([EOS], "stop")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(20, 22), min_size=1, max_size=30), st.integers(1, 25), st.none() | st.integers(0, 30)
        ),
        min_size=1,
        max_size=10,
    ),
    st.integers(14, 24),
)
def test_lives_of_requests(batch: list[tuple[list[int], int, int | None]], kv_blocks: int) -> None:
    """Under pressure and cancels each request ends once with its tokens, and events name what a router computes."""
    engine = make_engine(block_size=4, kv_blocks=kv_blocks, max_batch_tokens=16, max_seqs=6, max_context=56)
    wanted = [answer(engine, prompt, max_tokens=new) for prompt, new, _ in batch]
    resident = engine._scheduler.blocks.resident
    outputs: dict[int, list[Output]] = {key: [] for key in range(len(batch))}
    for key, (prompt, new, _) in enumerate(batch):
        engine.submit(request(key, prompt, max_tokens=new))
    for step in range(1000):
        for key, (_, _, cancelled) in enumerate(batch):
            if cancelled == step:
                engine.cancel(key)
        result = engine.step()
        for output in result.outputs:
            assert not outputs[output.rid] or outputs[output.rid][-1].finish_reason is None
            outputs[output.rid].append(output)
        resident = _fold(result.ops, resident)
        assert resident == engine._scheduler.blocks.resident
        if all(got and got[-1].finish_reason for got in outputs.values()):
            break
    known = set()
    for (prompt, _, _), (tokens, reason), got in zip(batch, wanted, outputs.values(), strict=True):
        known.update(block_hashes(array("I", prompt + tokens).tobytes(), 4, seed=root_seed("demo")).tolist())
        if got[-1].finish_reason == "cancelled":
            assert tokens_of(got) == tokens[: len(tokens_of(got))]
        else:
            assert (tokens_of(got), got[-1].finish_reason) == (tokens, reason)
        assert [output.started is not None for output in got if output.token_ids][1:].count(True) == 0
    assert resident <= known
    load = engine.load()
    assert (load.running, load.waiting, load.waiting_prefill_tokens, load.kv_blocks_used) == (0, 0, 0, 0)
    assert engine._sequences == {}


def _fold(ops: list[Any], resident: set[int]) -> set[int]:
    resident = set(resident)
    for op in ops:
        if isinstance(op, Removed):
            assert resident.issuperset(op.hashes)
            resident.difference_update(op.hashes)
        else:
            assert isinstance(op, Stored)
            assert resident.isdisjoint(op.hashes)
            resident.update(op.hashes)
    return resident


def test_logprobs(make: Make) -> None:
    """They are made up but well-formed: the chosen token is the likeliest, and all add up to less than one."""
    engine = make()
    got = step_out(
        engine,
        request(1, [5, 6, 7], max_tokens=20, logprobs=4, prompt_logprobs=2),
        request(2, [5, 6], max_tokens=5, logprobs=0),
        request(3, [5], max_tokens=5),
    )
    for output in got[1]:
        assert output.logprobs is not None
        [entry] = output.logprobs
        assert [entry.token_id] == output.token_ids
        assert entry.top[0] == (entry.token_id, entry.logprob)
        assert len({token for token, _ in entry.top}) == 4
        assert sum(math.exp(value) for _, value in entry.top) < 1
        assert [value for _, value in entry.top] == sorted((value for _, value in entry.top), reverse=True)
    started = got[1][0].started
    assert started is not None
    assert started.prompt_logprobs is not None
    assert [entry and (entry.token_id, len(entry.top)) for entry in started.prompt_logprobs] == [None, (6, 2), (7, 2)]
    assert [output.logprobs and output.logprobs[0].top for output in got[2]] == [[]] * 5
    assert [output.logprobs for output in got[3]] == [None] * 5
    assert engine._with_logprobs == 0


def test_cached_tokens_and_load(make: Make) -> None:
    """Reuse is reported with the first token, and the load counts what was queued since the last step."""
    engine = make(block_size=4)
    engine.submit(request(1, [5] * 10, max_tokens=3))
    engine.submit(request(2, [6] * 20, max_tokens=3))
    assert (engine.load().waiting, engine.load().waiting_prefill_tokens) == (2, 30)
    first = engine.step()
    assert (first.prefill_tokens, first.decode_tokens) == (30, 0)
    assert (engine.load().running, engine.load().waiting, engine.load().kv_blocks_used) == (2, 0, 8)
    second = engine.step()
    assert (second.prefill_tokens, second.decode_tokens) == (0, 2)
    engine.step()
    load = engine.load()
    assert (load.running, load.kv_blocks_used, load.kv_blocks_cached, load.kv_blocks_total) == (0, 0, 8, 16384)
    assert load.prefill_tokens_per_s > 0
    assert load.decode_step_ms > 0
    [output] = step_out(engine, request(3, [6] * 20, max_tokens=1))[3]
    assert output.started is not None
    assert output.started.cached_tokens == 16
    assert output.started.queue_ms >= 0


# --- time -------------------------------------------------------------------------------------------------------------


def test_blocks_that_are_not_announced(make: Make) -> None:
    """Without KV events the cache is used all the same, and the engine says that nobody hears of it."""
    engine = make(kv_events=False, block_size=16)
    driver = Driver(engine)
    assert not engine.info.announces_blocks
    prompt = list(range(10, 74))
    for key in (1, 2):
        driver.submit(key, prompt)
        driver.finish(key)
    assert driver.outputs[2][0].started.cached_tokens > 0
    assert driver.ops == []
    assert make(kv_events=False, prefix_caching=False).info.announces_blocks


@pytest.mark.parametrize("speed_up", [1.0, 4.0])
def test_steps_take_their_time(make: Make, monkeypatch: pytest.MonkeyPatch, speed_up: float) -> None:
    """A request takes what the timing says, over `speed_up`, even where each wait lasts too long."""
    clock_s = 100.0

    def wait(timeout: float) -> bool:
        nonlocal clock_s
        clock_s += timeout + 0.0005
        return False

    engine = make(speed_up=speed_up, block_size=16)
    monkeypatch.setattr(engine_module.time, "monotonic", lambda: clock_s)
    monkeypatch.setattr(engine._closed, "wait", wait)
    step_out(engine, request(1, list(range(20, 52)), max_tokens=11))
    timing = Timing()
    expected_ms = timing.prefill_ms(32) + 10 * timing.decode_ms(3 / 16384)
    assert clock_s - 100.0 == pytest.approx(expected_ms / 1e3 / speed_up + 0.0005, abs=2e-5)


def test_idle_time_is_not_caught_up(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that comes to an idle engine takes as long as the first one did."""
    clock_s = 100.0

    def wait(timeout: float) -> bool:
        nonlocal clock_s
        clock_s += timeout
        return False

    engine = make(speed_up=1.0, prefix_caching=False)
    monkeypatch.setattr(engine_module.time, "monotonic", lambda: clock_s)
    monkeypatch.setattr(engine._closed, "wait", wait)
    took_s = []
    for pause_s in (0.0, 0.004, 7.0):
        clock_s += pause_s
        began_s = clock_s
        step_out(engine, request(1, [5] * 50, max_tokens=3))
        took_s.append(clock_s - began_s)
    assert took_s == pytest.approx([took_s[0]] * 3)


# --- threads, refusals, the end ---------------------------------------------------------------------------------------


def test_several_instances_in_one_process(make: Make) -> None:
    """Engines run side by side, each with its own requests, blocks and load."""
    drivers = [Driver(make(block_size=4)) for _ in range(4)]
    for number, driver in enumerate(drivers):
        for key in range(number + 1):
            driver.submit(key, [20 + key] * 9, SamplingParams(max_tokens=30))
    for number, driver in enumerate(drivers):
        assert [len(tokens_of(outputs)) for outputs in driver.finish(*range(number + 1))] == [30] * (number + 1)
        stored = sum(len(op.hashes) for op in driver.ops if isinstance(op, Stored))
        assert stored == (number + 1) * 9
    assert [driver.tokens(0) for driver in drivers] == [drivers[0].tokens(0)] * 4


@pytest.mark.parametrize(
    ("wrong", "code", "word"),
    [
        ({"prompt": []}, "invalid_request", "token_ids"),
        ({"prompt": [2048]}, "invalid_request", "vocabulary"),
        ({"prompt": [5] * 2048}, "context_length_exceeded", "2048"),
        ({"kv_transfer_params": {}}, "invalid_request", "kv_transfer_params"),
        ({"extra": {"beam": 4}}, "invalid_request", "beam"),
        ({"stop_token_ids": (9999,)}, "invalid_request", "9999"),
        ({"generated": 3}, "invalid_request", "generated"),
    ],
)
def test_refusals(make: Make, wrong: dict[str, Any], code: str, word: str) -> None:
    """What can never be served is refused at submission, with its code and a word that helps."""
    with pytest.raises(RequestError, match=word) as raised:
        make().submit(request(1, **({"prompt": [5, 6, 7]} | wrong)))
    assert raised.value.code == code
    assert "\n" not in raised.value.message


def test_full_queue_is_refused(make: Make) -> None:
    """The waiting queue is bounded, and has room again when it has emptied."""
    engine = make(max_seqs=1, max_waiting=3)
    for key in range(3):
        engine.submit(request(key, [5, 6], max_tokens=2))
    with pytest.raises(RequestError) as raised:
        engine.submit(request(3, [5, 6]))
    assert raised.value.code == "overloaded"
    with pytest.raises(RequestError, match="key 1"):
        engine.submit(request(1, [5, 6]))
    engine.step()
    engine.submit(request(3, [5, 6], max_tokens=2))


def test_cancel_ends_within_a_step(make: Make) -> None:
    """The next step's output is the last, and the blocks are free with it."""
    engine = make(max_seqs=1)
    for key in (1, 2):
        engine.submit(request(key, [5] * 100, ignore_eos=True, logprobs=1))
    engine.step()
    engine.cancel(1)
    engine.cancel(2)
    engine.cancel(99)
    result = engine.step()
    assert [(output.rid, output.finish_reason) for output in result.outputs] == [(1, "cancelled"), (2, "cancelled")]
    assert (result.load.kv_blocks_used, result.load.running, result.load.waiting) == (0, 0, 0)
    assert engine._with_logprobs == 0


def test_close_interrupts_a_long_step(make: Make) -> None:
    """Closing does not wait for the step's time, answers what is in flight, and announces the loss of the cache."""
    engine = make(speed_up=1e-3)
    driver = Driver(engine)
    for key in range(3):
        driver.submit(key, [5] * 500, SamplingParams(max_tokens=100))
    engine.close()
    engine.close()
    assert {outputs[-1].finish_reason for outputs in driver.finish(0, 1, 2)} == {"cancelled"}
    assert driver.ops[-1] == Cleared()
    assert driver.load.kv_blocks_used == 0
    with pytest.raises(RequestError, match="closed"):
        engine.submit(request(9, [5]))


def test_death_answers_everyone(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that breaks ends every request with `engine_failure`, then says why, once."""
    engine = make(speed_up=1.0)
    monkeypatch.setattr(engine._scheduler, "end", lambda run: 1 / 0)
    driver = Driver(engine)
    driver.submit(1, [5, 6])
    assert driver.deaths.get(timeout=20) == "ZeroDivisionError: division by zero"
    [outputs] = driver.finish(1)
    assert outputs[-1].error is not None
    assert outputs[-1].error.code == "engine_failure"


# --- start ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"speedup": 5}, "speedup.*speed_up"),
        ({"speed_up": 0}, "speed_up"),
        ({"speed_up": "nan"}, "speed_up"),
        ({"block_size": 0}, "block_size"),
        ({"prefill_ms": [1, 2]}, "prefill_ms"),
        ({"decode_ms": [1, 2, math.inf]}, "finite"),
        ({"max_batch_tokens": 4, "max_seqs": 8}, "max_batch_tokens"),
        ({"kv_blocks": 4, "max_context": 600}, "600.*256.*kv_blocks to 10"),
    ],
)
def test_wrong_options(options: dict[str, Any], words: str) -> None:
    """Unknown names and impossible values are errors of one line."""
    with pytest.raises(EngineError, match=words) as raised:
        create_engine("mock", DEMO, "demo", options)
    assert "\n" not in str(raised.value)


def test_info(make: Make) -> None:
    """The figures describe model and options; those may come as text, and ask for more context than the model has."""
    info = make().info
    assert (info.name, info.model, info.block_size, info.kv_blocks) == ("mock", "demo", 64, 16384)
    assert (info.max_context, info.vocab_size, info.eos_token_ids) == (2048, 2048, (1,))
    engine = make(max_context="100000", block_size="16", prefix_caching="false", decode_ms=[0, 0, 0])
    assert (engine.info.max_context, engine.info.block_size) == (100000, 16)
    assert len(answer(engine, [5] * 60000, max_tokens=70)[0]) == 70
    assert engine.take_ops() == []


def test_folders(make: Make, tmp_path: Path) -> None:
    """Without a tokeniser any id is a word; without a readable config there is no engine."""
    shutil.copy(DEMO / "config.json", tmp_path)
    tokens, _ = answer(make(tmp_path), [5], max_tokens=2000)
    assert EOS not in tokens
    assert max(tokens) > 1500
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(EngineError, match=r"tokenizer\.json"):
        make(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(EngineError, match="vocab_size"):
        make(tmp_path)
    with pytest.raises(EngineError, match="does not exist"):
        make(tmp_path / "nowhere")
