"""The TensorRT-LLM adapter, end to end over a stand-in that has the recorded names and signatures of 1.2.1."""

import json
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import fake_tensorrt_llm as fake
import pytest
from engine_driver import WAIT_S, Driver
from fake_tensorrt_llm import LLM, RECORDING
from recorded_api import forget, install

from dynamo_llm.engines import create_engine
from dynamo_llm.engines.base import Duty, EngineError, RequestError
from kvstore.cards import Cleared, Removed, Stored
from kvstore.hashing import block_hashes, root_seed
from kvstore.wire import SamplingParams, TokenLogprob

PACKAGE = "dynamo_llm.engines.trtllm_engine"
NATIVE = {"sampler_type": "TRTLLMSampler"}
EOS = 7
FIRST = list(range(16))
"""A prompt's first block."""


@pytest.fixture(autouse=True)
def tensorrt_llm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    forget(monkeypatch, PACKAGE)
    install(monkeypatch, fake.MODULES)
    yield
    LLM.fail, LLM.figures = None, True
    LLM.made.clear()
    forget(monkeypatch, PACKAGE)


Make = Callable[..., tuple[Driver, LLM]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = {"vocab_size": fake.VOCABULARY, "max_position_embeddings": 64, "eos_token_id": EOS}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.fixture
def make(folder: Path) -> Iterator[Make]:
    drivers: list[Driver] = []

    def start(script: str = "", **options: Any) -> tuple[Driver, LLM]:
        driver = Driver(create_engine("trtllm", folder, "demo", options))
        drivers.append(driver)
        llm = LLM.made[-1]
        llm.script = script
        llm.calls.clear()  # the engine asked for one token, to hear how large the cache is
        return driver, llm

    yield start
    for driver in drivers:
        driver.engine.close()


def on_loop(driver: Driver, function: Callable[..., Any], *args: Any) -> None:
    """TensorRT-LLM's queues are the event loop's."""
    driver.engine._loop.call_soon_threadsafe(function, *args)  # type: ignore[attr-defined]


def say(driver: Driver, llm: LLM, *events: dict[str, Any]) -> None:
    assert llm.events is not None
    for event in events:
        on_loop(driver, llm.events.queue.put_nowait, event)


def hashes(tokens: list[int], lora: str = "", salt: str = "") -> list[int]:
    """As a router computes them for a prompt."""
    prompt = b"".join(token.to_bytes(4, "little") for token in tokens)
    return [int(value) for value in block_hashes(prompt, fake.BLOCK_SIZE, seed=root_seed("demo", lora, salt))]


def test_what_the_adapter_uses_is_there() -> None:
    """Attributes beside the recorded calls exist in the recorded source, and results have the fields that are read."""
    assert RECORDING.attributes == {"BaseLLM": ["args"], "GenerationResultBase": ["cached_tokens"]}
    read = {"token_ids", "logprobs", "finish_reason", "disaggregated_params"}
    assert read <= set(RECORDING.fields["CompletionOutput"])
    assert RECORDING.fields["Logprob"] == ["logprob", "rank"]


def test_info_and_defaults(make: Make, folder: Path) -> None:
    """What the engine is comes from TensorRT-LLM and the model's config; our defaults bring events and figures."""
    driver, llm = make()
    info = driver.engine.info
    assert (info.name, info.version, info.model) == ("trtllm", "1.2.1", "demo")
    assert (info.block_size, info.kv_blocks, info.max_context) == (16, 64, 64)
    assert (info.vocab_size, info.eos_token_ids) == (fake.VOCABULARY, (EOS,))
    given = llm.given
    assert (given["model"], given["skip_tokenizer_init"], given["enable_iter_perf_stats"]) == (str(folder), True, True)
    assert given["kv_cache_config"] == {"event_buffer_max_size": 65536}
    assert "lora_config" not in given


def test_options_go_through(make: Make) -> None:
    """Arguments arrive as they are, tables from a command line as tables, and win over our defaults."""
    cache = {"tokens_per_block": 32, "event_buffer_max_size": 10}
    driver, llm = make(
        kv_cache_config=json.dumps(cache), tensor_parallel_size=2, guided_decoding_backend="xgrammar", max_seq_len=40
    )
    assert llm.given["kv_cache_config"] == cache
    assert (llm.given["tensor_parallel_size"], llm.given["skip_tokenizer_init"]) == (2, False)
    assert (driver.engine.info.block_size, driver.engine.info.max_context) == (32, 40)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_seq_length": 1}, "did you mean 'max_seq_len'"),
        ({"model": "x"}, "'model' is the worker's to set"),
        ({"enable_attention_dp": True}, "enable_attention_dp: start one worker per rank"),
        ({"kv_cache_config": "{"}, "is no JSON"),
        ({"kv_cache_config": 3}, "must be a table"),
        ({"max_waiting": "many"}, "trtllm engine options"),
        ({"lora_modules": {"pirate": "/nowhere"}}, "is no folder"),
    ],
)
def test_wrong_options(make: Make, options: dict[str, Any], message: str) -> None:
    """One line, before anything is started."""
    with pytest.raises(EngineError, match=message):
        make(**options)
    assert LLM.made == []


def test_a_model_that_does_not_load(make: Make) -> None:
    """Whatever TensorRT-LLM raises becomes one line."""
    LLM.fail = RuntimeError("out of\nmemory")
    with pytest.raises(EngineError, match=r"TensorRT-LLM does not start: out of memory"):
        make()


def test_without_figures_it_does_not_start(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Routers need the size of the cache; what was started is shut again."""
    LLM.figures = False
    monkeypatch.setattr(import_module(f"{PACKAGE}.engine"), "_FIGURES_S", 0.1)
    with pytest.raises(EngineError, match="leave enable_iter_perf_stats on"):
        make()
    assert LLM.made[0].shut_down == 1


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Without TensorRT-LLM the error says what to install."""
    for name in fake.MODULES:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(EngineError, match=r"needs the package tensorrt_llm: pip install 'dynamo-llm\[trtllm\]'"):
        create_engine("trtllm", folder, "demo", {})


def test_streams(make: Make) -> None:
    """Each token comes once, though TensorRT-LLM repeats the earlier ones; the first output says what was cached."""
    driver, _ = make()
    driver.submit(1, [5, 10])
    (outputs,) = driver.finish(1)
    assert driver.tokens(1) == [11, 12, 13, 14]
    assert outputs[-1].finish_reason == "length"
    assert outputs[0].started is not None
    assert outputs[0].started.cached_tokens == 1
    assert all(output.started is None for output in outputs[1:])
    assert all(output.kv_transfer_params is None for output in outputs)
    assert sum(step.prefill_tokens for step in driver.steps) == 1


def test_a_batch(make: Make) -> None:
    """Requests run beside each other, and each gets its own tokens and one end."""
    driver, llm = make()
    for key in range(20):
        driver.submit(key, [key * 10])
    driver.finish(*range(20))
    assert all(driver.tokens(key) == [key * 10 + n for n in range(1, 5)] for key in range(20))
    assert all(sum(o.finish_reason is not None for o in driver.outputs[key]) == 1 for key in range(20))
    assert llm.aborted == []


def test_stop(make: Make) -> None:
    """A stop token ends the sequence and is its last."""
    driver, _ = make("stop")
    driver.submit(1, [10], SamplingParams(max_tokens=9))
    driver.finish(1)
    assert driver.tokens(1) == [11, 12, 13]
    assert driver.outputs[1][-1].finish_reason == "stop"


def test_every_sampling_parameter_is_mapped(make: Make) -> None:
    """With TensorRT-LLM's native sampler all fields of the wire reach it but log-probabilities, and its own go
    through."""
    driver, llm = make(**NATIVE)
    sampling = SamplingParams(
        max_tokens=9,
        temperature=0.5,
        top_p=0.9,
        top_k=5,
        min_p=0.1,
        seed=-1,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.3,
        logit_bias={4: 1.5},
        stop_token_ids=(8,),
        ignore_eos=True,
        extra={"no_repeat_ngram_size": 3, "bad_token_ids": [5]},
    )
    driver.submit(1, [1, 2, 3], sampling, generated=1, cache_salt="tenant")
    driver.finish(1)
    (call,) = llm.calls
    params = call["sampling_params"]
    said = {name: getattr(params, name) for name in params.__struct_fields__ if getattr(params, name) is not None}
    assert fake.bias(params) == {4: 1.5}
    del said["embedding_bias"]
    assert said == {
        "end_id": EOS,
        "pad_id": EOS,
        "max_tokens": 8,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "seed": 0,  # one token of the sequence has been drawn already
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "prompt_ignore_length": 2,
        "stop_token_ids": [8],
        "include_stop_str_in_output": True,
        "ignore_eos": True,
        "no_repeat_ngram_size": 3,
        "bad_token_ids": [5],
        "detokenize": False,
    }
    assert (call["inputs"], call["cache_salt"]) == ([1, 2, 3], "tenant")


def test_greedy_and_several_ends(make: Make, folder: Path) -> None:
    """Temperature 0 is said in the way that both samplers know; further end-of-sequence tokens are stop tokens."""
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS, 9]}))
    driver, llm = make()
    driver.submit(1, [1], SamplingParams(max_tokens=1, temperature=0, seed=5, min_p=0.5))
    driver.submit(2, [1], SamplingParams(max_tokens=1, ignore_eos=True, min_tokens=1))
    driver.finish(1, 2)
    greedy, endless = (call["sampling_params"] for call in llm.calls)
    assert (greedy.top_k, greedy.temperature, greedy.seed, greedy.min_p) == (1, None, None, None)
    assert (greedy.end_id, greedy.stop_token_ids) == (EOS, [9])
    assert (endless.ignore_eos, endless.stop_token_ids, endless.min_tokens) == (True, None, None)
    assert (endless.temperature, endless.top_k) == (1.0, 0)


def test_min_tokens(make: Make) -> None:
    """What an earlier attempt generated counts."""
    driver, llm = make()
    driver.submit(1, [1, 2], SamplingParams(max_tokens=9, min_tokens=3), generated=1)
    driver.finish(1)
    assert llm.calls[0]["sampling_params"].min_tokens == 2


def test_logprobs(make: Make) -> None:
    """Tokens and their alternatives come with each output; none is asked for as one and cut."""
    driver, llm = make()
    driver.submit(1, [10], SamplingParams(max_tokens=3, logprobs=2))
    driver.submit(2, [10], SamplingParams(max_tokens=3, logprobs=0))
    driver.finish(1, 2)
    chosen = [[logprob for output in driver.outputs[key] for logprob in output.logprobs or []] for key in (1, 2)]
    assert chosen[0] == [TokenLogprob(token, -9.0, [(0, -0.5), (1, -1.5)]) for token in (11, 12, 13)]
    assert chosen[1] == [TokenLogprob(token, -9.0, []) for token in (11, 12, 13)]
    assert [call["sampling_params"].logprobs for call in llm.calls] == [2, 1]


def test_loras(make: Make, folder: Path) -> None:
    """Adapters go by the name they were given; another one is refused at once."""
    driver, llm = make(lora_modules={"pirate": str(folder), "bard": str(folder)})
    assert llm.given["lora_config"] == {"lora_dir": [str(folder)], "max_loras": 2, "max_cpu_loras": 2}
    driver.submit(1, [1], lora="bard")
    driver.finish(1)
    lora = llm.calls[0]["lora_request"]
    assert (lora.lora_name, lora.lora_int_id, lora.lora_path) == ("bard", 2, str(folder))
    with pytest.raises(RequestError, match="no LoRA adapter 'viking'; the engine holds: bard, pirate"):
        driver.submit(2, [1], lora="viking")


@pytest.mark.parametrize(
    ("extra", "field", "value"),
    [
        ({"structured_outputs": {"json": {"type": "object"}}}, "json", {"type": "object"}),
        ({"structured_outputs": {"regex": "a+"}}, "regex", "a+"),
        ({"guided_grammar": "root ::= 'a'"}, "grammar", "root ::= 'a'"),
        ({"guided_json_object": True}, "json_object", True),
    ],
)
def test_guided(make: Make, extra: dict[str, Any], field: str, value: Any) -> None:
    """Guided decoding is asked for as with vLLM."""
    driver, llm = make(guided_decoding_backend="xgrammar")
    driver.submit(1, [1], SamplingParams(max_tokens=1, extra=extra))
    driver.finish(1)
    assert getattr(llm.calls[0]["sampling_params"].guided_decoding, field) == value


GUIDED = SamplingParams(extra={"guided_regex": "a"})


@pytest.mark.parametrize(
    ("options", "sampling", "more", "message"),
    [
        ({}, SamplingParams(extra={"no_repeat_ngram": 2}), {}, "did you mean 'no_repeat_ngram_size'"),
        ({}, SamplingParams(extra={"n": 2}), {}, "unknown sampling option 'n'"),
        ({}, SamplingParams(prompt_logprobs=1), {}, "prompt_logprobs"),
        ({}, SamplingParams(), {"priority": 1}, "priority"),
        ({}, SamplingParams(seed=1, min_p=0.1), {}, "min_p, seed: .*sampler_type=TRTLLMSampler"),
        ({}, SamplingParams(repetition_penalty=1.1), {}, "repetition_penalty"),
        ({}, SamplingParams(presence_penalty=0.1), {}, "presence_penalty"),
        ({}, SamplingParams(frequency_penalty=0.1), {}, "frequency_penalty"),
        ({}, SamplingParams(extra={"bad_token_ids": [1]}), {}, "bad_token_ids"),
        (NATIVE, SamplingParams(logprobs=1), {}, "logprobs: .*sampler_type=TorchSampler"),
        ({}, SamplingParams(min_tokens=1, stop_token_ids=(3,)), {}, "min_tokens with stop_token_ids"),
        ({}, SamplingParams(logit_bias={1000: 1.0}), {}, "outside the vocabulary"),
        ({}, GUIDED, {}, "start the engine with guided_decoding_backend"),
        ({}, SamplingParams(extra={"structured_outputs": {"choice": ["a"]}}), {}, "has no 'choice'"),
        ({}, SamplingParams(extra={"structured_outputs": {"json": "{}", "regex": "a"}}), {}, "Only one guide can"),
        ({"guided_decoding_backend": "xgrammar"}, GUIDED, {"generated": 1}, "send it anew"),
        ({}, SamplingParams(), {"kv_transfer_params": {"do_remote_decode": True}}, "with cache_transceiver_config"),
        ({}, SamplingParams(), {"kv_transfer_params": {"do_remote_prefill": True}}, "ctx_request_id is missing"),
    ],
)
def test_what_can_never_be_served(
    make: Make, options: dict[str, Any], sampling: SamplingParams, more: dict[str, Any], message: str
) -> None:
    """Refused at once, in one line that names it, before TensorRT-LLM hears of it: it would leave most of it out."""
    driver, llm = make(**options)
    with pytest.raises(RequestError, match=message) as caught:
        driver.submit(1, [1, 2], sampling, **more)
    assert caught.value.code == "invalid_request"
    assert llm.calls == []


@pytest.mark.parametrize("options", [{}, {"max_num_tokens": 8}])
def test_a_prompt_that_is_too_long(make: Make, options: dict[str, Any]) -> None:
    """The context is prompt and answer together; without chunked prefill a prompt fits one step."""
    driver, _ = make(**options)
    with pytest.raises(RequestError) as caught:
        driver.submit(1, [1] * (64 if not options else 9))
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("refuse", "code"),
    [(ValueError("too\nlong"), "invalid_request"), (fake.RequestError("too\nlong"), "invalid_request")],
)
def test_what_tensorrt_llm_refuses(make: Make, refuse: Exception, code: str) -> None:
    """A request that TensorRT-LLM does not take ends with one error; the engine goes on."""
    driver, llm = make()
    llm.refuse = refuse
    driver.submit(1, [10])
    driver.finish(1)
    last = driver.outputs[1][-1]
    assert last.error is not None
    assert (last.finish_reason, last.error.code, last.error.message) == ("error", code, "TensorRT-LLM: too long")
    llm.refuse = None
    driver.submit(2, [10])
    driver.finish(2)
    assert driver.tokens(2) == [11, 12, 13, 14]


@pytest.mark.parametrize(
    ("script", "message"), [("give up", "no room"), ("odd", "timeout"), ("short", "without an answer")]
)
def test_what_tensorrt_llm_gives_up(make: Make, script: str, message: str) -> None:
    """A request that fails by itself ends with one error that says so, and the engine lives."""
    driver, llm = make(script)
    driver.submit(1, [10], SamplingParams(max_tokens=9))
    driver.finish(1)
    last = driver.outputs[1][-1]
    assert last.error is not None
    assert (last.finish_reason, last.error.code) == ("error", "engine_failure")
    assert message in last.error.message
    llm.script = ""
    driver.submit(2, [10])
    driver.finish(2)


def test_cancel(make: Make) -> None:
    """A cancelled request ends once, and so do those in flight at the end; TensorRT-LLM is told of each."""
    driver, llm = make("hang")
    for key in (1, 12):
        driver.submit(key, [key])
    driver.wait(lambda: len(driver.tokens(1)) == len(driver.tokens(12)) == 2)
    driver.engine.cancel(1)
    driver.engine.cancel(99)
    driver.finish(1)
    assert driver.tokens(1) == [2, 3]
    assert driver.outputs[1][-1].finish_reason == "cancelled"
    driver.engine.close()
    driver.engine.close()
    driver.drain()
    assert driver.outputs[12][-1].finish_reason == "cancelled"
    assert llm.aborted == [[1], [12]]
    assert llm.shut_down == 1


def test_events(make: Make) -> None:
    """TensorRT-LLM's events become ours, with the hashes that a router computes for the prompt."""
    driver, llm = make()
    tokens = list(range(40))
    a, b = hashes(tokens[:32])
    created = fake.event(0, "created", num_blocks_per_cache_level=[64, 0])
    say(driver, llm, created, fake.stored(1, [11, 12, 13], tokens), fake.stored(2, [14], tokens[:16], parent=13))
    driver.wait(lambda: len(driver.ops) == 1)
    assert driver.ops == [Stored(None, [a, b])]  # the third block is not full, and what follows it follows nothing
    say(driver, llm, fake.moved(3, 12, 0, 1), fake.removed(4, [11, 13]), fake.removed(5, [12]))
    driver.wait(lambda: len(driver.ops) == 5)
    assert driver.ops[1:] == [Stored(None, [b], "host"), Removed([b]), Removed([a]), Removed([b], "host")]
    driver.engine.close()
    driver.drain()
    assert driver.ops[-1] == Cleared()


def test_events_of_small_windows(make: Make) -> None:
    """Layers that see only the latest tokens do not hold a prefix: their blocks are no blocks to a router."""
    driver, llm = make()
    a, b = hashes(list(range(32)))
    say(driver, llm, fake.stored(0, [11], FIRST, window=128))
    say(driver, llm, fake.stored(1, [12], FIRST), fake.stored(2, [13], list(range(16, 32)), window=128, parent=11))
    say(driver, llm, fake.stored(3, [14], list(range(16, 32)), parent=12))
    driver.wait(lambda: len(driver.ops) == 4)
    assert driver.ops == [Stored(None, [a]), Cleared(), Stored(None, [a]), Stored(a, [b])]


@pytest.mark.parametrize(
    "events",
    [
        [fake.stored(3, [13], FIRST)],
        [{"event_id": 1}, fake.stored(1, [12], FIRST)],
        [{"event_id": 1, "data": {"type": "news"}}, fake.stored(1, [12], FIRST)],
        [fake.stored(0, [12], FIRST)],
    ],
)
def test_lost_events(make: Make, events: list[dict[str, Any]]) -> None:
    """After a gap, after what cannot be read and when numbers go back, nothing counts as resident until it is stored
    again."""
    driver, llm = make()
    (a,) = hashes(FIRST)
    say(driver, llm, fake.stored(0, [11], FIRST), *events)
    driver.wait(lambda: len(driver.ops) == 3)
    assert driver.ops == [Stored(None, [a]), Cleared(), Stored(None, [a])]


def test_events_of_adapters_and_salts(make: Make, folder: Path) -> None:
    """TensorRT-LLM does not say whose a block is: the first block of the prompts that were sent does, if it can."""
    driver, llm = make(lora_modules={"pirate": str(folder)})
    both, salted, unknown = FIRST, list(range(100, 116)), list(range(200, 216))
    driver.submit(1, both, lora="pirate")
    driver.submit(2, both)
    driver.submit(3, salted, cache_salt="tenant")
    driver.finish(1, 2, 3)
    say(driver, llm, fake.stored(0, [1], both), fake.stored(1, [2], unknown), fake.stored(2, [3], salted))
    driver.wait(lambda: bool(driver.ops))
    assert driver.ops == [Stored(None, hashes(salted, salt="tenant"))]


def test_without_events(make: Make) -> None:
    """Without reuse of blocks there are none, and none are asked for."""
    driver, llm = make(kv_cache_config={"enable_block_reuse": False})
    assert llm.given["kv_cache_config"] == {"event_buffer_max_size": 0, "enable_block_reuse": False}
    driver.submit(1, [1])
    driver.finish(1)
    assert llm.events is not None
    assert llm.events.timeout == 0.0


def test_load(make: Make) -> None:
    """Blocks and the queue are TensorRT-LLM's figures, also while nothing new is sent; an idle engine uses none."""
    driver, llm = make("hang")
    for key in (1, 2):
        driver.submit(key, [10, 11])
    driver.wait(lambda: len(driver.tokens(1)) == len(driver.tokens(2)) == 2)
    say(driver, llm, fake.stored(0, [1, 2, 3, 4, 5], list(range(80))))
    driver.wait(lambda: len(driver.ops) == 1)
    on_loop(driver, llm.say, 3)
    load = driver.engine.load()
    while load.kv_blocks_used != 3:  # fetched beside the requests
        say(driver, llm, fake.removed(1, [99]))
        load = driver.engine.load()
    assert (load.running, load.waiting, load.kv_blocks_cached, load.kv_blocks_total) == (2, 0, 2, 64)
    driver.engine.cancel(1)
    driver.engine.cancel(2)
    driver.finish(1, 2)
    assert driver.engine.load().kv_blocks_used == 0


def test_prefill_and_decode(make: Make) -> None:
    """A prefill engine's last output says where its blocks are; a decode engine goes on from just that."""
    transfer = {"cache_transceiver_config": {"backend": "DEFAULT"}}
    prefill, first = make(**transfer)
    prefill.submit(1, [10], kv_transfer_params={"do_remote_decode": True})
    (outputs,) = prefill.finish(1)
    assert first.calls[0]["disaggregated_params"].request_type == "context_only"
    assert outputs[-1].finish_reason == "length"
    params = outputs[-1].kv_transfer_params
    assert params == {
        "do_remote_prefill": True,
        "ctx_request_id": 77,
        "first_gen_tokens": [11],
        "opaque_state": "AHg=",
        "draft_tokens": None,
    }

    decode, second = make(**transfer)
    decode.submit(1, [10], kv_transfer_params=json.loads(json.dumps(params)))
    (outputs,) = decode.finish(1)
    handed = second.calls[0]["disaggregated_params"]
    assert (handed.request_type, handed.ctx_request_id, handed.opaque_state) == ("generation_only", 77, b"\0x")
    assert handed.first_gen_tokens == [11]
    assert decode.tokens(1) == [11, 12, 13, 14]
    assert outputs[-1].kv_transfer_params is None
    with pytest.raises(RequestError, match="opaque_state"):
        decode.submit(2, [10], kv_transfer_params={**params, "opaque_state": "!"})


def test_a_role_makes_the_transceiver(folder: Path) -> None:
    """Engines of both roles move KV blocks; contexts are computed without the overlap scheduler; options still win."""
    transfers = {"cache_transceiver_config": {"backend": "DEFAULT"}}
    for role, options, expected in [
        ("prefill", {}, {**transfers, "disable_overlap_scheduler": True}),
        ("decode", {}, transfers),
        ("decode", {"cache_transceiver_config": {"backend": "UCX"}}, {"cache_transceiver_config": {"backend": "UCX"}}),
        ("agg", {}, {}),
    ]:
        create_engine("trtllm", folder, "demo", options, duty=Duty(role=role)).close()
        args = LLM.made[-1].given
        names = ("cache_transceiver_config", "disable_overlap_scheduler")
        assert {name: args[name] for name in names if name in args} == expected


@pytest.mark.parametrize("how", ["in a request", "refusing", "while idle"])
def test_death(make: Make, how: str) -> None:
    """TensorRT-LLM's death answers every request once and tells the worker once, with a reason."""
    driver, llm = make("hang")
    driver.submit(1, [10])
    driver.wait(lambda: len(driver.tokens(1)) == 2)
    if how == "in a request":
        llm.script = "break"
    elif how == "refusing":
        llm.refuse = RuntimeError("LLM is shutting down")
    else:
        llm.healthy = False
    if how != "while idle":
        driver.submit(2, [10])
    reason = driver.deaths.get(timeout=WAIT_S)
    assert {"in a request": "illegal memory", "refusing": "shutting down", "while idle": "shut itself"}[how] in reason
    driver.drain()
    for key in driver.outputs:
        last = driver.outputs[key][-1]
        assert last.error is not None
        assert (last.finish_reason, last.error.code) == ("error", "engine_failure")
    assert driver.ops[-1] == Cleared()
    with pytest.raises(RequestError) as caught:
        driver.submit(3, [10])
    assert caught.value.code == "engine_failure"
    driver.engine.close()
    driver.drain()
    assert driver.deaths.empty()


def test_made_again(make: Make) -> None:
    """After one engine is closed, another lives in the same process."""
    first, _ = make()
    first.engine.close()
    second, _ = make()
    second.submit(1, [10])
    second.finish(1)
    assert second.tokens(1) == [11, 12, 13, 14]
