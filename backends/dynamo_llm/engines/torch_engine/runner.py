"""Holds model and KV pool on their device, and turns a step's work into tokens. Only the engine's thread calls it."""

import contextlib
import gc
import logging
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from dynamo_llm.engines.base import EngineError
from dynamo_llm.engines.model_files import fit_context
from dynamo_llm.engines.torch_engine.batch import Batch, build_batch
from dynamo_llm.engines.torch_engine.config import TorchConfig
from dynamo_llm.engines.torch_engine.model import Model
from dynamo_llm.engines.torch_engine.model_config import ModelConfig, read_model_config
from dynamo_llm.engines.torch_engine.operators import Operators, TorchOperators, allocate_pool
from dynamo_llm.engines.torch_engine.rope import rope_table
from dynamo_llm.engines.torch_engine.sampling import sample, token_logprobs
from dynamo_llm.engines.torch_engine.scheduler import Work
from dynamo_llm.engines.torch_engine.sequence import Sequence
from dynamo_llm.engines.torch_engine.weights import load_weights
from dynamo_llm.transfer import Layout
from kvstore.wire import TokenLogprob

logger = logging.getLogger(__name__)

_CPU_BLOCKS = 2048
"""Most blocks of a pool on a CPU whose size nobody chose."""
_PROMPT_ROWS = 256
"""Rows of prompt logits at a time: with large vocabularies they outweigh everything else."""

Sampled = tuple[Sequence, int, TokenLogprob | None]


class Runner:
    """Everything that touches torch."""

    def __init__(self, folder: Path, config: TorchConfig) -> None:
        """Loads the model. Raises `EngineError`."""
        self.model_config = read_model_config(folder)
        self._device = _device(config.device)
        self._threads = config.threads or len(os.sched_getaffinity(0))
        self.prepare_thread()
        dtype = _dtype(config, self.model_config, self._device)
        weights = load_weights(folder, self.model_config, self._device, dtype)
        self.kv_blocks = config.kv_blocks or _default_blocks(config, self.model_config, self._device, dtype)
        self.max_context = fit_context(
            config.max_context, self.model_config.max_context, self.kv_blocks, config.block_size
        )
        self._block_size = config.block_size
        self.pool = allocate_pool(self.model_config, self.kv_blocks, config.block_size, self._device, dtype)
        rope = rope_table(self.model_config.rope, self.model_config.head_dim, self.max_context, self._device)
        operators = self._operators(config.attention, self.pool, rope)
        self._model: Model | None = Model(weights, operators)
        logger.info(
            "model on %s in %s, %d KV blocks of %d tokens, %s",
            self._device,
            dtype,
            self.kv_blocks,
            config.block_size,
            type(operators).__name__,
        )

    def layout(self, model: str) -> Layout:
        """The pool, as other workers need to know it."""
        kv_blocks, layers, _, kv_heads, block_size, head_dim = self.pool.shape
        return Layout(
            model=model,
            dtype=str(self.pool.dtype).removeprefix("torch."),
            layers=layers,
            kv_heads=kv_heads,
            head_dim=head_dim,
            block_size=block_size,
            block_bytes=self.pool[0].numel() * self.pool.element_size(),
            blocks=kv_blocks,
            address=self.pool.data_ptr(),
            device="cpu" if self._device.type == "cpu" else f"cuda:{self._device.index or 0}",
        )

    def prepare_thread(self) -> None:
        """Call once on each thread that computes: OpenMP's thread count belongs to the calling thread."""
        if self._device.type == "cpu":
            torch.set_num_threads(self._threads)

    def free(self) -> None:
        """Drop weights and pool, and give a GPU's memory back: torch would keep it, and the next engine find none."""
        self._model, self.pool = None, torch.empty(0)
        if self._device.type == "cuda":
            gc.collect()  # the traceback of a step that broke holds on to its tensors
            with contextlib.suppress(RuntimeError):  # a device that has failed does not do even this
                torch.cuda.empty_cache()

    @torch.inference_mode()
    def run(self, work: list[Work], tables: npt.NDArray[np.int32]) -> list[Sampled]:
        """Compute the work; returns the next token of each sequence whose tokens are now all computed."""
        model = self._model
        if model is None:
            raise RuntimeError("the engine is closed")
        batch = build_batch(work, tables, self._block_size, self._device)
        hidden = model.hidden(batch)
        self._prompt_logprobs(model, batch, hidden)
        done = [i for i, item in enumerate(batch.work) if item.completes]
        if not done:
            return []
        # Several tokens of one sequence, or a single one that does not end its prompt: rows without a next token.
        if batch.chunks or len(done) < len(batch.work):
            hidden = hidden[batch.last_tokens[done]]
        sequences = [batch.work[i].sequence for i in done]
        tokens, logprobs = sample(model.logits(hidden), sequences)
        return list(zip(sequences, tokens, logprobs, strict=True))

    def _prompt_logprobs(self, model: Model, batch: Batch, hidden: torch.Tensor) -> None:
        """Collect them for the sequences that want them: position i is judged by the logits of i - 1."""
        end = 0
        for item in batch.work:
            first, end = end, end + item.tokens
            sequence = item.sequence
            if not sequence.wants_prompt_logprobs:
                continue
            if sequence.computed == 0:
                sequence.prompt_logprobs = [None]
            targets = sequence.tokens[
                sequence.computed + 1 : min(sequence.computed + item.tokens + 1, sequence.prompt_tokens)
            ]
            for start in range(0, len(targets), _PROMPT_ROWS):
                part = targets[start : start + _PROMPT_ROWS]
                rows = model.logits(hidden[first + start : first + start + len(part)]).log_softmax(dim=-1)
                counts = [sequence.sampling.prompt_logprobs or 0] * len(part)
                (sequence.prompt_logprobs or []).extend(token_logprobs(rows, part, counts))

    def _operators(self, attention: str, pool: torch.Tensor, rope: torch.Tensor) -> Operators:
        """The compiled ones where they can run. Chosen explicitly, they fail loudly; by `auto`, torch's take over."""
        fit = self._device.type == "cpu" and pool.dtype == torch.float32
        if attention == "native" and not fit:
            raise EngineError("attention 'native' runs on a CPU in float32 only; use 'sdpa'")
        if attention == "sdpa" or not fit:
            return TorchOperators(self.model_config, pool, rope)
        try:
            from dynamo_llm.engines.torch_engine.native import KernelError, NativeOperators
        except (ImportError, OSError) as error:  # OSError: llvmlite's library cannot be loaded
            return self._without_kernels(attention, f"numba cannot be imported ({error})", pool, rope)
        try:
            return NativeOperators(self.model_config, pool, rope, self._threads)
        except KernelError as error:
            return self._without_kernels(attention, str(error), pool, rope)

    def _without_kernels(self, attention: str, reason: str, pool: torch.Tensor, rope: torch.Tensor) -> Operators:
        if attention == "native":
            raise EngineError(f"attention 'native' cannot be used: {reason}; pip install 'dynamo-llm[worker]'")
        logger.warning("%s: attention falls back to sdpa, which is slower on a CPU", reason)
        return TorchOperators(self.model_config, pool, rope)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise EngineError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def _dtype(config: TorchConfig, model: ModelConfig, device: torch.device) -> torch.dtype:
    name = config.dtype
    if name == "auto":
        name = "float32" if device.type == "cpu" else model.dtype
    dtype = getattr(torch, name, None)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise EngineError(f"the torch engine computes in float32, bfloat16 or float16, not {name!r}; set dtype")
    return dtype


def _default_blocks(config: TorchConfig, model: ModelConfig, device: torch.device, dtype: torch.dtype) -> int:
    block_bytes = 2 * model.layers * model.kv_heads * model.head_dim * config.block_size * dtype.itemsize
    if device.type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(device)
        blocks = int(free_bytes * (config.kv_memory_fraction or 0.85)) // block_bytes
    else:
        blocks = int(_available_bytes() * (config.kv_memory_fraction or 0.1)) // block_bytes
        if config.kv_memory_fraction is None:
            blocks = min(blocks, _CPU_BLOCKS)
    if blocks < 1:
        raise EngineError(
            f"no memory for a single KV block of {block_bytes} bytes on {device}; free some or set kv_blocks"
        )
    return blocks


def _available_bytes(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Memory that processes can have without swapping: the free, and what the page cache would give back."""
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise EngineError(f"{meminfo} does not say how much memory is available; set kv_blocks")
