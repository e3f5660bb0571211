"""From the tensors and parameters of one request to what is asked for. `public_model.py` is the only caller."""

import asyncio
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec
import numpy as np
from msgspec import Struct

from dynamo_llm.config import Dialect
from dynamo_llm.engines.base import EngineInfo
from dynamo_llm.public import trtllm
from dynamo_llm.public.row import Row, batch_size, check, refuse
from dynamo_llm.public.sampling import MAX_SEQUENCES, Options, json_object, parse_sampling
from dynamo_llm.public.tensors import FLAGS, SAMPLING
from dynamo_llm.service import ServiceError
from kvstore.text import Tokenizer
from kvstore.wire import SamplingParams, Submit

REQUEST_ID = "triton_request_id"
"""Request parameter in which a host hands over the request's id in Triton."""
_CLIENT_REQUEST_ID = "request_id"
_RESERVED = frozenset({"id", _CLIENT_REQUEST_ID, "sequence_id", "sequence_start", "sequence_end", "headers"})
"""Request parameters that say nothing about sampling. The generate extension takes `id` for the request's id too."""
_LONG_TEXT = 1 << 16
"""Bytes of text from which on a request is read in a thread: tokenising it would hold up everybody else."""
_CHARACTERS_PER_TOKEN = 256
"""No prompt has so many; what is longer is refused unseen."""


class Model(NamedTuple):
    """What requests are read for."""

    info: EngineInfo
    tokenizer: Tokenizer | None
    exclude_input: bool
    """Whether tensorrtllm_backend's clients get the answer alone where they do not say."""


class Prompt(Struct, frozen=True, kw_only=True):
    """One prompt of a request, with all that is asked for it."""

    dialect: Dialect
    index: int
    """In its request's batch."""
    text: str | None
    """None where token ids were given."""
    token_ids: bytes
    """Little-endian uint32."""
    sampling: SamplingParams
    """As the engine gets it, but for the seed of further answers."""
    options: Options
    logprobs: int | None
    """Likeliest tokens that the client wants at each position; None: no `logprobs`, though the engine may give some."""
    flags: frozenset[str]
    """Those of the boolean inputs that are true."""
    prepend: bool
    """The prompt comes before the answer."""
    include_stop: bool
    stop_ids: tuple[tuple[int, ...], ...]
    """Token sequences after which an answer ends."""

    @property
    def stream(self) -> bool:
        return bool(self.flags & {"stream", "streaming"})

    @property
    def prompt_tokens(self) -> int:
        return len(self.token_ids) // 4

    def submit(self, rid: int, index: int) -> Submit:
        """The command for its answer `index` of `options.n`; as in vLLM, the seed of each is one more."""
        sampling, options = self.sampling, self.options
        if index and sampling.seed is not None:
            seed = sampling.seed + index
            sampling = msgspec.structs.replace(sampling, seed=seed if seed < 2**64 else seed - 2**64)
        return Submit(
            rid=rid,
            token_ids=self.token_ids,
            sampling=sampling,
            lora=options.lora_name,
            cache_salt=options.cache_salt,
            priority=options.priority,
        )


def head(tensors: Mapping[str, Any], parameters: Mapping[str, Any]) -> tuple[str, bool]:
    """By which id a request can be stopped (empty: by none), and whether it is itself the stop of the one of that id.

    The id is Triton's, or else the parameter or the input `request_id`. Raises `ServiceError`.
    """
    check(tensors)
    row = Row(tensors)  # both have one element, wherever the batch is
    name = parameters.get(REQUEST_ID) or parameters.get(_CLIENT_REQUEST_ID) or row.text(_CLIENT_REQUEST_ID) or ""
    stop = bool(row.flag("stop"))
    if stop and not name:
        refuse("stop needs the id of the request that it stops: send it as the request's id, or as request_id")
    return str(name), stop


async def understand(tensors: Mapping[str, Any], parameters: Mapping[str, Any], model: Model) -> list[Prompt]:
    """The prompts of a request, one or a batch. Raises `ServiceError`."""
    texts = (array for array in tensors.values() if array.dtype.kind in "OS")
    if sum(len(value) for array in texts for value in array.reshape(-1)) < _LONG_TEXT:
        return _understand(tensors, parameters, model)
    return await asyncio.to_thread(_understand, tensors, parameters, model)


def _understand(tensors: Mapping[str, Any], parameters: Mapping[str, Any], model: Model) -> list[Prompt]:
    size = batch_size(tensors)
    if size is None:
        return [_Reader(Row(tensors), "vllm", model).read(parameters)]
    # Clients of tensorrtllm_backend set parameters of their own, which it does not read.
    prompts = [_Reader(Row(tensors, index), "tensorrtllm", model).read({}) for index in range(size)]
    if sum(prompt.options.n for prompt in prompts) > MAX_SEQUENCES:
        refuse(f"a request may ask for {MAX_SEQUENCES} answers, all prompts together")
    return prompts


class _Reader:
    """Reads one prompt."""

    def __init__(self, row: Row, dialect: Dialect, model: Model) -> None:
        self._row = row
        self._dialect = dialect
        self._model = model

    def read(self, parameters: Mapping[str, Any]) -> Prompt:
        row = self._row
        flags = frozenset(name for name in FLAGS if row.flag(name))
        trtllm.refuse_unserved(row)
        sampling, options = parse_sampling(self._values(parameters))
        if options.stop_strings and self._model.tokenizer is None:
            refuse("stop strings need a tokenizer, and the model has none")
        text, token_ids = self._prompt(options.add_special_tokens)
        return Prompt(
            dialect=self._dialect,
            index=row.index or 0,
            text=text,
            token_ids=token_ids,
            sampling=_with_logprobs(sampling, flags),
            options=options,
            logprobs=sampling.logprobs,
            flags=flags,
            prepend=self._prepend(flags),
            include_stop=options.include_stop_str_in_output or self._dialect == "tensorrtllm",
            stop_ids=trtllm.stop_ids(row, self._model.info.vocab_size),
        )

    def _values(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """By vLLM's names: from the JSON input or else the request's parameters, overridden by the single inputs."""
        row = self._row
        document = row.text("sampling_parameters")
        if document is None:
            values = {k: v for k, v in parameters.items() if not k.startswith("triton_") and k not in _RESERVED}
        else:
            values = json_object("sampling_parameters", document)
        given: dict[str, str] = {}
        for name, _, parameter in SAMPLING:
            if (value := row.one(name)) is not None:
                if parameter in given:
                    refuse(f"{name} and {given[parameter]} mean the same: give one of them")
                given[parameter] = name
                values[parameter] = value
        if words := list(filter(None, row.texts("stop_words"))):
            values["stop"] = words
        if self._dialect == "tensorrtllm":
            trtllm.sampling_values(row, values, self._model.info.vocab_size)
        elif (end_id := row.one("end_id")) is not None:
            values["stop_token_ids"] = [end_id]
        trtllm.engine_options(row, values, self._model.tokenizer, self._model.info.vocab_size)
        return values

    def _prepend(self, flags: frozenset[str]) -> bool:
        """Not streaming, the prompt is in the answer unless excluded; a stream never brings it."""
        excluded = self._row.flag("exclude_input_in_output")
        if flags & {"stream", "streaming"}:
            if self._dialect == "vllm" and excluded is False:
                refuse("exclude_input_in_output cannot be false when stream is true")
            return False
        if excluded is None:
            excluded = self._dialect == "tensorrtllm" and self._model.exclude_input
        return not excluded

    def _prompt(self, add_special_tokens: bool) -> tuple[str | None, bytes]:
        token_ids = self._row.array("input_ids")
        if token_ids is not None:
            return None, self._ids(token_ids.reshape(-1))
        tokenizer, text = self._model.tokenizer, self._row.text("text_input") or ""
        if tokenizer is None:
            refuse("the model has no tokenizer.json: give input_ids")
        if len(text) > _CHARACTERS_PER_TOKEN * self._model.info.max_context:
            message = f"{len(text)} characters do not fit the context of {self._model.info.max_context} tokens"
            raise ServiceError("context_length_exceeded", message)
        encoded = tokenizer.encode(text, add_special_tokens)
        if not encoded:
            refuse("the prompt is empty")
        return text, encoded

    def _ids(self, token_ids: Any) -> bytes:
        length = self._row.one("input_lengths")
        if length is not None:
            if not 0 <= length <= token_ids.size:
                refuse(f"input_lengths is {length}, but there are {token_ids.size} input_ids")
            token_ids = token_ids[:length]
        if not token_ids.size:
            refuse("the prompt is empty")
        if int(token_ids.min()) < 0:
            refuse("input_ids must not be negative")
        return np.ascontiguousarray(token_ids, "<u4").tobytes()


def _with_logprobs(sampling: SamplingParams, flags: frozenset[str]) -> SamplingParams:
    """With the logprobs that the outputs need; one likeliest token tells whether the chosen one is it."""
    if "return_logprobs" in flags and sampling.logprobs == 0:
        return msgspec.structs.replace(sampling, logprobs=1)
    if sampling.logprobs is None and flags & {"return_cumulative_logprob", "return_log_probs"}:
        return msgspec.structs.replace(sampling, logprobs=0)
    return sampling
