"""What every engine promises its service (`engines/base.py`), held against each, in this process and its own."""

import os
import signal
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine_driver import Driver

from dynamo_llm.engines.base import RequestError
from kvstore.cards import Cleared, Removed, Stored
from kvstore.hashing import block_hashes, root_seed
from kvstore.text import Tokenizer
from kvstore.wire import SamplingParams

from .conftest import MAX_CONTEXT, MODEL, Kind, greedily

LONG = 400
NewKey = Callable[[], int]


def prompt_of(number: int, tokens: int = 70) -> list[int]:
    """A prompt that no other number begins like."""
    return [5 + (number * 7919 + at * at) % 400 for at in range(tokens)]


def test_a_request_streams_to_one_end(driver: Driver, new_key: NewKey) -> None:
    """Started comes with the first tokens, the finish reason with the last, and nothing after it."""
    key = new_key()
    driver.submit(key, prompt_of(1), greedily(6))
    (outputs,) = driver.finish(key)
    assert outputs[0].started is not None
    assert [output.finish_reason for output in outputs[:-1]] == [None] * (len(outputs) - 1)
    assert outputs[-1].finish_reason == "length"
    assert len(driver.tokens(key)) == 6


def test_a_batch_gives_each_request_its_own_answer(driver: Driver, new_key: NewKey) -> None:
    """Requests that join and leave at different steps get what they get alone."""
    alone = []
    for number in range(8):
        key = new_key()
        driver.submit(key, prompt_of(number + 10), greedily(3 + number))
        driver.finish(key)
        alone.append(driver.tokens(key))
    keys = [new_key() for _ in range(8)]
    for number, key in enumerate(keys):
        driver.submit(key, prompt_of(number + 10), greedily(3 + number))
    driver.finish(*keys)
    assert [driver.tokens(key) for key in keys] == alone


def test_greedy_answers_are_the_models(kind: Kind, driver: Driver, new_key: NewKey, greedy: Any) -> None:
    """Token for token those of the torch engine, whose own tests hold it to transformers."""
    if not kind.real:
        pytest.skip("computes no model")
    tokenizer = Tokenizer((MODEL / "tokenizer.json").read_text())
    for question in ("What is the capital of France?", "What is 12 + 30?", "Spell the word lantern."):
        prompt = tokenizer.encode(f"<|begin|><|user|>{question}<|end|><|assistant|>")
        key = new_key()
        driver.submit(key, list(prompt), greedily(12))
        driver.finish(key)
        assert driver.tokens(key) == greedy(list(prompt), 12)


def test_a_cancelled_request_ends_once(driver: Driver, new_key: NewKey) -> None:
    """Right after the submit, while it decodes, and after its end; unknown keys are ignored."""
    at_once, decoding, unknown = new_key(), new_key(), new_key()
    driver.submit(at_once, prompt_of(30), greedily(LONG))
    driver.engine.cancel(at_once)
    driver.submit(decoding, prompt_of(31), greedily(LONG))
    driver.wait(lambda: driver.outputs.get(decoding))
    driver.engine.cancel(decoding)
    driver.engine.cancel(unknown)
    for outputs in driver.finish(at_once, decoding):
        assert [output.finish_reason for output in outputs if output.finish_reason] == ["cancelled"]
    driver.engine.cancel(decoding)
    settle(driver, new_key)
    assert unknown not in driver.outputs
    assert driver.load.kv_blocks_used == 0


def settle(driver: Driver, new_key: NewKey) -> None:
    """Another request's whole life: what was asked before it has been done."""
    key = new_key()
    driver.submit(key, prompt_of(99, 8), greedily(1))
    driver.finish(key)
    driver.wait(lambda: driver.load.running == 0 and driver.load.kv_blocks_used == 0)


def test_what_can_never_be_served_is_refused(driver: Driver, new_key: NewKey) -> None:
    """In one line with the wire's code, at once or as the request's only output; others go on."""
    running = new_key()
    driver.submit(running, prompt_of(40), greedily(20))
    refusals = [
        ("context_length_exceeded", prompt_of(41, MAX_CONTEXT + 1), SamplingParams(max_tokens=1)),
        ("invalid_request", [], SamplingParams(max_tokens=1)),
        ("invalid_request", [5, 1 << 30], SamplingParams(max_tokens=1)),
        ("invalid_request", [5, 6], SamplingParams(max_tokens=1, extra={"no_such_option": 1})),
    ]
    for code, prompt, sampling in refusals:
        error = refusal(driver, new_key(), prompt, sampling)
        assert error.code == code
        assert error.message
        assert "\n" not in error.message
    driver.finish(running)
    assert len(driver.tokens(running)) == 20


def refusal(driver: Driver, key: int, prompt: list[int], sampling: SamplingParams) -> Any:
    try:
        driver.submit(key, prompt, sampling)
    except RequestError as error:
        return error
    ((output,),) = driver.finish(key)
    assert output.finish_reason == "error"
    return output.error


def test_events_name_the_prompts_blocks(kind: Kind, driver: Driver, new_key: NewKey) -> None:
    """By the hashes that a router computes, each after its parent; the second time they are reused, not stored."""
    prompt, block_size = prompt_of(50, 130), driver.engine.info.block_size
    expected = block_hashes(array("I", prompt).tobytes(), block_size, seed=root_seed("demo"))
    driver.drain()
    before = len(driver.ops)
    first, second = new_key(), new_key()
    driver.submit(first, prompt, greedily(2))
    driver.finish(first)
    driver.wait(lambda: set(expected) <= stored(driver.ops[before:]))
    chain = [hash for op in driver.ops[before:] if isinstance(op, Stored) for hash in op.hashes]
    assert chain[: len(expected)] == list(expected)
    after = len(driver.ops)
    driver.submit(second, prompt, greedily(2))
    (outputs,) = driver.finish(second)
    assert outputs[0].started.cached_tokens == block_size * len(expected)
    assert not set(expected) & stored(driver.ops[after:])


def stored(ops: list[Any]) -> set[int]:
    return {hash for op in ops if isinstance(op, Stored) for hash in op.hashes}


def test_events_are_exact_under_eviction(driver: Driver, new_key: NewKey) -> None:
    """What is stored was not resident, what is removed was, and never more than the pool holds."""
    keys = [new_key() for _ in range(20)]
    for number, key in enumerate(keys):
        driver.submit(key, prompt_of(60 + number, 300), greedily(2))
    driver.finish(*keys)
    settle(driver, new_key)
    resident: set[int] = set()
    for op in driver.ops:
        hashes = set() if isinstance(op, Cleared) else set(op.hashes)
        if isinstance(op, Stored):
            assert not hashes & resident
            resident |= hashes
        elif isinstance(op, Removed):
            assert hashes <= resident
            resident -= hashes
        else:
            resident.clear()
    assert 0 < len(resident) <= driver.engine.info.kv_blocks


def test_load_tells_what_runs(driver: Driver, new_key: NewKey) -> None:
    """While a request decodes it counts as running and its blocks as used."""
    key = new_key()
    driver.submit(key, prompt_of(90), greedily(LONG))
    driver.wait(lambda: driver.load.running == 1 and driver.outputs.get(key))
    assert driver.load.kv_blocks_total == driver.engine.info.kv_blocks
    assert 0 < driver.load.kv_blocks_used <= driver.load.kv_blocks_total
    driver.engine.cancel(key)
    driver.finish(key)
    settle(driver, new_key)


def test_close_ends_what_is_in_flight_and_another_can_follow(kind: Kind) -> None:
    """Each request gets its one end; the next engine of the same process serves."""
    driver = Driver(kind.create())
    driver.submit(1, prompt_of(1), greedily(LONG))
    driver.submit(2, prompt_of(2), greedily(LONG))
    driver.wait(lambda: driver.outputs.get(1))
    driver.engine.close()
    driver.engine.close()
    driver.drain()
    for key in (1, 2):
        assert [output.finish_reason for output in driver.outputs[key] if output.finish_reason] == ["cancelled"]
    assert driver.deaths.empty()
    with pytest.raises(RequestError):
        driver.submit(3, prompt_of(3), greedily(1))


def test_a_killed_process_is_a_death(kind: Kind) -> None:
    """Each request in flight gets one clear error, the death is told once, and no process is left."""
    if not kind.python:
        pytest.skip("lives in this process")
    driver = Driver(kind.create())
    pid = driver.engine.pid
    driver.submit(1, prompt_of(1), greedily(LONG))
    driver.submit(2, prompt_of(2), greedily(LONG))
    driver.wait(lambda: driver.outputs.get(1))
    group = os.getpgid(pid)
    os.kill(pid, signal.SIGKILL)
    for outputs in driver.finish(1, 2):
        assert [output.error.code for output in outputs if output.error] == ["engine_failure"]
    assert "SIGKILL" in driver.deaths.get(timeout=20)
    with pytest.raises(RequestError, match="SIGKILL"):
        driver.submit(3, prompt_of(3), greedily(1))
    driver.engine.close()
    assert driver.deaths.empty()
    assert not [entry for entry in Path("/proc").glob("[0-9]*") if _group(entry) == group]


def _group(entry: Path) -> int:
    try:
        state, _, group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
    except OSError:
        return 0
    return 0 if state == "Z" else int(group)
