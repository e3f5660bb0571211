"""KV events and load of the real vLLM with a small cache and a small batch: 11 blocks of 32 tokens, two sequences."""

import contextlib
import queue
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import zmq
from vllm_driver import WAIT_S, hashes, resident, start

from dynamo_llm.engines.kv_events import KvEventSubscriber, Translator
from kvstore.cards import Cleared, KvOp, Removed

pytestmark = pytest.mark.filterwarnings("default")  # vLLM's own deprecations are not ours to mend

_BLOCKS = 11
_fresh = count(100)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Its events go by a configuration of the test's own, under a topic."""
    folder = tmp_path_factory.mktemp("zmq")
    events = {"enable_kv_cache_events": True, "publisher": "zmq", "topic": "kv"}
    sockets = {"endpoint": f"ipc://{folder}/events", "replay_endpoint": f"ipc://{folder}/replay"}
    sizes = {"num_gpu_blocks_override": _BLOCKS + 1, "max_model_len": 256, "max_num_seqs": 2}
    driver = start(kv_events_config={**events, **sockets}, **sizes)
    yield driver
    driver.engine.close()


def _prompt(length: int) -> list[int]:
    """One that shares nothing with any before it."""
    first = next(_fresh)
    return [first, *range(200, 199 + length)]


def test_running_and_waiting_requests_and_blocks_are_vllm_s_own(small: Any) -> None:
    """Of five requests two run, by `max_num_seqs`, and three wait; the blocks in use are theirs, and then free."""
    since = len(small.loads)
    keys = [small.submit(_prompt(40), max_tokens=40, ignore_eos=True) for _ in range(5)]
    for key in keys:
        small.finish(key)
    loads = small.loads[since:]
    full = [load for load in loads if (load.running, load.waiting) == (2, 3)]
    assert full
    assert {load.waiting_prefill_tokens for load in full} == {120}
    assert 3 < max(load.kv_blocks_used for load in loads) <= 6
    assert {load.kv_blocks_total for load in loads} == {_BLOCKS}
    assert any(load.decode_step_ms > 0 and load.prefill_tokens_per_s > 0 for load in loads)
    last = small.engine.load()
    assert (last.running, last.waiting, last.waiting_prefill_tokens, last.kv_blocks_used) == (0, 0, 0, 0)


def test_what_we_believe_resident_is_what_vllm_has(small: Any) -> None:
    """A cache that overflows: each prompt finds as many tokens cached as the blocks that we know of say."""
    prompts = [_prompt(100) for _ in range(5)]
    for prompt in prompts:
        small.run(prompt, max_tokens=1)
    found = []
    for prompt in reversed(prompts):
        small.settle(_prompt(40))
        believed = resident(small.ops)
        assert len(believed) <= _BLOCKS
        assert small.engine.load().kv_blocks_cached == len(believed)
        known = [block in believed for block in hashes(prompt)]
        outputs = small.run(prompt, max_tokens=1)
        assert outputs[0].started.cached_tokens == 32 * [*known, False].index(False)
        found.append(outputs[0].started.cached_tokens)
    assert min(found) == 0
    assert max(found) > 0
    assert any(isinstance(op, Removed) for op in small.ops)


class _Lossy:
    """Between vLLM and a second subscriber: passes on what it is told to, and drops the rest."""

    def __init__(self, driver: Any, scratch: Path, stack: contextlib.ExitStack) -> None:
        config = driver.engine._llm.vllm_config.kv_events_config
        context = stack.enter_context(zmq.Context())
        self._source = stack.enter_context(context.socket(zmq.SUB))
        self._source.subscribe("")
        self._source.connect(config.endpoint)
        self._out = stack.enter_context(context.socket(zmq.XPUB))
        endpoint = f"ipc://{scratch}/lossy"
        self._out.bind(endpoint)
        self._ops: queue.Queue[Sequence[KvOp]] = queue.Queue()
        self.seen: list[KvOp] = []
        self.subscriber = KvEventSubscriber(
            endpoint,
            Translator("demo", 32),
            self._ops.put,
            replay_endpoint=config.replay_endpoint,
            topic=config.topic,
        )
        stack.callback(self.subscriber.close)
        self.subscriber.start()
        assert self._out.poll(WAIT_S * 1e3)
        assert self._out.recv() == b"\x01kv"
        while not self._source.poll(100):
            driver.run(_prompt(40), max_tokens=1)  # until vLLM has noticed the new subscription

    def take(self) -> list[bytes]:
        assert self._source.poll(WAIT_S * 1e3)
        return self._source.recv_multipart()

    def pass_on(self, frames: list[bytes]) -> None:
        self._out.send_multipart(frames)

    def learn(self, block: int) -> None:
        """What the subscriber makes of it, until the block is among what it believes resident."""
        while block not in resident(self.seen):
            self.seen += self._ops.get(timeout=WAIT_S)


def test_dropped_events_are_replayed(small: Any, tmp_path: Path) -> None:
    """Whatever came before a subscriber joined, and what was dropped on the way, vLLM gives again, and in the end two
    subscribers believe the same."""
    with contextlib.ExitStack() as stack:
        lossy = _Lossy(small, tmp_path, stack)
        first = number = _number(frames := lossy.take())
        lossy.pass_on(frames)
        while lossy._source.poll(0):
            number = _number(lossy.take())
        for _ in range(3):  # one step each, and so one batch of events each
            small.run(_prompt(100), max_tokens=1)
            assert _number(lossy.take()) == (number := number + 1)
        last = _prompt(100)
        small.settle(last)
        lossy.pass_on(frames := lossy.take())
        lossy.learn(hashes(last)[-1])
        assert first > 0
        assert lossy.subscriber.replayed >= _number(frames) - 1  # all but the two, which replays may bring as well
        assert (lossy.subscriber.lost, lossy.subscriber.broken) == (0, 0)
        assert resident(lossy.seen) == resident(small.ops)


def _number(frames: list[bytes]) -> int:
    return int.from_bytes(frames[1], "big")


def test_after_lost_events_vllm_s_cache_is_empty_too(small: Any) -> None:
    """What we no longer know of, vLLM forgets, so that both agree again."""
    prompt = _prompt(100)
    small.settle(prompt)
    since = len(small.ops)
    small.engine._events_lost()
    for _ in range(2):  # vLLM tells of it with a step; the prompt's blocks would outlive both of these
        small.run(_prompt(40), max_tokens=1)
    while not any(isinstance(op, Cleared) for op in small.ops[since:]):
        small.step()
    assert small.run(prompt, max_tokens=1)[0].started.cached_tokens == 0
