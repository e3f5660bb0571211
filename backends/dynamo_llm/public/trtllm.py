"""What clients of tensorrtllm_backend mean by tensors that vLLM has no name for. `request.py` is the only caller.

Semantics as of its release of May 2025 (inflight_batcher_llm and its `tensorrt_llm` model) and of TensorRT-LLM's
decoding defaults; nothing here is of our own making but what is refused.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from dynamo_llm.public.row import Row, refuse
from kvstore.text import Tokenizer

_BANNED = -100.0
"""Logit bias of a token that must not be generated."""
_MAX_BIAS_WORDS = 1024
_GUIDES = {"json_schema": "json", "regex": "regex", "ebnf_grammar": "grammar", "structural_tag": "structural_tag"}
"""Guide types by the name that vLLM's structured outputs have for them."""


def refuse_unserved(row: Row) -> None:
    """Raises `ServiceError` for what no engine here does."""
    if row.one("beam_width") not in (None, 1):
        refuse("beam_width must be 1: beam search is not served")
    for name in ("return_context_logits", "return_generation_logits", "return_perf_metrics"):
        if row.flag(name):
            refuse(f"{name} is not served: leave it out, or set it to false")


def sampling_values(row: Row, values: dict[str, Any], vocab_size: int) -> None:
    """Bring the decoding defaults into `values`: greedy unless `top_k` or `top_p` says otherwise, and `end_id` alone
    ends an answer where it is given (-1: nothing does)."""
    top_p = values.get("top_p")
    if isinstance(top_p, float) and top_p <= 0:
        del values["top_p"]
    if not values.get("top_k") and not values.get("top_p"):
        values["temperature"] = 0.0
    end_id = row.one("end_id")
    if end_id is not None:
        values["ignore_eos"] = True
        values["stop_token_ids"] = [end_id] if 0 <= end_id < vocab_size else []


def engine_options(row: Row, values: dict[str, Any], tokenizer: Tokenizer | None, vocab_size: int) -> None:
    """Bring into `values` what biases, guides or adapts the model."""
    bias: dict[int, float] = {}
    _embedding_bias(row, tokenizer, bias)
    _bad_words(row, values, tokenizer, vocab_size, bias)
    if bias:
        given = values.get("logit_bias")
        values["logit_bias"] = {**given, **bias} if isinstance(given, dict) else bias
    _guide(row, values)
    if task := row.one("lora_task_id"):
        values["lora_name"] = str(task)


def stop_ids(row: Row, vocab_size: int) -> tuple[tuple[int, ...], ...]:
    """The token sequences of `stop_words_list`."""
    return tuple(row.words("stop_words_list", vocab_size))


def _bad_words(
    row: Row, values: dict[str, Any], tokenizer: Tokenizer | None, vocab_size: int, bias: dict[int, float]
) -> None:
    """A word of one token is a bias, which every engine has. Longer ones go to the engine by vLLM's `bad_words`."""
    longer: list[str] = []
    for word in filter(None, row.texts("bad_words")):
        ids = _encode(tokenizer, "bad_words", word)
        if len(ids) == 1:
            bias[ids[0]] = _BANNED
        else:
            longer.append(word)
    for ids in row.words("bad_words_list", vocab_size):
        if len(ids) == 1:
            bias[ids[0]] = _BANNED
        else:
            longer.append(_decode(tokenizer, ids))
    if longer:
        values["bad_words"] = longer


def _embedding_bias(row: Row, tokenizer: Tokenizer | None, bias: dict[int, float]) -> None:
    """Each word's weight is added to the logit of each of its tokens."""
    words, weights = row.texts("embedding_bias_words", _MAX_BIAS_WORDS), row.array("embedding_bias_weights")
    if len(words) != (0 if weights is None else weights.size):
        refuse("embedding_bias_words and embedding_bias_weights must be given together, one weight a word")
    if weights is None:
        return
    if not np.isfinite(weights).all():
        refuse("embedding_bias_weights must be finite numbers")
    for word, weight in zip(words, weights.reshape(-1).tolist(), strict=True):
        for token_id in _encode(tokenizer, "embedding_bias_words", word):
            bias[token_id] = bias.get(token_id, 0.0) + weight


def _guide(row: Row, values: dict[str, Any]) -> None:
    kind, guide = row.text("guided_decoding_guide_type"), row.text("guided_decoding_guide")
    if kind is None and guide is None:
        return
    if kind == "json":
        values["structured_outputs"] = {"json_object": True}
    elif kind in _GUIDES and guide:
        values["structured_outputs"] = {_GUIDES[kind]: _schema(guide) if kind == "json_schema" else guide}
    else:
        known = ", ".join(["json", *_GUIDES])
        refuse(f"guided_decoding_guide_type must be one of {known}, with guided_decoding_guide for all but json")


def _schema(guide: str) -> Any:
    try:
        return json.loads(guide)
    except (ValueError, RecursionError) as error:
        refuse(f"guided_decoding_guide is no JSON: {error}")


def _encode(tokenizer: Tokenizer | None, name: str, word: str) -> Sequence[int]:
    if tokenizer is None:
        refuse(f"{name} needs a tokenizer, and the model has none")
    ids: list[int] = np.frombuffer(tokenizer.encode(word, add_special_tokens=False), "<u4").tolist()
    return ids


def _decode(tokenizer: Tokenizer | None, ids: Iterable[int]) -> str:
    if tokenizer is None:
        refuse("words of several tokens in bad_words_list need a tokenizer, and the model has none")
    return tokenizer.decode(list(ids), skip_special_tokens=False)
