"""The compiled kernels compute what torch's own operators compute, on one thread and on several."""

import errno
import fcntl
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from numba.core.caching import FunctionCache
from numba.core.errors import NumbaError

from dynamo_llm.engines import create_engine
from dynamo_llm.engines.base import EngineError
from dynamo_llm.engines.torch_engine import kernels, native
from dynamo_llm.engines.torch_engine.batch import Batch, build_batch
from dynamo_llm.engines.torch_engine.model_config import ModelConfig
from dynamo_llm.engines.torch_engine.native import NativeOperators
from dynamo_llm.engines.torch_engine.operators import TorchOperators, allocate_pool
from dynamo_llm.engines.torch_engine.rope import rope_table
from dynamo_llm.engines.torch_engine.scheduler import Work
from dynamo_llm.engines.torch_engine.sequence import Sequence
from dynamo_llm.engines.torch_engine.team import Team
from dynamo_llm.engines.torch_engine.weights import Layer
from kvstore.wire import SamplingParams

CPU = torch.device("cpu")
BLOCKS, SIZE, CONTEXT = 300, 8, 400


def config(heads: int, kv_heads: int, head_dim: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=10,
        hidden_size=24,
        intermediate_size=40,
        layers=2,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=1e-5,
        max_context=CONTEXT,
        tied_embeddings=True,
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        qk_norm=True,
        dtype="float32",
        rope={"rope_type": "default", "rope_theta": 10000.0},
        eos_token_ids=(),
    )


def batch_of(lengths: list[int], chunk: int) -> Batch:
    """Sequences with so many tokens of context, decoding; the last one prefills a chunk."""
    tables = np.random.default_rng(0).permutation(BLOCKS).astype(np.int32)[: len(lengths) * 40].reshape(-1, 40)
    work = []
    for row, length in enumerate(lengths):
        sequence = Sequence(row, [1] * length, SamplingParams(), max_tokens=CONTEXT)
        sequence.row = row
        tokens = chunk if row == len(lengths) - 1 else 1
        sequence.computed = length - tokens
        work.append(Work(sequence, tokens))
    return build_batch(work, tables, SIZE, CPU)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("shape", [(4, 2, 64), (3, 3, 16), (8, 1, 6), (2, 2, 128)])
@pytest.mark.parametrize("head_norms", [False, True])
def test_kernels_agree_with_torch(shape: tuple[int, int, int], threads: int, head_norms: bool) -> None:
    """Norm, gate and attention over random pools, whatever the shape of the heads and however many threads."""
    torch.manual_seed(1)
    model, batch = config(*shape), batch_of([1, 7, 8, 9, 200, 320, 60], chunk=33)
    heads, kv_heads, head_dim = shape
    pool = allocate_pool(model, BLOCKS, SIZE, CPU, torch.float32).normal_()
    twin = pool.clone()
    rope = rope_table(model.rope, head_dim, CONTEXT, CPU)
    expected, actual = TorchOperators(model, pool, rope), NativeOperators(model, twin, rope, threads)
    norm = torch.rand(head_dim) + 0.5 if head_norms else None
    layer = Layer(*[None] * 2, norm, norm, *[None] * 4)  # type: ignore[arg-type]
    qkv = torch.randn(len(batch.token_ids), (heads + 2 * kv_heads) * head_dim)
    for index in range(model.layers):
        result = actual.attend(index, layer, qkv.clone(), batch)
        torch.testing.assert_close(result, expected.attend(index, layer, qkv.clone(), batch), atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(twin, pool, atol=1e-5, rtol=1e-5)
    for rows in (1, 9, 700):
        x, weight = torch.randn(rows, 24), torch.randn(24)
        torch.testing.assert_close(actual.norm(x, weight), expected.norm(x, weight))
        gate_up = torch.randn(rows, 200) * 30
        torch.testing.assert_close(actual.silu_gate(gate_up), expected.silu_gate(gate_up), atol=1e-5, rtol=1e-5)


def test_team_finds_openmp() -> None:
    """torch's OpenMP is there to run on; without it a team is one thread."""
    assert Team(3).threads == 3
    assert Team(1).threads == 1


def test_kernels_are_kept_on_disk(demo: Path) -> None:
    """A second process loads what the first has compiled."""
    program = (
        "from dynamo_llm.engines.torch_engine import kernels as k\n"
        "made = [k.compile_kernel(f) for f in (k.norm, k.make_attend(6, 4, 2, 16, 64))]\n"
        "print(sum(kernel.cache_hits for kernel in made))"
    )
    command = [sys.executable, "-c", program]
    subprocess.run(command, check=True, timeout=100)
    again = subprocess.run(command, check=True, timeout=100, capture_output=True, text=True)
    assert again.stdout.strip() == "2"


def test_cache_is_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel is looked up, compiled and kept by one process at a time, or two could mix up each other's."""
    real, locked = kernels.cfunc, []

    def look(*arguments: Any, **options: Any) -> Any:
        (path,) = Path(FunctionCache(kernels.norm).cache_path).glob("norm.lock")
        with open(path) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                locked.append(True)
        return real(*arguments, **options)

    monkeypatch.setattr(kernels, "cfunc", look)
    assert kernels.compile_kernel(kernels.norm).address
    assert locked == [True]
    assert kernels.compile_kernel(kernels.norm).address, "the lock is given back"


NO_PLACE = [
    RuntimeError("cannot cache function 'norm': no locator available for file 'kernels.py'"),
    OSError(errno.ENOSPC, "No space left on device"),
]


@pytest.mark.parametrize("error", NO_PLACE)
def test_no_place_for_a_cache(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Where nothing can be written, kernels are compiled all the same."""
    real, asked = kernels.cfunc, []

    def no_locator(*arguments: Any, cache: bool = False, **options: Any) -> Any:
        asked.append(cache)
        if cache:
            raise error
        return real(*arguments, **options)

    monkeypatch.setattr(kernels, "cfunc", no_locator)
    assert kernels.compile_kernel(kernels.norm).address
    assert asked == [True, False]


def test_fallback(make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: Any, demo: Path) -> None:
    """Where the kernels cannot be compiled, `auto` warns and uses torch; `native` is an error."""

    def fail(*arguments: Any) -> None:
        raise native.KernelError("numba cannot compile norm: no such machine")

    monkeypatch.setattr(native, "NativeOperators", fail)
    with caplog.at_level(logging.WARNING):
        driver = make(attention="auto")
    assert "no such machine" in caplog.text
    assert len(driver.generate([5, 6, 7])) == 8
    with pytest.raises(EngineError, match="no such machine"):
        create_engine("torch", demo, "m", {"attention": "native", "device": "cpu"})


@pytest.mark.parametrize("error", [RuntimeError("LLVM ERROR: no such target"), OSError(), NumbaError("bad\ntrace")])
def test_compiler_fails(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: Any, error: Exception
) -> None:
    """Whatever numba or LLVM raises, `auto` warns in one line and uses torch."""

    def fail(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr(kernels, "compile_kernel", fail)
    with caplog.at_level(logging.WARNING):
        make(attention="auto")
    assert "numba cannot compile norm" in caplog.text
    assert "trace" not in caplog.text


class Unloadable(ModuleType):
    """A module whose shared library is broken."""

    def __getattr__(self, name: str) -> Any:
        raise OSError("libllvmlite.so: cannot open shared object file")


@pytest.mark.parametrize("module", [None, Unloadable("native")])
def test_numba_missing(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: Any, module: ModuleType | None
) -> None:
    """Without numba, or with one that cannot be loaded, `auto` uses torch."""
    monkeypatch.setitem(sys.modules, "dynamo_llm.engines.torch_engine.native", module)
    with caplog.at_level(logging.WARNING):
        make(attention="auto")
    assert "numba" in caplog.text
