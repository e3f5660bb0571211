"""The engine as the service sees it: its thread, its refusals, its load figures, its end."""

import logging
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dynamo_llm.engines import create_engine
from dynamo_llm.engines.base import Engine, EngineError, EngineRequest, RequestError, StepResult
from dynamo_llm.engines.torch_engine import runner
from kvstore.cards import Cleared
from kvstore.wire import Output, SamplingParams

Make = Callable[..., Any]
DEADLINE_S = 60


class Service:
    """Collects what a started engine says."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.steps: list[StepResult] = []
        self.outputs: dict[int, list[Output]] = {}
        self.deaths: list[str] = []
        self._changed = threading.Condition()
        engine.start(self._on_step, self._on_death)

    def _on_step(self, step: StepResult) -> None:
        with self._changed:
            self.steps.append(step)
            for output in step.outputs:
                self.outputs.setdefault(output.rid, []).append(output)
            self._changed.notify_all()

    def _on_death(self, reason: str) -> None:
        with self._changed:
            self.deaths.append(reason)
            self._changed.notify_all()

    def wait(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, DEADLINE_S)

    def finish(self, key: int) -> str | None:
        return self.outputs[key][-1].finish_reason if self.outputs.get(key) else None


def request(key: int = 1, prompt: Any = (5, 6, 7), **more: Any) -> EngineRequest:
    fields = {k: more.pop(k) for k in ("lora", "cache_salt", "priority", "kv_transfer_params") if k in more}
    sampling = SamplingParams(**({"temperature": 0.0, "ignore_eos": True, "max_tokens": 8} | more))
    token_ids = prompt if isinstance(prompt, bytes) else np.array(prompt, dtype="<u4").tobytes()
    return EngineRequest(key=key, token_ids=token_ids, sampling=sampling, **fields)


@pytest.fixture
def service(make: Make) -> Service:
    """A started engine."""
    return Service(make().engine)


def test_requests_from_many_threads(service: Service, reference: Any) -> None:
    """Requests submitted from several threads at once all get their own answer."""
    threads = [
        threading.Thread(target=lambda n=n: [service.engine.submit(request(n * 10 + i, [n + 5, 9])) for i in range(5)])
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    keys = [n * 10 + i for n in range(4) for i in range(5)]
    service.wait(lambda: all(service.finish(key) == "length" for key in keys))
    for key in keys:
        tokens = [token for output in service.outputs[key] for token in output.token_ids]
        assert tokens == reference.greedy([key // 10 + 5, 9], 8)
        assert [output.started is not None for output in service.outputs[key]] == [True] + [False] * 7


def test_info_and_load(service: Service) -> None:
    """The figures describe the model, the pool and the work done."""
    info = service.engine.info
    assert (info.name, info.model, info.block_size, info.kv_blocks) == ("torch", "demo", 16, 256)
    assert (info.max_context, info.vocab_size, info.eos_token_ids) == (2048, 2048, (1,))
    service.engine.submit(request(prompt=list(range(5, 45))))
    service.wait(lambda: service.finish(1) == "length")
    service.wait(lambda: service.engine.load().running == 0)
    load = service.engine.load()
    assert (load.waiting, load.waiting_prefill_tokens, load.kv_blocks_used) == (0, 0, 0)
    assert (load.kv_blocks_total, load.kv_blocks_cached) == (256, 2)
    assert load.prefill_tokens_per_s > 0
    assert load.decode_step_ms > 0
    assert sum(step.prefill_tokens for step in service.steps) == 40
    assert sum(step.decode_tokens for step in service.steps) == 7


def test_load_counts_what_was_queued_since(make: Make) -> None:
    """Submitted requests show in the load before a step has seen them, and once."""
    driver = make()
    driver.submit([5] * 10)
    driver.submit([5] * 20)
    assert (driver.engine.load().waiting, driver.engine.load().waiting_prefill_tokens) == (2, 30)
    driver.step()
    load = driver.engine.load()
    assert (load.running, load.waiting, load.waiting_prefill_tokens) == (2, 0, 0)


@pytest.mark.parametrize(
    ("wrong", "code", "word"),
    [
        ({"prompt": b""}, "invalid_request", "token_ids"),
        ({"prompt": b"123"}, "invalid_request", "uint32"),
        ({"prompt": [2048]}, "invalid_request", "vocabulary"),
        ({"prompt": [5] * 2048}, "context_length_exceeded", "2048"),
        ({"lora": "pirate"}, "invalid_request", "pirate"),
        ({"kv_transfer_params": {}}, "invalid_request", "kv_transfer_params"),
        ({"extra": {"beam": 4}}, "invalid_request", "beam"),
        ({"logit_bias": {9999: 1.0}}, "invalid_request", "9999"),
        ({"logit_bias": {9: float("nan")}}, "invalid_request", "finite"),
        ({"logit_bias": {9: -1e39}}, "invalid_request", "10000"),
        ({"stop_token_ids": (-1,)}, "invalid_request", "stop_token_ids"),
    ],
)
def test_refusals(make: Make, wrong: dict[str, Any], code: str, word: str) -> None:
    """What can never be served is refused at submission, with its code and a word that helps."""
    with pytest.raises(RequestError, match=word) as raised:
        make().engine.submit(request(**wrong))
    assert raised.value.code == code
    assert "\n" not in raised.value.message


def test_key_in_flight_is_refused(make: Make) -> None:
    """A key names one request at a time, and is free again after its last output."""
    driver = make()
    driver.engine.submit(request(1))
    driver.outputs[1] = []
    with pytest.raises(RequestError, match="key 1"):
        driver.engine.submit(request(1))
    driver.run()
    driver.engine.submit(request(1))


def test_full_queue_is_refused(make: Make) -> None:
    """The waiting queue is bounded, and has room again when it has emptied."""
    driver = make(max_seqs=1, max_waiting=3)
    for _ in range(3):
        driver.submit([5, 6])
    with pytest.raises(RequestError) as raised:
        driver.submit([5, 6])
    assert raised.value.code == "overloaded"
    driver.step()
    driver.submit([5, 6])
    driver.run()


def test_cancel_in_order(make: Make) -> None:
    """A cancel ends the request that had the key when it was called, not the next one of that key."""
    driver = make()
    driver.engine.submit(request(1, max_tokens=1))
    driver.outputs[1] = []
    driver.engine.cancel(1)
    driver.step()
    assert driver.finish(1) == "cancelled"
    driver.outputs[1] = []
    driver.engine.submit(request(1, max_tokens=2))
    driver.run()
    assert driver.finish(1) == "length"


def test_close_outlives_a_broken_gpu(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory of a GPU is given back; one that has failed cannot even do that, and the engine ends all the same."""
    asked: list[bool] = []

    def empty_cache() -> None:
        asked.append(True)
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    engine = make().engine
    engine._runner._device = torch.device("cuda")
    engine.close()
    assert asked


def test_close_ends_everything(make: Make) -> None:
    """Closing answers what is in flight with `cancelled`, announces the loss of the cache, and may be repeated."""
    service = Service(make(max_seqs=2).engine)
    for key in range(5):
        service.engine.submit(request(key, list(range(5, 40)), max_tokens=1500))
    service.wait(lambda: len(service.steps) > 3)
    service.engine.close()
    service.engine.close()
    assert {service.finish(key) for key in range(5)} == {"cancelled"}
    assert service.steps[-1].ops[-1] == Cleared()
    assert service.steps[-1].load.kv_blocks_used == 0
    assert service.deaths == []
    with pytest.raises(RequestError, match="closed"):
        service.engine.submit(request(9))


def test_death_answers_everyone(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that breaks ends every request with `engine_failure`, then says why, once."""

    def break_down(*arguments: Any) -> None:
        raise MemoryError("no more blocks of memory")

    service.engine.submit(request(1, max_tokens=1500))
    service.wait(lambda: bool(service.outputs))
    monkeypatch.setattr(service.engine._runner, "run", break_down)  # type: ignore[attr-defined]
    service.wait(lambda: bool(service.deaths))
    assert service.finish(1) == "error"
    error = service.outputs[1][-1].error
    assert error is not None
    assert error.code == "engine_failure"
    assert service.deaths == ["MemoryError: no more blocks of memory"]
    with pytest.raises(RequestError, match="no more blocks") as raised:
        service.engine.submit(request(2))
    assert raised.value.code == "engine_failure"


@pytest.mark.parametrize("breaks", ["_scheduler.schedule", "_runner.run", "_scheduler.advance"])
def test_death_loses_no_cancel(make: Make, monkeypatch: pytest.MonkeyPatch, breaks: str) -> None:
    """A request that the breaking step had cancelled already gets its last output like all others."""

    def break_down(*arguments: Any) -> None:
        raise MemoryError("no more blocks of memory")

    engine = make().engine
    for key in (1, 2):
        engine.submit(request(key))
    engine.cancel(1)
    part, method = breaks.split(".")
    monkeypatch.setattr(getattr(engine, part), method, break_down)
    service = Service(engine)
    service.wait(lambda: bool(service.deaths))
    assert [output.finish_reason for output in service.outputs[1]] == ["cancelled"]
    assert [output.finish_reason for output in service.outputs[2]] == ["error"]


def test_start_twice_is_refused(service: Service) -> None:
    """An engine has one thread."""
    with pytest.raises(RuntimeError, match="started"):
        service.engine.start(lambda step: None, lambda reason: None)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kv_block": 5}, "kv_block.*kv_blocks"),
        ({"block_size": 10}, "block_size"),
        ({"kv_blocks": 0}, "kv_blocks"),
        ({"dtype": "int8"}, "dtype"),
        ({"device": "warp"}, "warp"),
        ({"max_context": 4096}, "4096.*2048"),
        ({"max_batch_tokens": 4, "max_seqs": 8}, "max_batch_tokens"),
        ({"attention": "native", "dtype": "bfloat16", "device": "cpu"}, "native"),
    ],
)
def test_wrong_options(demo: Path, options: dict[str, Any], words: str) -> None:
    """Unknown names and impossible values are errors of one line."""
    with pytest.raises(EngineError, match=words) as raised:
        create_engine("torch", demo, "demo", options)
    assert "\n" not in str(raised.value)


def test_context_that_does_not_fit_the_pool(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    """A context that was asked for is served or refused; the model's own is cut to the pool, with a warning."""
    with pytest.raises(EngineError, match=r"600.*512.*kv_blocks to 38"):
        make(kv_blocks=32, max_context=600)
    with caplog.at_level(logging.WARNING):
        assert make(kv_blocks=32).engine.info.max_context == 512
    assert "cut to the 512" in caplog.text


def test_pool_is_sized_by_available_memory(tmp_path: Path) -> None:
    """What the page cache holds counts, for it is given back."""
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  8000 kB\nMemFree:  100 kB\nMemAvailable:  6000 kB\n")
    assert runner._available_bytes(meminfo) == 6000 * 1024
    assert runner._available_bytes() > 0
    meminfo.write_text("MemTotal:  8000 kB\n")
    with pytest.raises(EngineError, match="kv_blocks"):
        runner._available_bytes(meminfo)


def test_options_as_text(make: Make) -> None:
    """Numbers and switches may come as a command line has them."""
    driver = make(kv_blocks="32", prefix_caching="false", block_size="32")
    assert driver.engine.info.kv_blocks == 32
    assert driver.engine.info.max_context == 1024, "a sequence has to fit the pool"


def test_default_pool_is_bounded(demo: Path) -> None:
    """On a CPU nobody's memory is taken by a pool that nobody asked for."""
    engine = create_engine("torch", demo, "demo", {"attention": "sdpa", "device": "cpu"})
    assert 1 <= engine.info.kv_blocks <= 2048
    engine.close()


def test_unknown_engine() -> None:
    """An unknown engine is answered with the nearest one there is."""
    with pytest.raises(EngineError, match="'torch'"):
        create_engine("pytorch", "/nowhere", "m", {})


IMPORT = """
import sys
sys.modules["torch"] = None
from dynamo_llm.engines import create_engine
try:
    create_engine("torch", "/nowhere", "m", {})
except Exception as error:
    print(type(error).__name__, error)
"""


def test_missing_package_names_the_extra() -> None:
    """Without torch the module still imports, and choosing the engine says what to install."""
    run = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout.startswith("EngineError")
    assert "dynamo-llm[worker]" in run.stdout
    assert "\n" not in run.stdout.strip()
