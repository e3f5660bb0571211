"""The same engine on a GPU, where there is one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

Make = Callable[..., Any]

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


def test_greedy_on_cuda(make: Make, reference: Any, prompts: list[list[int]]) -> None:
    """A changing batch in float32, with chunks, prefix hits and preemption, gives transformers' tokens."""
    driver = make(device="cuda", dtype="float32", kv_blocks=14, max_batch_tokens=40)
    for _ in range(2):
        keys = []
        for prompt in prompts:
            keys.append(driver.submit(prompt, max_tokens=24))
            driver.step()
        driver.run()
        for key, prompt in zip(keys, prompts, strict=True):
            assert driver.tokens(key) == reference.greedy(prompt, 24)
    assert driver.engine._scheduler.preemptions > 0
    assert driver.engine.load().kv_blocks_used == 0


def test_bfloat16_is_the_default(make: Make, reference: Any, prompts: list[list[int]]) -> None:
    """The dtype is that of the weights; its logprobs stay near the exact ones."""
    driver = make(device="cuda")
    assert driver.engine._runner.pool.dtype == torch.bfloat16
    key = driver.submit(prompts[4], max_tokens=8, logprobs=2)
    driver.run()
    tokens = driver.tokens(key)
    expected = reference.logprobs(prompts[4] + tokens)[len(prompts[4]) - 1 :]
    for entry, row in zip(driver.logprobs(key), expected, strict=False):
        assert entry.logprob == pytest.approx(row[entry.token_id].item(), abs=0.3)


def test_close_gives_the_memory_back(make: Make, prompts: list[list[int]]) -> None:
    """To the device: the next engine takes its share of what is free there."""
    driver = make(device="cuda", kv_blocks=4096)
    driver.generate(prompts[0], max_tokens=4)
    pool_bytes, before = driver.engine._runner.pool.nbytes, torch.cuda.memory_reserved()
    driver.engine.close()
    assert before - torch.cuda.memory_reserved() >= pool_bytes


def test_sampling_on_cuda(make: Make, prompts: list[list[int]]) -> None:
    """Every parameter at once runs, and a seed gives the same tokens in another batch."""
    everything = {
        "temperature": 0.9,
        "top_k": 50,
        "top_p": 0.9,
        "min_p": 0.01,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.1,
        "logit_bias": {7: 1.0},
        "min_tokens": 4,
        "logprobs": 3,
        "prompt_logprobs": 2,
        "seed": 3,
        "max_tokens": 16,
    }
    driver = make(device="cuda", dtype="float32", prefix_caching=False)
    alone = driver.generate(prompts[3], **everything)
    others = [driver.submit(prompt, temperature=1.0, max_tokens=16) for prompt in prompts[:3]]
    assert driver.generate(prompts[3], **everything) == alone
    assert all(driver.finish(key) == "length" for key in others)


def test_default_pool_on_cuda(make: Make) -> None:
    """The pool takes its share of the free memory."""
    driver = make(device="cuda", kv_blocks=None, kv_memory_fraction=0.01)
    assert driver.engine.info.kv_blocks > 1000
