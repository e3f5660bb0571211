"""From a KServe request, whatever transport it came by, to a `GenerationRequest`.

`http.py` and `grpc.py` decode tensors into an `InferRequest`; `prepare` turns it into a `Job`, which knows what to ask
the routing layer for and which outputs to answer with.
"""

import difflib
import math
import uuid
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct

from kvstore.wire import SamplingParams
from router.errors import ContextLengthExceeded, InvalidRequest
from router.http.endpoint import encode_text, offload
from router.kserve.face import DEFAULT_MAX_TOKENS, INPUTS, MAX_STOP_WORDS, OUTPUTS, InputSpec
from router.kserve.tensors import JSON_ERRORS, Values, invalid, short, text
from router.models import Model
from router.types import GenerationRequest

_RESERVED = frozenset({"sequence_id", "sequence_start", "sequence_end", "binary_data_output", "headers"})
"""Request parameters of Triton's own that say nothing about sampling."""
_MAX_SEED = 2**64
_MAX_ID = 256
"""Characters of a client's request id that go to workers and logs."""


class InferRequest(Struct, kw_only=True):
    """One inference request, its tensors already decoded."""

    model: str
    version: str = ""
    id: str = ""
    inputs: dict[str, Values]
    """Values by input name; all names are in `INPUTS`."""
    parameters: dict[str, Any] = {}
    outputs: list[str] | None = None
    """Names of the outputs asked for; None: whatever the flags ask for."""
    trace: dict[str, str] = {}


class Options(Struct, frozen=True, forbid_unknown_fields=True):
    """Sampling parameters by vLLM's names that are the router's business and not the engine's."""

    stop: str | list[str] | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    add_special_tokens: bool = True
    n: int = 1
    lora_name: str = ""
    cache_salt: str = ""
    priority: int = 0
    timeout: int | None = None
    """Microseconds for the whole answer, as Triton's clients send it."""


class Job(Struct, kw_only=True):
    """A request ready to be served."""

    id: str
    """As the client gave it, possibly empty; every response repeats it."""
    generation: GenerationRequest
    stream: bool
    outputs: frozenset[str]
    prepend: str
    """Text that goes before the answer's: the prompt, or nothing."""
    prompt_tokens: int
    timeout_s: float | None
    empty_final: bool
    """The client wants a response without outputs that says that all is sent."""


async def prepare(request: InferRequest, model: Model) -> Job:
    """Validate and tokenise. Raises `InvalidRequest`, whose message names the input or parameter at fault."""
    inputs = _Inputs(request.inputs)
    values = _sampling_values(inputs, request.parameters)
    options, sampling = _split(values)
    outputs = _outputs(request, inputs)
    if outputs & {"logprobs", "cumulative_logprob"} and sampling.logprobs is None:
        sampling = msgspec.structs.replace(sampling, logprobs=0)
    stream = inputs.flag("stream")
    prompt, token_ids = await _prompt(inputs, model, options)
    generation = GenerationRequest(
        model=model.name,
        token_ids=token_ids,
        sampling=sampling,
        request_id=request.id[:_MAX_ID] or uuid.uuid4().hex,
        stop=_stop(options),
        include_stop=options.include_stop_str_in_output,
        skip_special_tokens=options.skip_special_tokens,
        lora=options.lora_name,
        cache_salt=options.cache_salt,
        priority=options.priority,
        trace=request.trace,
    )
    return Job(
        id=request.id,
        generation=generation,
        stream=stream,
        outputs=outputs,
        prepend=prompt if _includes_input(inputs, stream) else "",
        prompt_tokens=len(token_ids) // 4,
        timeout_s=options.timeout / 1e6 if options.timeout else None,
        empty_final=request.parameters.get("triton_enable_empty_final_response") is True,
    )


def find_input(model: str, name: str) -> InputSpec:
    """The spec of an input. Raises `InvalidRequest` for a name that the model does not have."""
    spec = INPUTS.get(name)
    if spec is None:
        raise InvalidRequest(
            f"unexpected inference input {short(name)} for model '{model}'{_nearest(name, INPUTS)}", param=name[:64]
        )
    return spec


class _Inputs:
    """The decoded inputs by name, with the types they must have by now."""

    def __init__(self, values: dict[str, Values]) -> None:
        self._values = values

    def scalar(self, name: str) -> Any:
        values = self._values.get(name)
        return None if values is None else values[0]

    def text(self, name: str) -> str | None:
        value = self.scalar(name)
        return None if value is None else text(name, value)

    def flag(self, name: str) -> bool:
        return bool(self.scalar(name))

    def all(self, name: str) -> Values | None:
        return self._values.get(name)


async def _prompt(inputs: _Inputs, model: Model, options: Options) -> tuple[str, bytes]:
    """(text, token ids as little-endian uint32); the text is empty where ids were given."""
    prompt, ids = inputs.text("text_input"), inputs.all("input_ids")
    if (prompt is None) == (ids is None):
        problem = "is missing" if prompt is None else "is given together with 'input_ids'"
        raise invalid("text_input", f"{problem}: send either 'text_input' or 'input_ids'")
    if prompt is None:
        token_ids, name = _id_bytes(ids or []), "input_ids"
    else:
        name = "text_input"
        token_ids = await offload(len(prompt), encode_text, model, prompt, options.add_special_tokens)
    count = len(token_ids) // 4
    if count == 0:
        raise invalid(name, "is empty")
    if count >= model.max_context:
        raise ContextLengthExceeded(
            f"input '{name}': {count} tokens leave no room in the model's context of {model.max_context}", param=name
        )
    return prompt or "", token_ids


def _id_bytes(ids: Values) -> bytes:
    array = np.array(ids, dtype=np.int64)
    if array.size and array.min() < 0:
        raise invalid("input_ids", f"has the negative token id {array.min()}")
    if array.size and array.max() >= 2**32:
        raise invalid("input_ids", f"has the token id {array.max()}, which is no 32-bit number")
    return array.astype("<u4").tobytes()


def _includes_input(inputs: _Inputs, stream: bool) -> bool:
    """As vllm_backend: the prompt comes before the answer unless the answer is streamed or the client excludes it."""
    exclude = inputs.scalar("exclude_input_in_output")
    if exclude is None:
        return not stream
    if stream and not exclude:
        raise invalid("exclude_input_in_output", "cannot be false when 'stream' is true")
    return not exclude


def _outputs(request: InferRequest, inputs: _Inputs) -> frozenset[str]:
    if request.outputs:
        for name in request.outputs:
            if name not in OUTPUTS:
                raise InvalidRequest(
                    f"unexpected inference output {short(name)} for model '{request.model}'{_nearest(name, OUTPUTS)}",
                    param=name[:64],
                )
        return frozenset(request.outputs)
    flagged = {name for name, spec in OUTPUTS.items() if spec.flag is not None and inputs.flag(spec.flag)}
    given_ids = {"output_ids"} if inputs.all("input_ids") is not None else set()
    return frozenset({"text_output"} | flagged | given_ids)


def _sampling_values(inputs: _Inputs, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling parameters by name: the JSON input or else the request's parameters, overridden by single inputs."""
    values = {k: v for k, v in parameters.items() if k not in _RESERVED and not k.startswith("triton_")}
    document = inputs.text("sampling_parameters")
    if document is not None:
        carried = {k: v for k, v in values.items() if k in ("priority", "timeout")}
        values = carried | _json_object("sampling_parameters", document)
    for spec in INPUTS.values():
        if spec.sampling is not None and (value := inputs.scalar(spec.name)) is not None:
            values[spec.sampling] = value
    if (end_id := inputs.scalar("end_id")) is not None:
        values["stop_token_ids"] = [end_id]
    words = [text("stop_words", word) for word in inputs.all("stop_words") or []]
    if any(words):
        values["stop"] = words
    if any(inputs.all("bad_words") or []):
        raise invalid("bad_words", "is not supported, use 'logit_bias' in 'sampling_parameters'")
    return values


def _json_object(name: str, document: str) -> dict[str, Any]:
    if not document:
        return {}
    try:
        return msgspec.json.decode(document, type=dict[str, Any])
    except JSON_ERRORS as error:
        raise invalid(name, f"is not a JSON object: {error}") from None


_SAMPLING_FIELDS = frozenset(SamplingParams.__struct_fields__)
_OPTION_FIELDS = frozenset(Options.__struct_fields__)


def _split(values: Mapping[str, Any]) -> tuple[Options, SamplingParams]:
    """Typed and checked. Strings of numbers are taken for numbers, as vllm_backend's clients send them.

    A null is as good as nothing, but for `max_tokens`, where it lifts the limit.
    """
    for name in values:
        if name not in _SAMPLING_FIELDS and name not in _OPTION_FIELDS:
            known = _SAMPLING_FIELDS | _OPTION_FIELDS
            raise InvalidRequest(f"unknown sampling parameter {short(name)}{_nearest(name, known)}", param=name[:64])
    values = {name: value for name, value in values.items() if value is not None or name == "max_tokens"}
    values.setdefault("max_tokens", DEFAULT_MAX_TOKENS)
    if values.get("top_k") in (-1, "-1"):  # vLLM's other way to say "all tokens"
        values["top_k"] = 0
    try:
        options = msgspec.convert({k: v for k, v in values.items() if k in _OPTION_FIELDS}, Options, strict=False)
        sampling = msgspec.convert(
            {k: v for k, v in values.items() if k in _SAMPLING_FIELDS}, SamplingParams, strict=False
        )
    except (msgspec.ValidationError, RecursionError) as error:
        raise InvalidRequest(f"sampling parameters: {error}") from None
    _check(options, sampling)
    return options, sampling


def _check(options: Options, sampling: SamplingParams) -> None:
    """What the types do not say: numbers that are none, and integers that do not fit the wire."""
    if options.n != 1:
        raise InvalidRequest("sampling parameters: n must be 1, send one request for each answer", param="n")
    if options.timeout is not None and not 0 <= options.timeout < 2**63:
        raise InvalidRequest("parameter 'timeout': expected microseconds", param="timeout")
    if sampling.seed is not None and not -_MAX_SEED // 2 <= sampling.seed < _MAX_SEED:
        raise InvalidRequest("sampling parameters: seed must fit 64 bits", param="seed")
    for name in _SAMPLING_FIELDS:
        value = getattr(sampling, name)
        if isinstance(value, float) and not math.isfinite(value):
            raise InvalidRequest(f"sampling parameters: {name} must be a finite number", param=name)
    try:
        msgspec.msgpack.encode((sampling, options.priority))
    except (OverflowError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"sampling parameters: {error}") from None


def _stop(options: Options) -> tuple[str, ...]:
    stop = [options.stop] if isinstance(options.stop, str) else options.stop or []
    if len(stop) > MAX_STOP_WORDS:
        raise InvalidRequest(f"sampling parameters: at most {MAX_STOP_WORDS} stop strings", param="stop")
    return tuple(word for word in stop if word)


def _nearest(name: str, known: Mapping[str, object] | frozenset[str]) -> str:
    near = difflib.get_close_matches(name[:64], sorted(known), n=1)
    return f", did you mean '{near[0]}'?" if near else ""
