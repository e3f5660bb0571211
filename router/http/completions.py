"""POST /v1/completions."""

from array import array
from collections.abc import Sequence
from typing import Any

import msgspec

from kvstore.wire import FinishReason, SamplingParams, TokenLogprob
from router.errors import ContextLengthExceeded, InvalidRequest
from router.http.asgi import Scope, trace_context
from router.http.endpoint import Endpoint, encode_text, now_s, offload, usage
from router.http.exchange import Exchange
from router.http.logprobs import CompletionLogprobs
from router.http.openai_requests import CompletionRequest, RequestDecoder, for_choice, sampling_of
from router.http.sse import Encode
from router.models import Model
from router.types import GenerationRequest, Result

_json = msgspec.json.encode
_DEFAULT_MAX_TOKENS = 16


class Prompt(msgspec.Struct, frozen=True):
    """One prompt: its tokens, and its text where an echo needs it."""

    token_ids: bytes
    text: str


class Completions(Endpoint):
    """See `Endpoint`."""

    name = "completions"
    decode = RequestDecoder(CompletionRequest)

    async def serve(self, request: CompletionRequest, model: Model, scope: Scope, exchange: Exchange) -> int:
        _check(request)
        listed = _listed(request.prompt)
        self.limit_choices(request.choices * len(listed))
        prompts = [await _prompt(request, model, given) for given in listed]
        sampling = _sampling(request)
        sequences = [
            GenerationRequest(
                model=model.name,
                token_ids=prompt.token_ids,
                sampling=for_choice(sampling, choice),
                request_id=exchange.request_id,
                stop=request.stop_strings,
                include_stop=bool(request.include_stop_str_in_output),
                skip_special_tokens=request.skip_special_tokens is not False,
                cache_salt=request.cache_salt or "",
                priority=request.priority or 0,
                trace=trace_context(scope),
            )
            for prompt in prompts
            for choice in range(request.choices)
        ]
        answer = _Answer(request, model, exchange.request_id, prompts)
        if not request.stream:
            await exchange.answer_whole(sequences, answer.whole)
            return 200
        encoders = [answer.encoder(index) for index in range(len(sequences))]
        return await exchange.answer_stream(sequences, encoders, answer.tail)


def _check(request: CompletionRequest) -> None:
    if request.suffix:
        raise InvalidRequest("suffix is not supported", param="suffix")
    if request.best_of is not None and request.best_of != request.choices:
        raise InvalidRequest("best_of is only supported where it equals n", param="best_of")
    if request.max_tokens == 0 and not request.echo:
        raise InvalidRequest("max_tokens may be 0 only with echo", param="max_tokens")
    if request.stream and request.echo and (request.logprobs is not None or request.max_tokens == 0):
        raise InvalidRequest("echo with logprobs or without new tokens cannot be streamed", param="stream")


def _sampling(request: CompletionRequest) -> SamplingParams:
    max_tokens = _DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens
    return sampling_of(
        request,
        max_tokens=max_tokens or 1,  # a prompt to be scored only: its one new token is left out of the answer
        logprobs=request.logprobs,
        prompt_logprobs=request.logprobs if request.echo else None,
    )


def _listed(prompt: str | list[Any]) -> list[str | list[int]]:
    """One entry per prompt. Raises `InvalidRequest` for a list of mixed or other things."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise InvalidRequest("prompt: the list is empty", param="prompt")
    try:
        if isinstance(prompt[0], str):
            return [*msgspec.convert(prompt, list[str])]
        if isinstance(prompt[0], int):
            return [msgspec.convert(prompt, list[int])]
        return [*msgspec.convert(prompt, list[list[int]])]
    except msgspec.ValidationError:
        message = "prompt: expected a text, a list of texts, a list of token ids or a list of such lists"
        raise InvalidRequest(message, param="prompt") from None


async def _prompt(request: CompletionRequest, model: Model, given: str | list[int]) -> Prompt:
    if isinstance(given, str):
        special = request.add_special_tokens is not False
        return Prompt(await offload(len(given), encode_text, model, given, special), given)
    if len(given) > model.max_context:  # before they are looked at: there may be millions
        raise ContextLengthExceeded(f"the prompt has {len(given)} tokens; the context is {model.max_context} tokens")
    if given and not (min(given) >= 0 and max(given) < model.tokenizer.vocab_size):
        raise InvalidRequest(f"prompt: token ids go from 0 to {model.tokenizer.vocab_size - 1}", param="prompt")
    text = await offload(len(given), model.tokenizer.decode, given) if request.echo else ""
    return Prompt(array("I", given).tobytes(), text)


class _Answer:
    """Documents and chunks of one answer."""

    def __init__(self, request: CompletionRequest, model: Model, request_id: str, prompts: Sequence[Prompt]) -> None:
        self._request = request
        self._tokenizer = model.tokenizer
        self._prompts = prompts
        self._head = {"id": f"cmpl-{request_id}", "object": "text_completion", "created": now_s(), "model": model.name}

    def _echo(self, index: int) -> str:
        return self._prompts[index // self._request.choices].text if self._request.echo else ""

    def whole(self, results: list[Result]) -> bytes:
        if self._request.max_tokens == 0:
            for result in results:
                result.text, result.token_ids, result.logprobs, result.finish_reason = "", [], None, "length"
        choices = [
            {
                "index": index,
                "text": self._echo(index) + result.text,
                "logprobs": self._logprobs(index, result),
                "finish_reason": result.finish_reason,
                "stop_reason": result.stop_reason,
            }
            for index, result in enumerate(results)
        ]
        return _json({**self._head, "choices": choices, "usage": usage(results, self._request.choices)})

    def _logprobs(self, index: int, result: Result) -> dict[str, Any] | None:
        if self._request.logprobs is None:
            return None
        entries: list[TokenLogprob | None] = [*(result.logprobs or [])]
        token_ids = result.token_ids
        if self._request.echo:
            prompt = memoryview(self._prompts[index // self._request.choices].token_ids).cast("I").tolist()
            entries = [*(result.prompt_logprobs or [None] * len(prompt)), *entries]
            token_ids = [*prompt, *token_ids]
        return CompletionLogprobs(self._tokenizer, self._request.logprobs)(entries, token_ids)

    def encoder(self, index: int) -> Encode:
        """Chunks of one choice. An echo goes out with the first."""
        head = b"data: " + _json(self._head)[:-1]
        before = b'%b,"choices":[{"index":%d,"text":' % (head, index)
        after = b'}],"usage":null}\n\n' if self._request.include_usage else b"}]}\n\n"
        no_more = b',"logprobs":null,"finish_reason":null' + after
        echo = self._echo(index)
        form = None
        if self._request.logprobs is not None:
            form = CompletionLogprobs(self._tokenizer, self._request.logprobs, len(echo))

        def encode(text: str, logprobs: list[TokenLogprob] | None, finish: FinishReason | None) -> bytes:
            nonlocal echo
            if echo:
                text, echo = echo + text, ""
            if finish is None and not logprobs:
                return b"%b%b%b" % (before, _json(text), no_more) if text else b""
            inner = _json(form(logprobs)) if form is not None and logprobs else b"null"
            reason = _json(finish)
            return b'%b%b,"logprobs":%b,"finish_reason":%b%b' % (before, _json(text), inner, reason, after)

        return encode

    def tail(self, results: list[Result]) -> bytes:
        """The usage chunk, for who asked for it."""
        if not self._request.include_usage:
            return b""
        chunk = {**self._head, "choices": [], "usage": usage(results, self._request.choices)}
        return b"data: " + _json(chunk) + b"\n\n"
