"""What chat and text completions share: from a body to sequences, and from their results to usage and status."""

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from router.config import RouterConfig
from router.errors import ContextLengthExceeded, InvalidRequest, RouterError
from router.http.asgi import REQUEST_ID, ClientGone, Receive, Scope, Send, read_body, request_id, send_whole
from router.http.errors import encoded
from router.http.exchange import Exchange
from router.http.openai_requests import RequestDecoder
from router.metrics import Metrics
from router.models import Model, Models
from router.types import Generator, Result

_THREAD_FROM = 8192
"""So many characters or tokens take about a millisecond to encode or decode: more is done in a thread."""
_CHARACTERS_PER_TOKEN = 256
"""No prompt has so many; what is longer is refused unseen."""

_T = TypeVar("_T")


class Endpoint(ABC):
    """An ASGI application for one path. Answers errors in OpenAI's form and counts the request."""

    name: str
    decode: RequestDecoder

    def __init__(self, models: Models, generator: Generator, metrics: Metrics, config: RouterConfig) -> None:
        self.models = models
        self.generator = generator
        self.config = config
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        id_ = request_id(scope)
        model, status = "", 500  # what a fault of ours is answered with, or a request that a shutdown cuts off
        try:
            body = await read_body(scope, receive, self.config.max_body_bytes)
            request: Any = self.decode(body)
            found = self.models.get(request.model)
            model = found.name
            exchange = Exchange(scope, send, id_, self.generator, self.config.max_pending_bytes, len(body))
            status = await self.serve(request, found, scope, exchange)
        except ClientGone:
            status = 499
        except RouterError as error:
            status, answer, headers = encoded(self.about(error))
            await send_whole(send, status, answer, [(REQUEST_ID, id_.encode()), *headers])
        finally:
            self._metrics.count_request(self.name, model, status)

    @abstractmethod
    async def serve(self, request: Any, model: Model, scope: Scope, exchange: Exchange) -> int:
        """Answer and return the status. Raises `RouterError` or `ClientGone` while nothing was sent."""

    def about(self, error: RouterError) -> RouterError:
        """The error with `param` named as this endpoint's clients know it."""
        if isinstance(error, ContextLengthExceeded) and error.param is None:
            error.param = self.prompt_field
        return error

    prompt_field = "prompt"

    def limit_choices(self, count: int) -> None:
        """Raises `InvalidRequest`."""
        if count > self.config.max_choices:
            raise InvalidRequest(f"{count} choices are asked for, {self.config.max_choices} is the most", param="n")


async def offload(size: int, function: Callable[..., _T], *args: object) -> _T:
    """Call it, in a thread where its input is large."""
    return function(*args) if size < _THREAD_FROM else await asyncio.to_thread(function, *args)


def encode_text(model: Model, text: str, add_special_tokens: bool) -> bytes:
    """Token ids of a text, little-endian uint32. Raises `ContextLengthExceeded` for one that cannot possibly fit."""
    if len(text) > _CHARACTERS_PER_TOKEN * model.max_context:
        raise ContextLengthExceeded(f"the prompt has {len(text)} characters; the context is {model.max_context} tokens")
    try:
        return model.tokenizer.encode(text, add_special_tokens)
    except UnicodeEncodeError:
        raise InvalidRequest("the prompt is not valid Unicode: it holds half of a surrogate pair") from None


def usage(results: Sequence[Result], choices: int) -> dict[str, Any]:
    """Usage of a request whose results come `choices` to a prompt. A prompt counts once."""
    prompts = results[::choices]
    prompt_tokens = sum(result.prompt_tokens for result in prompts)
    completion_tokens = sum(len(result.token_ids) for result in results)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(result.cached_tokens for result in prompts)},
    }


def now_s() -> int:
    """`created` of an answer."""
    return int(time.time())
