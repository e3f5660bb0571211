"""The SGLang adapter, end to end over a stand-in that has the recorded names and signatures of SGLang 0.5.23."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake_sglang
import psutil
import pytest
from engine_driver import WAIT_S, Driver
from event_publisher import removed, stored
from fake_sglang import RECORDING, Engine
from recorded_api import forget, install

from dynamo_llm.engines import create_engine
from dynamo_llm.engines.base import Duty, EngineError, RequestError
from kvstore.cards import Cleared, Removed, Stored
from kvstore.hashing import block_hashes, root_seed
from kvstore.wire import SamplingParams, TokenLogprob

PACKAGE = "dynamo_llm.engines.sglang_engine"


@pytest.fixture(autouse=True)
def sglang(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    forget(monkeypatch, PACKAGE)
    install(monkeypatch, fake_sglang.MODULES)
    before = signal.getsignal(signal.SIGQUIT)
    yield
    signal.signal(signal.SIGQUIT, before)
    Engine.fail = None
    for engine in Engine.made:
        engine.publisher.close()
    Engine.made.clear()
    forget(monkeypatch, PACKAGE)


Make = Callable[..., tuple[Driver, Engine]]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    drivers: list[Driver] = []

    def start(script: str = "", **options: Any) -> tuple[Driver, Engine]:
        driver = Driver(create_engine("sglang", tmp_path, "demo", options))
        drivers.append(driver)
        Engine.made[-1].script = script
        return driver, Engine.made[-1]

    yield start
    for driver in drivers:
        driver.engine.close()


def test_what_the_adapter_uses_is_there() -> None:
    """Attributes beside the recorded calls exist in the recorded source, and events have the fields that are read."""
    assert RECORDING.attributes == {
        "Engine": ["server_args", "tokenizer_manager"],
        "TokenizerManager": ["_subprocess_watchdog", "model_config"],
        "ModelConfig": ["context_len", "vocab_size", "hf_eos_token_id"],
    }
    read = {"block_hashes", "parent_block_hash", "token_ids", "block_size", "medium", "cache_salt", "lora_name"}
    assert read <= set(RECORDING.fields["BlockStored"])


def test_info_and_defaults(make: Make, tmp_path: Path) -> None:
    """What the engine is comes from SGLang; our defaults give events in blocks, and priorities in the wire's order."""
    driver, engine = make()
    info = driver.engine.info
    assert (info.name, info.version, info.model, info.block_size, info.kv_blocks) == (
        "sglang",
        "0.5.23",
        "demo",
        16,
        64,
    )
    assert (info.max_context, info.vocab_size, info.eos_token_ids) == (64, 1000, (7,))
    args = engine.server_args
    assert (args.model_path, args.page_size, args.enable_priority_scheduling) == (str(tmp_path), 16, True)
    assert args.schedule_low_priority_values_first is True
    assert os.environ["SGLANG_RETURN_ORIGINAL_LOGPROB"] == "1"


def test_options_go_through(make: Make) -> None:
    """Server arguments arrive as they are, tables as the JSON that SGLang reads, and win over our defaults."""
    events = {"publisher": "null", "endpoint": "tcp://*:1"}
    _, engine = make(page_size=32, tp_size=2, kv_events_config=json.dumps(events), mem_fraction_static=0.5)
    assert (engine.server_args.page_size, engine.server_args.tp_size) == (32, 2)
    assert json.loads(engine.server_args.kv_events_config) == events
    assert engine.server_args.mem_fraction_static == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"page_sise": 1}, "did you mean 'page_size'"),
        ({"model_path": "x"}, "'model_path' is the worker's to set"),
        ({"dp_size": 2}, "dp_size: start one worker per rank"),
        ({"kv_events_config": "{"}, "sglang engine options"),
        ({"max_waiting": "many"}, "sglang engine options"),
    ],
)
def test_wrong_options(make: Make, options: dict[str, Any], message: str) -> None:
    """One line, before anything is started."""
    with pytest.raises(EngineError, match=message):
        make(**options)
    assert Engine.made == []


def test_a_model_that_does_not_load(make: Make) -> None:
    """Whatever SGLang raises becomes one line, and leaves no folder behind."""
    Engine.fail = RuntimeError("out of\nmemory")
    with pytest.raises(EngineError, match=r"SGLang does not start: out of memory"):
        make()


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without SGLang the error says what to install."""
    for name in fake_sglang.MODULES:
        monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(EngineError, match=r"dynamo-llm\[sglang\]"):
        create_engine("sglang", tmp_path, "demo", {})


@pytest.mark.parametrize("incremental", [False, True])
def test_streams(make: Make, incremental: bool) -> None:
    """Each token comes once, whether SGLang repeats the earlier ones or not; the first output says what was cached."""
    driver, _ = make(incremental_streaming_output=incremental)
    driver.submit(1, [5, 10])
    (outputs,) = driver.finish(1)
    assert driver.tokens(1) == [11, 12, 13, 14]
    assert [output.finish_reason for output in outputs][-1] == "length"
    assert outputs[0].started is not None
    assert (outputs[0].started.cached_tokens, outputs[0].started.queue_ms) == (1, 500.0)
    assert all(output.started is None for output in outputs[1:])
    assert sum(step.prefill_tokens for step in driver.steps) == 1


def test_a_batch(make: Make) -> None:
    """Requests run beside each other, and each gets its own tokens and one end."""
    driver, _ = make()
    for key in range(20):
        driver.submit(key, [key * 10])
    driver.finish(*range(20))
    assert all(driver.tokens(key) == [key * 10 + n for n in range(1, 5)] for key in range(20))
    assert all(sum(o.finish_reason is not None for o in driver.outputs[key]) == 1 for key in range(20))


def test_stop(make: Make) -> None:
    """A stop token ends the sequence and is its last."""
    driver, _ = make("stop")
    driver.submit(1, [10], SamplingParams(max_tokens=9))
    driver.finish(1)
    assert driver.tokens(1) == [11, 12, 13]
    assert driver.outputs[1][-1].finish_reason == "stop"


def test_every_sampling_parameter_is_mapped(make: Make) -> None:
    """All fields of the wire reach SGLang by its names, and what is its own goes through."""
    driver, engine = make()
    sampling = SamplingParams(
        max_tokens=9,
        min_tokens=3,
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
        logprobs=1,
        prompt_logprobs=2,
        extra={"json_schema": "{}", "session_id": "s"},
    )
    driver.submit(1, [1, 2, 3], sampling, generated=1, cache_salt="tenant", priority=-2)
    driver.finish(1)
    (call,) = engine.calls
    assert call["sampling_params"] == {
        "max_new_tokens": 8,
        "min_new_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "sampling_seed": (1 << 63) - 1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "logit_bias": {"4": 1.5},
        "stop_token_ids": [8],
        "ignore_eos": True,
        "json_schema": "{}",
    }
    assert (call["cache_salt"], call["priority"], call["session_id"], call["lora_path"]) == ("tenant", -2, "s", None)
    assert (call["return_logprob"], call["logprob_start_len"], call["top_logprobs_num"]) == (True, 0, 2)


def test_logprobs(make: Make) -> None:
    """Tokens and their alternatives come with each output, the prompt's with the first."""
    driver, _ = make()
    driver.submit(1, [5, 6, 10], SamplingParams(max_tokens=3, logprobs=2, prompt_logprobs=1))
    (outputs,) = driver.finish(1)
    chosen = [logprob for output in outputs for logprob in output.logprobs or []]
    assert chosen == [TokenLogprob(token, -0.5, [(0, -0.5), (1, -1.5)]) for token in (11, 12, 13)]
    assert outputs[0].started is not None
    assert outputs[0].started.prompt_logprobs == [
        None,
        TokenLogprob(6, -0.25, [(0, -0.5)]),
        TokenLogprob(10, -0.25, [(0, -0.5)]),
    ]


def test_loras(make: Make) -> None:
    """Adapters go by the name they were loaded under; another one is refused at once."""
    driver, engine = make(lora_paths=["pirate=/adapters/pirate", "/adapters/bard"])
    driver.submit(1, [1], lora="pirate")
    driver.finish(1)
    assert engine.calls[0]["lora_path"] == "pirate"
    with pytest.raises(RequestError, match="holds no LoRA adapter 'viking'"):
        driver.submit(2, [1], lora="viking")


@pytest.mark.parametrize(
    ("sampling", "more", "message"),
    [
        (SamplingParams(extra={"json_shema": "{}"}), {}, "did you mean 'json_schema'"),
        (SamplingParams(extra={"temperature": 1}), {}, "the request has a field for it"),
        (SamplingParams(extra={"n": 2}), {}, "send several requests"),
        (SamplingParams(extra={"is_normalized": True}), {}, "no sampling option 'is_normalized'"),
        (SamplingParams(logit_bias={1000: 1.0}), {}, "outside the vocabulary"),
        (SamplingParams(), {"kv_transfer_params": {"do_remote_decode": True}}, "start it with disaggregation_mode"),
    ],
)
def test_what_can_never_be_served(make: Make, sampling: SamplingParams, more: dict[str, Any], message: str) -> None:
    """Refused at once, in one line, before SGLang hears of it."""
    driver, engine = make()
    with pytest.raises(RequestError, match=message) as caught:
        driver.submit(1, [1], sampling, **more)
    assert caught.value.code == "invalid_request"
    assert engine.calls == []


def test_a_prompt_that_is_too_long(make: Make) -> None:
    """The context is prompt and answer together."""
    driver, _ = make()
    with pytest.raises(RequestError) as caught:
        driver.submit(1, [1] * 64)
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("script", "code", "message"),
    [
        ("refuse", "invalid_request", "no such thing"),
        ("abort 400", "invalid_request", "given up"),
        ("abort 503", "overloaded", "given up"),
        ("abort 500", "engine_failure", "given up"),
        ("short", "engine_failure", "without an answer"),
    ],
)
def test_what_sglang_refuses(make: Make, script: str, code: str, message: str) -> None:
    """A request that SGLang does not take or gives up ends with one error; the engine goes on."""
    driver, engine = make(script)
    driver.submit(1, [10])
    driver.finish(1)
    last = driver.outputs[1][-1]
    assert last.error is not None
    assert (last.finish_reason, last.error.code) == ("error", code)
    assert message in last.error.message
    engine.script = ""
    driver.submit(2, [10])
    driver.finish(2)
    assert driver.tokens(2) == [11, 12, 13, 14]


def test_cancel(make: Make) -> None:
    """A cancelled request ends once, and SGLang is told under a name that no other request's name begins with."""
    driver, engine = make("hang")
    for key in (1, 12):
        driver.submit(key, [10])
    driver.wait(lambda: len(driver.tokens(1)) == len(driver.tokens(12)) == 2)
    driver.engine.cancel(1)
    driver.engine.cancel(99)
    driver.finish(1)
    assert driver.tokens(1) == [11, 12]
    assert driver.outputs[1][-1].finish_reason == "cancelled"
    driver.engine.close()
    driver.drain()
    assert driver.outputs[12][-1].finish_reason == "cancelled"
    rids = [call["rid"] for call in engine.calls]
    assert engine.tokenizer_manager.aborted == rids
    assert not rids[1].startswith(rids[0])


def test_events(make: Make) -> None:
    """SGLang's events become ours, with the hashes that a router computes for the prompt."""
    driver, engine = make()
    engine.publisher.wait_for_subscriber()
    tokens = list(range(32))
    seed = root_seed("demo", "pirate", "tenant")
    a, b = (int(value) for value in block_hashes(_u32(tokens), 16, seed=seed))
    more = {"block_size": 16, "lora_name": "pirate", "cache_salt": "tenant"}
    engine.publisher.send(stored([1], tokens[:16], **more), lose=True)
    engine.publisher.send(stored([2], tokens[16:], parent=1, **more))
    engine.publisher.send(removed([2]), stored([1], tokens[:16], **{**more, "medium": "CPU_PINNED"}))
    driver.wait(lambda: len(driver.ops) == 4)
    assert driver.ops == [Stored(None, [a]), Stored(a, [b]), Removed([b]), Stored(None, [a], "host")]
    driver.engine.close()
    driver.drain()
    assert driver.ops[-1] == Cleared()


def _u32(tokens: list[int]) -> bytes:
    return b"".join(token.to_bytes(4, "little") for token in tokens)


def test_load(make: Make) -> None:
    """Running and waiting are counted by us as far as SGLang's figures lag, blocks are SGLang's."""
    driver, engine = make("hang")
    engine.tokenizer_manager.load = fake_sglang.LoadSnapshot(num_used_tokens=33, num_waiting_reqs=0)
    for key in (1, 2):
        driver.submit(key, [10, 11])
    driver.wait(lambda: len(driver.tokens(1)) == len(driver.tokens(2)) == 2)
    driver.submit(3, [1] * 5, SamplingParams(max_tokens=9))
    driver.wait(lambda: len(driver.tokens(3)) == 2)
    load = driver.engine.load()
    while load.kv_blocks_used != 3:  # read from SGLang beside the requests
        driver.submit(4, [1], SamplingParams(max_tokens=1))
        driver.finish(4)
        del driver.outputs[4]
        load = driver.engine.load()
    assert (load.running, load.waiting, load.waiting_prefill_tokens, load.kv_blocks_total) == (3, 0, 0, 64)


def test_prefill_and_decode(make: Make) -> None:
    """A prefill engine says before its first token where its blocks are; a decode engine is told just that."""
    driver, engine = make(disaggregation_mode="prefill", bootstrap_host="10.0.0.1", disaggregation_bootstrap_port=9000)
    driver.submit(1, [10], kv_transfer_params={"do_remote_decode": True})
    (outputs,) = driver.finish(1)
    first = outputs[0]
    assert (first.token_ids, first.started) == ([], None)
    params = first.kv_transfer_params
    assert params is not None
    assert (params["bootstrap_host"], params["bootstrap_port"]) == ("10.0.0.1", 9000)
    assert params["bootstrap_room"] == engine.calls[0]["bootstrap_room"]
    assert outputs[1].started is not None

    decode, other = make(disaggregation_mode="decode")
    decode.submit(1, [10], kv_transfer_params=params)
    decode.finish(1)
    assert other.calls[0]["bootstrap_room"] == params["bootstrap_room"]
    with pytest.raises(RequestError, match="needs bootstrap_host and bootstrap_room"):
        decode.submit(2, [10])


def test_a_router_may_choose_the_room(make: Make) -> None:
    """Who sends to both sides at once gives both the same room."""
    driver, engine = make(disaggregation_mode="prefill")
    driver.submit(1, [10], kv_transfer_params={"bootstrap_room": 5})
    driver.finish(1)
    assert engine.calls[0]["bootstrap_room"] == 5


def test_a_role_makes_the_mode(tmp_path: Path) -> None:
    """A prefill worker's engine has a bootstrap server of its own at the worker's address; the options still win."""
    for duty, options, expected in [
        (Duty(role="prefill", host="127.0.0.1"), {}, ("prefill", "127.0.0.1")),
        (Duty(role="decode", host="127.0.0.1"), {}, ("decode", "127.0.0.1")),
        (Duty(role="decode"), {"disaggregation_mode": "null", "host": "0.0.0.0"}, ("null", "0.0.0.0")),
    ]:
        create_engine("sglang", tmp_path, "demo", options, duty=duty).close()
        args = Engine.made[-1].server_args
        assert (args.disaggregation_mode, args.host) == expected
        assert (args.disaggregation_bootstrap_port != 8998) == (duty.role == "prefill")


@pytest.mark.parametrize("how", ["process", "signal"])
def test_death(make: Make, how: str) -> None:
    """SGLang's death answers every request once, tells the worker once, and does not end this process."""
    driver, engine = make("hang")
    for key in (1, 2):
        driver.submit(key, [10])
    driver.wait(lambda: len(driver.tokens(1)) == len(driver.tokens(2)) == 2)
    if how == "process":
        os.kill(engine.pid, signal.SIGKILL)
    else:
        os.kill(os.getpid(), signal.SIGQUIT)
    assert "its log says why" in driver.deaths.get(timeout=WAIT_S)
    driver.drain()
    for key in (1, 2):
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


def test_close_ends_its_processes_and_no_others(make: Make) -> None:
    """Other children of this process live on: SGLang's own shutdown would have killed them."""
    driver, engine = make()
    other = os.posix_spawn("/bin/sh", ["sh", "-c", "sleep 1000"], dict(os.environ))
    driver.engine.close()
    driver.engine.close()
    assert not psutil.pid_exists(engine.pid)
    assert psutil.Process(other).is_running()
    os.kill(other, signal.SIGKILL)
    os.waitpid(other, 0)


def test_made_again(make: Make) -> None:
    """After one engine is closed, another lives in the same process."""
    first, _ = make()
    first.engine.close()
    second, _ = make()
    second.submit(1, [10])
    second.finish(1)
    assert second.tokens(1) == [11, 12, 13, 14]
