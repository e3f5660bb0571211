"""POST /v1/chat/completions."""

import msgspec

from kvstore.wire import FinishReason, TokenLogprob
from router.errors import ContextLengthExceeded
from router.http.asgi import Scope, trace_context
from router.http.endpoint import Endpoint, encode_text, now_s, offload, usage
from router.http.exchange import Exchange
from router.http.logprobs import chat_logprobs
from router.http.messages import for_template
from router.http.openai_requests import ChatRequest, RequestDecoder, for_choice, sampling_of
from router.http.sse import Encode
from router.models import Model
from router.types import GenerationRequest, Result

_json = msgspec.json.encode


class ChatCompletions(Endpoint):
    """See `Endpoint`."""

    name = "chat_completions"
    decode = RequestDecoder(ChatRequest)
    prompt_field = "messages"

    async def serve(self, request: ChatRequest, model: Model, scope: Scope, exchange: Exchange) -> int:
        self.limit_choices(request.choices)
        sequences = await _sequences(request, model, scope, exchange)
        answer = _Answer(request, model, exchange.request_id)
        if not request.stream:
            await exchange.answer_whole(sequences, answer.whole)
            return 200
        encoders = [answer.encoder(index) for index in range(len(sequences))]
        return await exchange.answer_stream(sequences, encoders, answer.tail)


async def _sequences(request: ChatRequest, model: Model, scope: Scope, exchange: Exchange) -> list[GenerationRequest]:
    """The prompt by the model's template, as many times as choices are asked for."""
    sampling = sampling_of(
        request,
        max_tokens=request.max_completion_tokens,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
    )
    parts = len(request.messages) + len(request.tools or ())
    if parts > model.max_context:  # a template spends a token on each at least, and time that nobody should wait for
        raise ContextLengthExceeded(
            f"{parts} messages and tools do not fit the context of {model.max_context} tokens", param="messages"
        )
    first = GenerationRequest(
        model=model.name,
        token_ids=await offload(exchange.body_bytes, _prompt, request, model),
        sampling=sampling,
        request_id=exchange.request_id,
        stop=request.stop_strings,
        include_stop=bool(request.include_stop_str_in_output),
        skip_special_tokens=request.skip_special_tokens is not False,
        cache_salt=request.cache_salt or "",
        priority=request.priority or 0,
        trace=trace_context(scope),
    )
    if request.choices == 1:
        return [first]
    return [msgspec.structs.replace(first, sampling=for_choice(sampling, i)) for i in range(request.choices)]


def _prompt(request: ChatRequest, model: Model) -> bytes:
    """Token ids of the rendered messages. Raises `InvalidRequest`."""
    prompt = model.chat_template.render(
        for_template(request.messages),
        request.tools,
        request.chat_template_kwargs,
        add_generation_prompt=request.add_generation_prompt is not False,
    )
    return encode_text(model, prompt, False)


class _Answer:
    """Documents and chunks of one answer. The parts of a chunk that do not change are encoded once."""

    def __init__(self, request: ChatRequest, model: Model, request_id: str) -> None:
        self._request = request
        self._tokenizer = model.tokenizer
        self._top = request.top_logprobs or 0
        self._head = {"id": f"chatcmpl-{request_id}", "created": now_s(), "model": model.name}

    def whole(self, results: list[Result]) -> bytes:
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": result.text, "refusal": None},
                "logprobs": self._logprobs(result.logprobs),
                "finish_reason": result.finish_reason,
                "stop_reason": result.stop_reason,
            }
            for index, result in enumerate(results)
        ]
        body = {"object": "chat.completion", "choices": choices, "usage": usage(results, self._request.choices)}
        return _json({**self._head, **body})

    def _logprobs(self, logprobs: list[TokenLogprob] | None) -> dict[str, object] | None:
        return None if logprobs is None else chat_logprobs(self._tokenizer, logprobs, self._top)

    def encoder(self, index: int) -> Encode:
        """Chunks of one choice: the role first, then text, then the finish reason in a chunk of its own."""
        head = b"data: " + _json({**self._head, "object": "chat.completion.chunk"})[:-1]
        before = b'%b,"choices":[{"index":%d,"delta":' % (head, index)
        after = b'}],"usage":null}\n\n' if self._request.include_usage else b"}]}\n\n"
        no_more = b',"logprobs":null,"finish_reason":null' + after
        role = b'%b{"role":"assistant","content":""}%b' % (before, no_more)
        role_sent = False

        def encode(text: str, logprobs: list[TokenLogprob] | None, finish: FinishReason | None) -> bytes:
            nonlocal role_sent
            events = b""
            if logprobs:
                inner = _json(self._logprobs(logprobs))
                events = b'%b{"content":%b},"logprobs":%b,"finish_reason":null%b' % (before, _json(text), inner, after)
            elif text:
                events = b'%b{"content":%b}%b' % (before, _json(text), no_more)
            if finish is not None:
                events += b'%b{},"logprobs":null,"finish_reason":"%b"%b' % (before, finish.encode(), after)
            if not role_sent:
                role_sent = True
                return role + events
            return events

        return encode

    def tail(self, results: list[Result]) -> bytes:
        """The usage chunk, for who asked for it."""
        if not self._request.include_usage:
            return b""
        chunk = {"object": "chat.completion.chunk", "choices": [], "usage": usage(results, self._request.choices)}
        return b"data: " + _json({**self._head, **chunk}) + b"\n\n"
