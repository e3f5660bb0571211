"""Sampling parameters by vLLM's names, from whatever a client sent them in, to those of the engine and of the text.

`request.py` is the caller. What we do not know is passed to the engine (`SamplingParams.extra`), which knows its own
options and refuses others; `explained` then names what was probably meant.
"""

import difflib
import math
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from dynamo_llm.public.row import MAX_WORD_BYTES, MAX_WORDS, refuse
from kvstore.wire import SamplingParams

DEFAULT_MAX_TOKENS = 16
"""Where a client names no `max_tokens`, as in vLLM; an explicit null in `sampling_parameters` lifts the limit."""
MAX_SEQUENCES = 128
"""Most answers to one request: prompts of a batch times `n`."""
_MAX_OPTIONS = 256
_MAX_JSON = 1 << 20
"""Characters: a schema may be long."""
_JSON_ERRORS = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class Options(Struct, frozen=True, kw_only=True):
    """Sampling parameters by vLLM's names that are not the engine's: of the text, and of the request as a whole."""

    stop: str | tuple[str, ...] | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    add_special_tokens: bool = True
    n: Annotated[int, Meta(ge=1, le=MAX_SEQUENCES)] = 1
    lora_name: str = ""
    cache_salt: str = ""
    priority: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] = 0

    @property
    def stop_strings(self) -> tuple[str, ...]:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop or ()
        return tuple(word for word in stop if word)


_OPTIONS = frozenset(Options.__struct_fields__)
_SAMPLING = frozenset(SamplingParams.__struct_fields__) - {"extra"}


def json_object(name: str, text: str) -> dict[str, Any]:
    """Raises `ServiceError`."""
    if len(text) > _MAX_JSON:
        refuse(f"{name} has {len(text)} characters, {_MAX_JSON} are allowed")
    try:
        return msgspec.json.decode(text or "{}", type=dict[str, Any])
    except _JSON_ERRORS as error:
        refuse(f"{name} is no JSON object: {error}")


def parse_sampling(values: Mapping[str, Any]) -> tuple[SamplingParams, Options]:
    """Numbers may be strings, and a null is as good as nothing (but for `max_tokens`). Raises `ServiceError`."""
    if len(values) > _MAX_OPTIONS:
        refuse(f"{len(values)} sampling parameters were given, {_MAX_OPTIONS} are allowed")
    values = {name: value for name, value in values.items() if value is not None or name == "max_tokens"}
    values.setdefault("max_tokens", DEFAULT_MAX_TOKENS)
    if values.get("top_k") in (-1, "-1"):  # vLLM's way to say: all
        values["top_k"] = 0
    ours = {name: value for name, value in values.items() if name in _OPTIONS}
    engines = {name: value for name, value in values.items() if name in _SAMPLING}
    extra = {name: value for name, value in values.items() if name not in ours and name not in engines}
    _structured(extra)
    try:
        sampling = msgspec.convert(engines | {"extra": extra}, SamplingParams, strict=False)
        options = msgspec.convert(ours, Options, strict=False)
    except (msgspec.ValidationError, RecursionError) as error:
        refuse(f"sampling parameters: {error}")
    _check(sampling, options)
    return sampling, options


def explained(message: str, sampling: SamplingParams) -> str:
    """An engine's refusal, with what was probably meant by an option that it does not know."""
    named = (name for name in sampling.extra if repr(name) in message)
    near = difflib.get_close_matches(next(named, "")[:64], _OPTIONS | _SAMPLING, n=1)
    return f"{message}; did you mean {near[0]!r}?" if near and "did you mean" not in message else message


def _structured(extra: dict[str, Any]) -> None:
    """As vllm_backend takes them: JSON within JSON, and by their older name too. Of the fields of vLLM's class, which
    Triton's OpenAI frontend sends in full, those that say nothing, or that vLLM chooses itself, are left out."""
    given = extra.pop("guided_decoding", None)
    given = extra.pop("structured_outputs", given)
    if isinstance(given, str):
        given = json_object("structured_outputs", given)
    if isinstance(given, dict):
        given = {
            name: value
            for name, value in given.items()
            if value is not None and value is not False and not name.lstrip("_").startswith("backend")
        }
    if given is not None:
        extra["structured_outputs"] = given


def _check(sampling: SamplingParams, options: Options) -> None:
    """What the types do not say."""
    if sampling.seed is not None and not -(2**63) <= sampling.seed < 2**64:
        refuse("sampling parameters: seed must fit 64 bits")
    for name in _SAMPLING:
        value = getattr(sampling, name)
        if isinstance(value, float) and not math.isfinite(value):
            refuse(f"sampling parameters: {name} must be a finite number")
    if len(options.stop_strings) > MAX_WORDS:
        refuse(f"{len(options.stop_strings)} stop strings were given, {MAX_WORDS} are allowed")
    if any(len(word.encode(errors="replace")) > MAX_WORD_BYTES for word in options.stop_strings):
        refuse(f"a stop string is longer than {MAX_WORD_BYTES} bytes")
    try:
        msgspec.msgpack.encode(sampling)
    except (OverflowError, ValueError, RecursionError, TypeError) as error:
        refuse(f"sampling parameters: {error}")
