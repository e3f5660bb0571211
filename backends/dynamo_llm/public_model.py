"""The public model `M`: text or token ids in, text out, in the dialects that Triton's LLM users know.

A host calls `PublicModel.generate` with the tensors of one request. Tensors are numpy arrays by name, with `object`
arrays of bytes for BYTES; this file knows nothing of Triton. From vllm_backend come `text_input`, `stream`,
`sampling_parameters` (a JSON string; request parameters where it is absent), `exclude_input_in_output` and the
`return_…` flags; from tensorrtllm_backend `input_ids`, `max_tokens` and the other single sampling tensors,
`stop_words` and `output_ids`.
"""

import difflib
from collections.abc import AsyncGenerator, Mapping
from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta, Struct

from dynamo_llm.service import Service, ServiceError
from dynamo_llm.session import Session
from kvstore.text import TextStream, Tokenizer
from kvstore.wire import Output, SamplingParams, Submit

DEFAULT_MAX_TOKENS = 16
"""Where a client names no `max_tokens`, as in vLLM; an explicit null in `sampling_parameters` lifts the limit."""

Tensors = dict[str, npt.NDArray[Any]]
_SCALAR = (1,)
_SAMPLING_TENSORS: tuple[tuple[str, Any], ...] = (
    ("max_tokens", np.int32),
    ("min_tokens", np.int32),
    ("temperature", np.float32),
    ("top_k", np.int32),
    ("top_p", np.float32),
    ("min_p", np.float32),
    ("repetition_penalty", np.float32),
    ("presence_penalty", np.float32),
    ("frequency_penalty", np.float32),
    ("seed", np.uint64),
    ("ignore_eos", np.bool_),
)
_FLAGS = ("stream", "exclude_input_in_output", "return_finish_reason")
_COUNTS = ("return_num_input_tokens", "return_num_output_tokens")
INPUTS: tuple[tuple[str, Any, tuple[int, ...]], ...] = (
    ("text_input", np.bytes_, _SCALAR),
    ("input_ids", np.int32, (-1,)),
    *((name, np.bool_, _SCALAR) for name in (*_FLAGS, *_COUNTS)),
    ("sampling_parameters", np.bytes_, _SCALAR),
    ("stop_words", np.bytes_, (-1,)),
    *((name, dtype, _SCALAR) for name, dtype in _SAMPLING_TENSORS),
)
"""Name, dtype and shape; all of them optional."""
OUTPUTS: tuple[tuple[str, Any, tuple[int, ...]], ...] = (
    ("text_output", np.bytes_, _SCALAR),
    ("output_ids", np.int32, (-1,)),
    ("finish_reason", np.bytes_, _SCALAR),
    ("num_input_tokens", np.uint32, _SCALAR),
    ("num_output_tokens", np.uint32, _SCALAR),
)


class Options(Struct, frozen=True, kw_only=True):
    """Sampling parameters by vLLM's names that are not the engine's: of the text, and of the request as a whole."""

    stop: str | tuple[str, ...] | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    add_special_tokens: bool = True
    n: int = 1
    lora_name: str = ""
    cache_salt: str = ""
    priority: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] = 0


class _Prompt(Struct, frozen=True, kw_only=True):
    """One request, understood."""

    text: str | None
    token_ids: bytes
    sampling: SamplingParams
    options: Options
    stop: tuple[str, ...]
    flags: frozenset[str]
    """Those of the boolean inputs that are true."""


class PublicModel:
    """Serves clients of `M` through sessions of their own on a service."""

    def __init__(self, service: Service, tokenizer: Tokenizer | None) -> None:
        """Without a tokenizer, only `input_ids` are taken and only `output_ids` given."""
        self._service = service
        self._tokenizer = tokenizer

    async def generate(
        self, tensors: Mapping[str, Any], parameters: Mapping[str, Any]
    ) -> AsyncGenerator[Tensors, None]:
        """The answers to one request: one per engine step when streaming, else one. Raises `ServiceError`."""
        with self._service.counting_refusals():
            prompt = self._understand(tensors, parameters)
            session = self._service.local_session()
        try:
            with self._service.counting_refusals():
                self._service.submit(session, _submit(prompt))
            answer = _Answer(prompt, self._text_stream(prompt))
            while not answer.ended:
                for output in await _outputs(session):
                    answer.take(output)
                if "stream" in prompt.flags or answer.ended:
                    yield answer.tensors()
        finally:
            self._service.end_session(session, "closed")

    def _text_stream(self, prompt: _Prompt) -> TextStream | None:
        if self._tokenizer is None:
            return None
        return self._tokenizer.stream(
            prompt.options.skip_special_tokens, prompt.stop, prompt.options.include_stop_str_in_output
        )

    def _understand(self, tensors: Mapping[str, Any], parameters: Mapping[str, Any]) -> _Prompt:
        sampling, options = parse_sampling(_sampling_values(tensors, parameters))
        stop = (options.stop,) if isinstance(options.stop, str) else options.stop or ()
        if any(stop) and self._tokenizer is None:
            raise ServiceError("invalid_request", "stop strings need a tokenizer, and the model has none")
        text, token_ids = self._prompt(tensors, options.add_special_tokens)
        return _Prompt(
            text=text, token_ids=token_ids, sampling=sampling, options=options, stop=stop, flags=_flags(tensors)
        )

    def _prompt(self, tensors: Mapping[str, Any], add_special_tokens: bool) -> tuple[str | None, bytes]:
        text, token_ids = self._text_and_ids(tensors, add_special_tokens)
        if not token_ids:
            raise ServiceError("invalid_request", "the prompt is empty")
        return text, token_ids

    def _text_and_ids(self, tensors: Mapping[str, Any], add_special_tokens: bool) -> tuple[str | None, bytes]:
        if ("text_input" in tensors) == ("input_ids" in tensors):
            raise ServiceError("invalid_request", "give either text_input or input_ids")
        if "input_ids" in tensors:
            token_ids = tensors["input_ids"].reshape(-1)
            if token_ids.size and int(token_ids.min()) < 0:
                raise ServiceError("invalid_request", "input_ids must not be negative")
            return None, token_ids.astype("<u4").tobytes()
        if self._tokenizer is None:
            raise ServiceError("invalid_request", "the model has no tokenizer.json: give input_ids")
        (text,) = _texts(tensors, "text_input") or [""]
        return text, self._tokenizer.encode(text, add_special_tokens)


class _Answer:
    """What one request has got so far, as tensors."""

    def __init__(self, prompt: _Prompt, stream: TextStream | None) -> None:
        self.ended = False
        self._prompt = prompt
        self._stream = stream
        self._text = ""
        if prompt.text is not None and not {"stream", "exclude_input_in_output"} & prompt.flags:
            self._text = prompt.text
        self._token_ids: list[int] = []
        self._finish_reason: str | None = None

    def take(self, output: Output) -> None:
        """Raises `ServiceError` for a request that failed."""
        if output.error is not None:
            raise ServiceError(output.error.code, output.error.message)
        if self.ended:
            return
        self._token_ids += output.token_ids
        self._finish_reason = output.finish_reason
        if self._stream is not None:
            self._text += self._stream.feed(output.token_ids)
            if self._stream.stopped is not None:
                self._finish_reason = "stop"
            elif output.finish_reason is not None:
                self._text += self._stream.flush()
        self.ended = self._finish_reason is not None

    def tensors(self) -> Tensors:
        """What came since the last call."""
        tensors: Tensors = {
            "text_output": _bytes(self._text),
            "output_ids": np.array(self._token_ids, np.int32),
        }
        if "return_finish_reason" in self._prompt.flags:
            tensors["finish_reason"] = _bytes(str(self._finish_reason))  # before the end "None", as in vLLM's backend
        if "return_num_input_tokens" in self._prompt.flags:
            tensors["num_input_tokens"] = np.array([len(self._prompt.token_ids) // 4], np.uint32)
        if "return_num_output_tokens" in self._prompt.flags:
            tensors["num_output_tokens"] = np.array([len(self._token_ids)], np.uint32)
        self._text, self._token_ids = "", []
        return tensors


def _submit(prompt: _Prompt) -> Submit:
    options = prompt.options
    return Submit(
        rid=0,
        token_ids=prompt.token_ids,
        sampling=prompt.sampling,
        lora=options.lora_name,
        cache_salt=options.cache_salt,
        priority=options.priority,
    )


def _flags(tensors: Mapping[str, Any]) -> frozenset[str]:
    given = {name: bool(tensors[name].reshape(-1)[:1].any()) for name in (*_FLAGS, *_COUNTS) if name in tensors}
    if given.get("stream") and given.get("exclude_input_in_output") is False:  # as in vllm_backend
        raise ServiceError("invalid_request", "exclude_input_in_output cannot be false when stream is true")
    return frozenset(name for name, flag in given.items() if flag)


def parse_sampling(values: Mapping[str, Any]) -> tuple[SamplingParams, Options]:
    """vLLM's sampling parameters; numbers may be strings, and a null is as good as nothing (but for `max_tokens`).

    Raises `ServiceError`; for an unknown name it tells the nearest known one.
    """
    known = [*SamplingParams.__struct_fields__, *Options.__struct_fields__]
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            text = f"unknown sampling parameter {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")
            raise ServiceError("invalid_request", text)
    values = {name: value for name, value in values.items() if value is not None or name == "max_tokens"}
    values.setdefault("max_tokens", DEFAULT_MAX_TOKENS)
    if values.get("top_k") in (-1, "-1"):  # vLLM's way to say: all
        values["top_k"] = 0
    ours = {name: value for name, value in values.items() if name in Options.__struct_fields__}
    try:
        sampling = msgspec.convert({k: v for k, v in values.items() if k not in ours}, SamplingParams, strict=False)
        options = msgspec.convert(ours, Options, strict=False)
    except msgspec.ValidationError as error:
        raise ServiceError("invalid_request", f"sampling parameters: {error}") from None
    if options.n != 1:
        raise ServiceError("invalid_request", "n must be 1: send the request several times")
    if sampling.seed is not None and not -(2**63) <= sampling.seed < 2**64:
        raise ServiceError("invalid_request", "sampling parameters: seed must fit 64 bits")
    return sampling, options


def _sampling_values(tensors: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """By name: from the JSON input or else the request's parameters, overridden by the single tensors."""
    values = {name: value for name, value in parameters.items() if not name.startswith("triton_")}
    if texts := _texts(tensors, "sampling_parameters"):
        try:
            values = msgspec.json.decode(texts[0] or "{}", type=dict[str, Any])
        except msgspec.DecodeError as error:
            raise ServiceError("invalid_request", f"sampling_parameters is no JSON object: {error}") from None
    for name, _ in _SAMPLING_TENSORS:
        if name in tensors and tensors[name].size:
            values[name] = tensors[name].reshape(-1)[0].item()
    if words := [word for word in _texts(tensors, "stop_words") if word]:
        values["stop"] = words
    return values


def _texts(tensors: Mapping[str, Any], name: str) -> list[str]:
    try:
        return [item.decode() for item in tensors[name].reshape(-1)] if name in tensors else []
    except UnicodeDecodeError:
        raise ServiceError("invalid_request", f"{name} is no UTF-8") from None


async def _outputs(session: Session) -> list[Output]:
    outputs, reason = await session.take()
    if reason is not None and not outputs:
        raise ServiceError("engine_failure", f"the session ended: {reason}")
    return outputs


def _bytes(text: str) -> npt.NDArray[Any]:
    return np.array([text.encode()], dtype=np.object_)
