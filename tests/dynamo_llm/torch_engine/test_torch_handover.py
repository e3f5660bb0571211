"""Prefill on one engine, decode on another: two engines on the demo model, real NIXL between them."""

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dynamo_llm.engines.base import EngineError, EngineRequest, RequestError, StepResult
from dynamo_llm.transfer import KvTransfer, TransferError
from kvstore.wire import Output, SamplingParams

Make = Callable[..., Any]
EXPORT = {"do_remote_decode": True}


class Side:
    """A stepped engine with its transfer; `steps` wait for what comes from the transfer's thread."""

    def __init__(self, driver: Any, name: str) -> None:
        self.driver = driver
        self.transfer: KvTransfer = driver.engine.open_transfer(name)

    def submit(
        self, prompt: list[int], params: dict[str, Any], max_tokens: int = 8, *, generated: int = 0, **more: Any
    ) -> int:
        key = len(self.driver.outputs) + 1
        sampling = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=max_tokens, **more)
        token_ids = np.array(prompt, dtype="<u4").tobytes()
        self.driver.engine.submit(
            EngineRequest(
                key=key, token_ids=token_ids, sampling=sampling, generated=generated, kv_transfer_params=params
            )
        )
        self.driver.outputs[key] = []
        return key

    def until(self, condition: Callable[[], bool]) -> None:
        """Step until it holds."""
        deadline_s = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline_s
            self.driver.step()

    def finish(self, key: int) -> Output:
        self.until(lambda: self.driver.finish(key) is not None)
        return self.driver.outputs[key][-1]

    @property
    def used(self) -> int:
        return self.driver.engine.load().kv_blocks_used

    def prefill(self, prompt: list[int]) -> dict[str, Any]:
        params = self.finish(self.submit(prompt, EXPORT)).kv_transfer_params
        assert params is not None
        return params


@pytest.fixture
def sides(make: Make) -> tuple[Side, Side]:
    """A prefill and a decode engine that know each other."""
    prefill, decode = Side(make(), "p-1"), Side(make(), "d-1")
    decode.transfer.add_peer("p-1", prefill.transfer.metadata)
    return prefill, decode


def test_the_answer_is_the_same(sides: tuple[Side, Side], prompts: list[list[int]], reference: Any) -> None:
    """Prompts of all lengths, a single token and whole blocks among them; of each, one token is computed here."""
    prefill, decode = sides
    keys = [decode.submit(prompt, prefill.prefill(prompt)) for prompt in prompts]
    computed = 0

    def all_ended() -> bool:
        return all(decode.driver.finish(key) for key in keys)

    while not all_ended():
        computed += decode.driver.step().prefill_tokens
    for key, prompt in zip(keys, prompts, strict=True):
        assert decode.driver.tokens(key) == reference.greedy(prompt, 8)
    assert computed == 0  # the last token of a prompt counts as a decode's
    prefill.until(lambda: prefill.used == 0)
    decode.until(lambda: decode.used == 0)
    assert decode.transfer.metrics.failures == {}


def test_a_prefill_stops_at_its_first_token(sides: tuple[Side, Side], reference: Any) -> None:
    """Whatever `max_tokens` says; its blocks stay until they are read, with the first token in the answer."""
    prefill, _ = sides
    prompt = list(range(5, 45))
    output = prefill.finish(prefill.submit(prompt, EXPORT, max_tokens=100))
    assert (output.token_ids, output.finish_reason) == (reference.greedy(prompt, 1), "length")
    params = output.kv_transfer_params or {}
    assert len(params["remote_block_ids"]) == 3
    assert params["do_remote_prefill"] is True
    assert params["remote_engine_id"] == "p-1"
    assert prefill.used == 3


def test_only_what_is_missing_is_read(sides: tuple[Side, Side], reference: Any) -> None:
    """The decode side's prefix cache counts: of the second prompt, which begins alike, two blocks are read."""
    prefill, decode = sides
    first = list(range(5, 5 + 64))
    second = [*first[:48], *range(700, 720)]
    decode.finish(decode.submit(first, prefill.prefill(first)))
    before = decode.transfer.metrics.bytes
    key = decode.submit(second, prefill.prefill(second))
    decode.finish(key)
    assert decode.driver.tokens(key) == reference.greedy(second, 8)
    assert decode.transfer.metrics.bytes - before == 2 * decode.transfer.layout.block_bytes
    assert decode.driver.started(key).cached_tokens == 48


def test_nothing_is_read_where_all_is_there(sides: tuple[Side, Side], reference: Any) -> None:
    """The prefill side is told at once."""
    prefill, decode = sides
    prompt = list(range(5, 5 + 33))
    decode.finish(decode.submit(prompt, prefill.prefill(prompt)))
    before = decode.transfer.metrics.bytes
    key = decode.submit(prompt, prefill.prefill(prompt))
    decode.finish(key)
    assert decode.driver.tokens(key) == reference.greedy(prompt, 8)
    assert decode.transfer.metrics.bytes == before
    prefill.until(lambda: prefill.used == 0)


def test_other_block_sizes(make: Make, prompts: list[list[int]], reference: Any) -> None:
    """A decode side with blocks of 32 reads from one with 16, and the other way."""
    for number, (there, here) in enumerate(((16, 32), (32, 16))):
        prefill, decode = Side(make(block_size=there), f"p-{number}"), Side(make(block_size=here), f"d-{number}")
        decode.transfer.add_peer(prefill.transfer.name, prefill.transfer.metadata)
        for prompt in prompts:
            key = decode.submit(prompt, prefill.prefill(prompt))
            decode.finish(key)
            assert decode.driver.tokens(key) == reference.greedy(prompt, 8)
        assert decode.transfer.metrics.failures == {}


@pytest.mark.parametrize("how", ["expired", "unknown", "broken", "dead"])
def test_what_fails_is_computed(sides: tuple[Side, Side], reference: Any, how: str) -> None:
    """The pin is over, the engine unknown, the parameters broken, or the writer gone: the answer is the same."""
    prefill, decode = sides
    prompt = list(range(5, 45))
    params = prefill.prefill(prompt)
    if how == "expired":
        for pin in prefill.transfer.exporter._pins.all():
            prefill.transfer.exporter.release(pin.request_id)
    elif how == "dead":
        prefill.driver.engine.close()
    else:
        params |= {"remote_engine_id": "x-1"} if how == "unknown" else {"remote_block_ids": "?"}
    key = decode.submit(prompt, params)
    decode.finish(key)
    assert decode.driver.tokens(key) == reference.greedy(prompt, 8)
    decode.until(lambda: decode.used == 0)
    assert sum(decode.transfer.metrics.failures.values()) == 1


def test_without_a_transfer_a_decode_computes(make: Make, reference: Any) -> None:
    """No request fails that can be computed; a prefill for somebody else has no use here and is refused."""
    driver = make()
    prompt = list(range(5, 25))
    token_ids = np.array(prompt, dtype="<u4").tobytes()
    sampling = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=8)
    params = {"do_remote_prefill": True, "remote_engine_id": "p-1"}
    driver.engine.submit(EngineRequest(key=1, token_ids=token_ids, sampling=sampling, kv_transfer_params=params))
    driver.outputs[1] = []
    driver.run()
    assert driver.tokens(1) == reference.greedy(prompt, 8)
    with pytest.raises(RequestError, match="hands no KV blocks over"):
        driver.engine.submit(EngineRequest(key=2, token_ids=token_ids, sampling=sampling, kv_transfer_params=EXPORT))


class Slow:
    """Stands for a puller whose peer takes its time: the test says when a pull is done and settled."""

    def __init__(self, side: Side, monkeypatch: pytest.MonkeyPatch) -> None:
        self.blocks: list[list[int]] = []
        self.on_done: list[Callable[[TransferError | None], None]] = []
        self.on_settled: list[Callable[[], None]] = []
        self.cancelled: list[Any] = []
        monkeypatch.setattr(side.transfer.puller, "start", self._start)
        monkeypatch.setattr(side.transfer.puller, "cancel", self.cancelled.append)

    def _start(self, params: Any, blocks: list[int], *, on_done: Any, on_settled: Any, **rest: Any) -> int:
        self.blocks.append(blocks)
        self.on_done.append(on_done)
        self.on_settled.append(on_settled)
        return len(self.blocks)

    def late(self, number: int = 0) -> None:
        self.on_done[number](TransferError("deadline", "late"))


REMOTE = {"do_remote_prefill": True}


def test_a_pull_stalls_nobody(sides: tuple[Side, Side], reference: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """While blocks are awaited others are served, and with nobody else there the engine sleeps."""
    _, decode = sides
    slow, prompt, other = Slow(decode, monkeypatch), list(range(5, 45)), [9, 10, 11]
    waiting = decode.submit(prompt, REMOTE)
    decode.driver.step()
    assert decode.driver.engine.stalled()
    key = decode.driver.submit(other)
    decode.finish(key)
    assert decode.driver.tokens(key) == reference.greedy(other, 8)
    assert decode.driver.outputs[waiting] == []
    decode.driver.step()
    assert decode.driver.engine.stalled()
    slow.late()
    slow.on_settled[0]()
    decode.finish(waiting)
    assert decode.driver.tokens(waiting) == reference.greedy(prompt, 8)


def test_unsettled_blocks_are_not_handed_out(
    sides: tuple[Side, Side], reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a deadline the prompt is computed in other blocks; a late write goes where nobody reads."""
    _, decode = sides
    slow, prompt = Slow(decode, monkeypatch), list(range(5, 45))
    key = decode.submit(prompt, REMOTE)
    decode.driver.step()
    slow.late()
    pool = decode.driver.engine._runner.pool
    while decode.driver.finish(key) is None:
        decode.driver.step()
        pool[slow.blocks[0]] = 1e9
    assert decode.driver.tokens(key) == reference.greedy(prompt, 8)
    assert decode.used == 3
    slow.on_settled[0]()
    decode.until(lambda: decode.used == 0)


def test_a_cancel_stops_a_pull(sides: tuple[Side, Side], monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a step; its blocks come back when NIXL is done with them."""
    _, decode = sides
    slow = Slow(decode, monkeypatch)
    key = decode.submit(list(range(5, 45)), REMOTE)
    decode.driver.step()
    decode.driver.engine.cancel(key)
    decode.driver.step()
    assert decode.driver.finish(key) == "cancelled"
    assert slow.cancelled == [1]
    assert decode.used == 3
    slow.on_done[0](TransferError("cancelled", "as told"))
    slow.on_settled[0]()
    decode.until(lambda: decode.used == 0)


def test_a_cancel_before_the_pull_tells_the_writer(sides: tuple[Side, Side]) -> None:
    """A request that never entered the batch gives the other side's blocks back too."""
    prefill, decode = sides
    key = decode.submit(list(range(5, 45)), prefill.prefill(list(range(5, 45))))
    decode.driver.engine.cancel(key)
    decode.driver.step()
    assert decode.driver.finish(key) == "cancelled"
    prefill.until(lambda: prefill.used == 0)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_cancel_of_a_prefill_gives_its_blocks_back(sides: tuple[Side, Side], when: str) -> None:
    """Also of one that has ended and waits for a reader, whoever is first of the cancel and its last step."""
    prefill, _ = sides
    key = prefill.submit(list(range(5, 45)), EXPORT)
    if when == "after":
        prefill.finish(key)
        assert prefill.used == 3
    prefill.driver.engine.cancel(key)
    prefill.driver.step()
    prefill.until(lambda: prefill.used == 0)
    assert prefill.driver.finish(key) == ("length" if when == "after" else "cancelled")
    assert prefill.transfer.metrics.expired == 0


def test_a_prefill_that_is_the_whole_answer_hands_nothing_over(sides: tuple[Side, Side], reference: Any) -> None:
    """A stop token came first: nobody will want the blocks."""
    prefill, _ = sides
    prompt = list(range(5, 45))
    key = prefill.submit(prompt, EXPORT, stop_token_ids=reference.greedy(prompt, 1))
    output = prefill.finish(key)
    assert (output.finish_reason, output.kv_transfer_params) == ("stop", None)
    prefill.until(lambda: prefill.used == 0)


def test_the_first_token_counts(sides: tuple[Side, Side], reference: Any) -> None:
    """The prefill stands by its token: decode goes on behind it, and tells what its pull took."""
    prefill, decode = sides
    prompt = list(range(5, 45))
    first = prefill.finish(prefill.submit(prompt, EXPORT))
    params = first.kv_transfer_params or {}
    assert params["first_token_counts"] is True
    key = decode.submit([*prompt, *first.token_ids], params, generated=1)
    decode.finish(key)
    assert first.token_ids + decode.driver.tokens(key) == reference.greedy(prompt, 8)
    told = decode.driver.outputs[key][0].kv_transfer_params
    assert told["transferred_tokens"] == 40
    assert told["transfer_ms"] > 0


def test_a_preempted_pull_computes(make: Make, reference: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """When blocks run out the least urgent gives its own back, also while they are being filled."""
    decode = Side(make(kv_blocks=8, max_context=96), "d-1")
    slow, prompt, long = Slow(decode, monkeypatch), list(range(5, 45)), list(range(50, 110))
    first = decode.driver.submit(long, max_tokens=30)
    decode.driver.step()
    key = decode.submit(prompt, REMOTE)
    decode.until(lambda: bool(slow.cancelled))
    slow.on_done[0](TransferError("cancelled", "as told"))
    slow.on_settled[0]()
    decode.finish(key)
    assert decode.driver.tokens(first) == reference.greedy(long, 30)
    assert decode.driver.tokens(key) == reference.greedy(prompt, 8)
    decode.until(lambda: decode.used == 0)


def test_a_lease_gives_the_blocks_back(make: Make) -> None:
    """Nobody comes for them; they are cached from then on."""
    prefill = Side(make(kv_lease_s=0.05), "p-1")
    prefill.prefill(list(range(5, 45)))
    prefill.until(lambda: prefill.used == 0)
    assert prefill.driver.engine.load().kv_blocks_cached == 2
    assert prefill.transfer.metrics.expired == 1


def test_engines_on_their_threads(make: Make, prompts: list[list[int]], reference: Any) -> None:
    """As a service runs them: prefills and decodes overlap, and all memory is free at the end."""
    prefill, decode = make().engine, make().engine
    source, target = prefill.open_transfer("p-1"), decode.open_transfer("d-1")
    target.add_peer("p-1", source.metadata)
    sampling = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=8)
    tokens: dict[int, list[int]] = {key: [] for key in range(32)}
    ended = threading.Semaphore(0)

    def prompt_of(key: int) -> list[int]:
        return [key + 5, *prompts[key % len(prompts)]]

    def submit(engine: Any, key: int, params: dict[str, Any] | None) -> None:
        token_ids = np.array(prompt_of(key), dtype="<u4").tobytes()
        engine.submit(EngineRequest(key=key, token_ids=token_ids, sampling=sampling, kv_transfer_params=params))

    def on_prefill(step: StepResult) -> None:
        for output in step.outputs:
            submit(decode, output.rid, output.kv_transfer_params)

    def on_decode(step: StepResult) -> None:
        for output in step.outputs:
            tokens[output.rid] += output.token_ids
            if output.finish_reason:
                ended.release()

    deaths: list[str] = []
    prefill.start(on_prefill, deaths.append)
    decode.start(on_decode, deaths.append)
    for key in tokens:
        submit(prefill, key, EXPORT)
    for _ in tokens:
        assert ended.acquire(timeout=60)
    assert tokens == {key: reference.greedy(prompt_of(key), 8) for key in tokens}
    assert target.metrics.failures == {}
    assert deaths == []


def test_without_nixl_it_does_not_start(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that says what to install, as for every other missing package."""

    def missing(*args: Any) -> None:
        raise TransferError("missing", "needs nixl: pip install 'dynamo-llm[nixl]'")

    monkeypatch.setattr("dynamo_llm.transfer.transfer.NixlAgent", missing)
    with pytest.raises(EngineError, match=r"dynamo-llm\[nixl\]"):
        make().engine.open_transfer("p-1")
