"""The public model's tensors as plain data, and under which names hosts declare them to Triton: `faces`.

Triton holds the requests to a model to one rank for each input. vllm_backend's clients send `[1]` where those of
tensorrtllm_backend send `[1, 1]`, with a batch in front, so the public model is served under two names.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dynamo_llm.config import Dialect

Tensors = dict[str, npt.NDArray[Any]]
"""By name; `object` arrays of bytes stand for BYTES."""
Spec = tuple[str, Any, tuple[int, ...]]
"""Name, dtype (`np.bytes_` for BYTES) and shape; -1: any number."""

MAX_BATCH_SIZE = 64
"""Prompts in one request of tensorrtllm_backend's dialect."""

_ONE = (1,)
_ANY = (-1,)
SAMPLING: tuple[tuple[str, Any, str], ...] = (
    ("max_tokens", np.int32, "max_tokens"),
    ("request_output_len", np.int32, "max_tokens"),
    ("min_tokens", np.int32, "min_tokens"),
    ("min_length", np.int32, "min_tokens"),
    ("temperature", np.float32, "temperature"),
    ("top_k", np.int32, "top_k"),
    ("runtime_top_k", np.int32, "top_k"),
    ("top_p", np.float32, "top_p"),
    ("runtime_top_p", np.float32, "top_p"),
    ("min_p", np.float32, "min_p"),
    ("repetition_penalty", np.float32, "repetition_penalty"),
    ("presence_penalty", np.float32, "presence_penalty"),
    ("frequency_penalty", np.float32, "frequency_penalty"),
    ("seed", np.uint64, "seed"),
    ("random_seed", np.uint64, "seed"),
    ("ignore_eos", np.bool_, "ignore_eos"),
    ("num_return_sequences", np.int32, "n"),
)
"""Inputs of one sampling parameter each: name, dtype, and the parameter's name in vLLM."""
FLAGS = (
    "stream",
    "streaming",
    "stop",
    "exclude_input_in_output",
    "return_finish_reason",
    "return_cumulative_logprob",
    "return_logprobs",
    "return_num_input_tokens",
    "return_num_output_tokens",
    "return_log_probs",
    "return_context_logits",
    "return_generation_logits",
    "return_perf_metrics",
    "early_stopping",
)
INPUTS: tuple[Spec, ...] = (
    ("text_input", np.bytes_, _ONE),
    ("input_ids", np.int32, _ANY),
    ("input_lengths", np.int32, _ONE),
    *((name, np.bool_, _ONE) for name in FLAGS),
    ("sampling_parameters", np.bytes_, _ONE),
    ("request_id", np.bytes_, _ONE),
    *((name, dtype, _ONE) for name, dtype, _ in SAMPLING),
    ("stop_words", np.bytes_, _ANY),
    ("bad_words", np.bytes_, _ANY),
    ("stop_words_list", np.int32, (2, -1)),
    ("bad_words_list", np.int32, (2, -1)),
    ("embedding_bias_words", np.bytes_, _ANY),
    ("embedding_bias_weights", np.float32, _ANY),
    ("end_id", np.int32, _ONE),
    ("pad_id", np.int32, _ONE),
    ("beam_width", np.int32, _ONE),
    ("length_penalty", np.float32, _ONE),
    ("len_penalty", np.float32, _ONE),
    ("beam_search_diversity_rate", np.float32, _ONE),
    ("lora_task_id", np.uint64, _ONE),
    ("guided_decoding_guide_type", np.bytes_, _ONE),
    ("guided_decoding_guide", np.bytes_, _ONE),
)
"""All optional; without the batch."""
_VLLM_OUTPUTS: tuple[Spec, ...] = (
    ("text_output", np.bytes_, _ANY),
    ("output_ids", np.int32, _ANY),
    ("finish_reason", np.bytes_, _ANY),
    ("cumulative_logprob", np.float32, _ANY),
    ("logprobs", np.bytes_, _ANY),
    ("num_input_tokens", np.uint32, _ONE),
    ("num_output_tokens", np.uint32, _ANY),
    ("cum_log_probs", np.float32, _ANY),
    ("output_log_probs", np.float32, (-1, -1)),
)
"""One element for each of the `n` answers."""
_TENSORRTLLM_OUTPUTS: tuple[Spec, ...] = (
    ("text_output", np.bytes_, _ANY),
    ("output_ids", np.int32, (-1, -1)),
    ("sequence_length", np.int32, _ANY),
    ("finish_reason", np.bytes_, _ANY),
    ("cumulative_logprob", np.float32, _ANY),
    ("logprobs", np.bytes_, _ANY),
    ("num_input_tokens", np.int32, _ONE),
    ("num_output_tokens", np.int32, _ONE),
    ("cum_log_probs", np.float32, _ANY),
    ("output_log_probs", np.float32, (-1, -1)),
    ("batch_index", np.int32, _ONE),
    ("sequence_index", np.int32, _ONE),
)
"""Each response is of one answer to one prompt."""


class Face(NamedTuple):
    """The public model under one name. A host declares it to Triton as a decoupled model, every input optional, and
    hands each request to `PublicModel.generate`, which tells the dialect by the prompt's rank."""

    model: str
    max_batch_size: int
    """As in Triton's model configuration. 0: the shapes are whole; else they are without the batch in front, which
    requests always have. No batcher: each request is handed over as it came."""
    inputs: tuple[Spec, ...]
    outputs: tuple[Spec, ...]


_FACES: dict[Dialect, tuple[str, int, tuple[Spec, ...]]] = {
    "vllm": (".vllm", 0, _VLLM_OUTPUTS),
    "tensorrtllm": (".trtllm", MAX_BATCH_SIZE, _TENSORRTLLM_OUTPUTS),
}


def faces(model: str, dialect: Dialect) -> list[Face]:
    """`model` itself, which speaks `dialect`, and its companion for the other one's clients."""
    return [
        Face(model if name == dialect else model + suffix, max_batch_size, INPUTS, outputs)
        for name, (suffix, max_batch_size, outputs) in _FACES.items()
    ]
