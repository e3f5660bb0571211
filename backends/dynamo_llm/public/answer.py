"""From an engine's outputs to the responses of one request. `public_model.py` is the only caller; no I/O."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dynamo_llm.public.request import Prompt
from dynamo_llm.public.tensors import Tensors
from dynamo_llm.service import ServiceError
from kvstore.text import TextStream, Tokenizer
from kvstore.wire import FinishReason, Output, TokenLogprob

_LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON does not have."""


class Progress:
    """One sequence that is being generated, and what of it is still to be sent."""

    def __init__(self, prompt: Prompt, index: int, tokenizer: Tokenizer | None) -> None:
        self.prompt = prompt
        self.index = index
        self.text = prompt.text or "" if prompt.prepend else ""
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.cumulative_logprob = 0.0
        self.finish_reason: FinishReason | None = None
        self._tokenizer = tokenizer
        self._stream: TextStream | None = None
        if tokenizer is not None:
            self._stream = tokenizer.stream(
                prompt.options.skip_special_tokens, prompt.options.stop_strings, prompt.include_stop
            )
        self._closed = False
        self._tail: list[int] = []
        """The last tokens, as many as the longest of the prompt's `stop_ids` has."""
        self._longest = max(map(len, prompt.stop_ids), default=0)

    @property
    def fresh(self) -> bool:
        """Whether there is something to send."""
        return not self._closed and (bool(self.token_ids or self.text) or self.finish_reason is not None)

    def take(self, output: Output) -> bool:
        """Whether this was its end by a stop word: the engine does not know yet. Raises `ServiceError`."""
        if self.finish_reason is not None:
            return False
        if output.error is not None:
            raise ServiceError(output.error.code, output.error.message)
        taken, stopped = self._until_stop(output.token_ids)
        if self._stream is not None:
            before = self._stream.tokens
            self.text += self._stream.feed(output.token_ids[:taken])
            if self._stream.stopped is not None:
                taken, stopped = self._stream.tokens - before, True
            elif stopped or output.finish_reason is not None:
                self.text += self._stream.flush()
                stopped = stopped or self._stream.stopped is not None
        self.token_ids += output.token_ids[:taken]
        logprobs = (output.logprobs or [])[:taken]
        self.logprobs += logprobs
        self.cumulative_logprob += sum(_bounded(entry.logprob) for entry in logprobs)
        self.finish_reason = "stop" if stopped else output.finish_reason
        return stopped and output.finish_reason is None

    def sent(self) -> None:
        """All that there was is with the client; with the end, nothing more follows."""
        self.text, self.token_ids, self.logprobs = "", [], []
        self._closed = self.finish_reason is not None

    def _until_stop(self, token_ids: Sequence[int]) -> tuple[int, bool]:
        """How many of the tokens belong to the answer, and whether a token sequence ended it."""
        if not self._longest:
            return len(token_ids), False
        for count, token_id in enumerate(token_ids, 1):
            self._tail = [*self._tail, token_id][-self._longest :]
            for word in self.prompt.stop_ids:
                if word[-1] == token_id and tuple(self._tail[-len(word) :]) == word:
                    return count, True
        return len(token_ids), False

    def logprobs_json(self) -> str:
        """As vllm_backend: for each token an object of it and the likeliest ones by token id; null if not asked for."""
        if self.prompt.logprobs is None:
            return "null"
        return json.dumps([self._position(entry, self.prompt.logprobs) for entry in self.logprobs])

    def _position(self, entry: TokenLogprob, most: int) -> dict[int, dict[str, Any]]:
        """The rank of a token that is not among the likeliest is not known: it gets the first one behind them."""
        ranks = {token_id: rank for rank, (token_id, _) in enumerate(entry.top, 1)}
        logprobs = {entry.token_id: entry.logprob, **dict(entry.top[:most])}
        return {
            token_id: {
                "logprob": _bounded(logprob),
                "rank": ranks.get(token_id, len(entry.top) + 1),
                "decoded_token": self._tokenizer.decode([token_id], skip_special_tokens=False)
                if self._tokenizer is not None
                else "",
            }
            for token_id, logprob in logprobs.items()
        }


def vllm_response(sequences: Sequence[Progress]) -> Tensors:
    """What is new of all answers to one prompt, one element for each answer."""
    tensors = _flagged(sequences, np.uint32)
    tensors["text_output"] = _bytes(sequence.text for sequence in sequences)
    if len(sequences) == 1:
        tensors["output_ids"] = np.array(sequences[0].token_ids, np.int32)
    for sequence in sequences:
        sequence.sent()
    return tensors


def trtllm_response(sequence: Progress) -> Tensors:
    """What is new of one sequence. All but the text have a batch of 1 in front, and then perhaps a beam of 1.

    Text answers text and ids answer ids, as the ensemble and the core model do.
    """
    prompt = sequence.prompt
    tensors = {name: array[None] for name, array in _flagged([sequence], np.int32).items()}
    tensors["batch_index"] = np.array([[prompt.index]], np.int32)
    tensors["sequence_index"] = np.array([[sequence.index]], np.int32)
    if prompt.text is not None:
        tensors["text_output"] = _bytes([sequence.text])
    else:
        ids = sequence.token_ids
        if prompt.prepend:
            ids = np.frombuffer(prompt.token_ids, "<u4").tolist() + ids
        tensors["output_ids"] = np.array([[ids]], np.int32)
        tensors["sequence_length"] = np.array([[len(ids)]], np.int32)
    sequence.sent()
    return tensors


def _flagged(sequences: Sequence[Progress], count: Any) -> Tensors:
    """The outputs that the `return_…` flags ask for, one element for each answer; `count` is the dtype of numbers."""
    prompt, tensors = sequences[0].prompt, dict[str, npt.NDArray[Any]]()
    cumulative = np.array([sequence.cumulative_logprob for sequence in sequences], np.float32)
    if "return_finish_reason" in prompt.flags:
        tensors["finish_reason"] = _bytes(str(sequence.finish_reason) for sequence in sequences)  # "None": not ended
    if "return_cumulative_logprob" in prompt.flags:
        tensors["cumulative_logprob"] = cumulative
    if "return_logprobs" in prompt.flags:
        tensors["logprobs"] = _bytes(sequence.logprobs_json() for sequence in sequences)
    if "return_num_input_tokens" in prompt.flags:
        tensors["num_input_tokens"] = np.array([prompt.prompt_tokens], count)
    if "return_num_output_tokens" in prompt.flags:
        tensors["num_output_tokens"] = np.array([len(sequence.token_ids) for sequence in sequences], count)
    if "return_log_probs" in prompt.flags:
        tensors["cum_log_probs"] = cumulative
        tensors["output_log_probs"] = _padded([_logprobs(sequence) for sequence in sequences])
    return tensors


def _logprobs(sequence: Progress) -> list[float]:
    return [_bounded(entry.logprob) for entry in sequence.logprobs]


def _padded(rows: Sequence[list[float]]) -> npt.NDArray[Any]:
    longest = max(map(len, rows))
    return np.array([row + [-1.0] * (longest - len(row)) for row in rows], np.float32)


def _bounded(logprob: float) -> float:
    return max(logprob, _LEAST_LOGPROB)


def _bytes(texts: Iterable[str]) -> npt.NDArray[Any]:
    return np.array([text.encode("utf-8", "replace") for text in texts], np.object_)
