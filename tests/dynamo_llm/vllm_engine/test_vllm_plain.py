"""The real vLLM by options that we know nothing of, without prefix caching and with its own statistics."""

from collections.abc import Iterator
from typing import Any

import pytest
from vllm_driver import start

pytestmark = pytest.mark.filterwarnings("default")  # vLLM's own deprecations are not ours to mend

_GIVEN: dict[str, Any] = {
    "enable_prefix_caching": False,
    "disable_log_stats": False,
    "max_num_seqs": 3,
    "max_num_batched_tokens": "96",
    "long_prefill_token_threshold": 64,
    "scheduling_policy": "fcfs",
    "seed": 5,
    "kv_cache_memory_bytes": 64 << 20,
    "additional_config": '{"mine": 1}',
}


@pytest.fixture(scope="module")
def plain() -> Iterator[Any]:
    driver = start(**_GIVEN)
    yield driver
    driver.engine.close()


@pytest.mark.parametrize(
    ("part", "name", "expected"),
    [
        ("cache_config", "enable_prefix_caching", False),
        ("cache_config", "kv_cache_memory_bytes", 64 << 20),
        ("cache_config", "num_gpu_blocks_override", 64),
        ("scheduler_config", "max_num_seqs", 3),
        ("scheduler_config", "max_num_batched_tokens", 96),
        ("scheduler_config", "long_prefill_token_threshold", 64),
        ("scheduler_config", "policy", "fcfs"),
        ("model_config", "seed", 5),
        ("model_config", "max_logprobs", 100),
        ("observability_config", "enable_logging_iteration_details", False),
        ("", "additional_config", {"mine": 1}),
        ("", "kv_events_config", None),
    ],
)
def test_options_reach_vllm_s_configuration(plain: Any, part: str, name: str, expected: Any) -> None:
    """As given; numbers and structures also as text, as a command line brings them."""
    config = plain.engine._llm.vllm_config
    assert getattr(getattr(config, part) if part else config, name) == expected


def test_without_prefix_caching_there_are_no_events_and_the_load_is_right(plain: Any) -> None:
    """Nothing is found again and nothing announced; running and waiting requests and blocks are told as ever."""
    prompt = list(range(300, 400))
    assert [plain.run(prompt)[0].started.cached_tokens for _ in range(2)] == [0, 0]
    since = len(plain.loads)
    keys = [plain.submit(prompt, max_tokens=20, ignore_eos=True) for _ in range(5)]
    for key in keys:
        plain.finish(key)
    loads = plain.loads[since:]
    assert any((load.running, load.waiting) == (3, 2) for load in loads)
    assert max(load.kv_blocks_used for load in loads) == 12
    assert {(load.kv_blocks_cached, load.kv_blocks_total) for load in loads} == {(0, 63)}
    last = plain.engine.load()
    assert (last.running, last.waiting, last.waiting_prefill_tokens, last.kv_blocks_used) == (0, 0, 0, 0)
    assert plain.ops == []
