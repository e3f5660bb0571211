"""What clients of the OpenAI API may send, checked, and turned into sampling parameters.

Unknown fields are ignored, as OpenAI's own clients expect. `null` means the default everywhere. Beside OpenAI's fields
stand those that vLLM's users know.
"""

import re
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, Struct

from kvstore.wire import SamplingParams
from router.errors import InvalidRequest

_T = TypeVar("_T")
_PATH = re.compile(r" - at (?:`key` in )?`\$\.?(.*?)(?:\[\.\.\.\])?`$")
_MISSING = re.compile(r"missing required field `(\w+)`")
_TokenId = Annotated[int, Meta(ge=0, lt=2**31)]
_Stop = Annotated[list[Annotated[str, Meta(max_length=1024)]], Meta(max_length=64)]


class StreamOptions(Struct):
    include_usage: bool | None = None


class _Common(Struct, kw_only=True):
    """Fields of both endpoints."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1)] | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: str | _Stop | None = None
    stop_token_ids: Annotated[list[_TokenId], Meta(max_length=1024)] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[_TokenId, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    cache_salt: Annotated[str, Meta(max_length=1024)] | None = None
    priority: Annotated[int, Meta(ge=-(2**31), lt=2**31)] | None = None
    response_format: dict[str, Any] | None = None

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop or ()
        return tuple(s for s in stop if s)


class ChatRequest(_Common, kw_only=True):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[dict[str, Any]], Meta(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None


class CompletionRequest(_Common, kw_only=True):
    """Body of POST /v1/completions."""

    prompt: str | list[Any]
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    suffix: str | None = None
    best_of: int | None = None
    add_special_tokens: bool | None = None


class RequestDecoder:
    """Decodes and checks bodies of one kind. Raises `InvalidRequest` with the field's name as `param`."""

    def __init__(self, kind: type[_T]) -> None:
        self._decode = msgspec.json.Decoder(kind).decode

    def __call__(self, body: bytes) -> Any:
        try:
            request: Any = self._decode(body)
        except msgspec.ValidationError as error:
            raise invalid(error) from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise InvalidRequest(f"the body is not valid JSON: {error}") from None
        except RecursionError:
            raise InvalidRequest("the body is nested too deeply") from None
        _check(request)
        return request


def invalid(error: msgspec.ValidationError, renamed: dict[str, str] | None = None) -> InvalidRequest:
    """A failed check as the client's error: what was expected, and where."""
    message = str(error)
    found = _PATH.search(message)
    if found is not None:
        param = (renamed or {}).get(found[1], found[1])
        return InvalidRequest(f"{param}: {message[: found.start()]}", param=param or None)
    missing = _MISSING.search(message)
    return InvalidRequest(message, param=missing[1] if missing else None)


def _check(request: _Common) -> None:
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("stream_options is only allowed with stream", param="stream_options")
    if request.response_format is not None and request.response_format.get("type", "text") != "text":
        raise InvalidRequest("only the response format `text` is supported", param="response_format")


_SAMPLING = (
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "stop_token_ids",
    "ignore_eos",
)


def sampling_of(request: _Common, **more: Any) -> SamplingParams:
    """The wire's sampling parameters, with its bounds. `more` overrides. Raises `InvalidRequest`."""
    fields = {name: value for name in _SAMPLING if (value := getattr(request, name)) is not None}
    fields |= {name: value for name, value in more.items() if value is not None}
    if fields.get("top_k") == -1:  # vLLM's word for all
        fields["top_k"] = 0
    try:
        return msgspec.convert(fields, SamplingParams)
    except msgspec.ValidationError as error:
        renamed = {}
        if isinstance(request, ChatRequest):
            renamed = {"logprobs": "top_logprobs"}
            if request.max_completion_tokens is not None:
                renamed["max_tokens"] = "max_completion_tokens"
        raise invalid(error, renamed) from None


def for_choice(sampling: SamplingParams, choice: int) -> SamplingParams:
    """Each choice of one request draws from a seed of its own."""
    if not choice or sampling.seed is None:
        return sampling
    seed = (sampling.seed + choice + 2**63) % 2**64 - 2**63
    return msgspec.structs.replace(sampling, seed=seed)
