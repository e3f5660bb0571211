"""KServe v2 over HTTP, with Triton's generate extension. `app.py` mounts `routes`; errors have KServe's form here.

A request without streaming is one awaited call; `generate_stream` is an ASGI response of its own (`EventStream`).
"""

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response as HttpResponse
from starlette.routing import Route

from router.config import RouterConfig
from router.errors import ModelNotFound, Overloaded, RouterError
from router.http.asgi import ClientGone, read_body, trace_context
from router.kserve import http_body
from router.kserve.errors import NotFound, Unimplemented, http_status
from router.kserve.event_stream import EventStream, until_disconnect
from router.kserve.face import Ready, find_model, model_config, model_metadata, server_metadata
from router.kserve.outbox import generate
from router.kserve.request import InferRequest, Job, prepare
from router.kserve.response import Parameters, Responder, Response
from router.kserve.tensors import invalid
from router.metrics import Metrics
from router.models import Model, Models
from router.types import Generator

log = logging.getLogger(__name__)

_CLIENT_GONE = 499
_THREAD_FROM_BYTES = 256 * 1024
"""Larger bodies are decoded in a thread: they would keep the event loop for over a millisecond."""
_HEADER_OF = {
    "instance": "x-dynamo-instance",
    "prefill_instance": "x-dynamo-prefill-instance",
    "prompt_blocks": "x-dynamo-prompt-blocks",
    "reused_blocks": "x-dynamo-reused-blocks",
    "cached_tokens": "x-dynamo-cached-tokens",
    "ttft_ms": "x-dynamo-ttft-ms",
}
_MODEL_PATHS = ("/v2/models/{model:path}/versions/{version}", "/v2/models/{model:path}")
_UNIMPLEMENTED = (
    "/v2/models/stats",
    *(f"{base}/{what}" for base in _MODEL_PATHS for what in ("stats", "trace/setting")),
    "/v2/repository/{rest:path}",
    "/v2/systemsharedmemory/{rest:path}",
    "/v2/cudasharedmemory/{rest:path}",
    "/v2/trace/setting",
    "/v2/logging",
)
"""Paths of Triton's that this router knows and does not serve."""

_T = TypeVar("_T")
Handler = Callable[[Request], Awaitable[HttpResponse]]


def routes(models: Models, generator: Generator, metrics: Metrics, config: RouterConfig, ready: Ready) -> list[Route]:
    """Everything under `/v2`. The first route that fits a path counts, so longer paths come first."""
    face = _Http(models, generator, metrics, config, ready)
    table: list[tuple[str, str, Handler]] = []
    for base in _MODEL_PATHS:
        table += [
            ("POST", f"{base}/infer", partial(face.counted, "kserve_infer", face.infer)),
            ("POST", f"{base}/generate", partial(face.counted, "kserve_generate", face.generate)),
            ("POST", f"{base}/generate_stream", partial(face.counted, "kserve_generate_stream", face.generate_stream)),
            ("GET", f"{base}/ready", face.model_ready),
            ("GET", f"{base}/config", face.model_config),
        ]
    table += [
        ("GET", "/v2", face.server),
        ("GET", "/v2/health/live", face.live),
        ("GET", "/v2/health/ready", face.ready),
    ]
    table += [(method, path, face.unimplemented) for path in _UNIMPLEMENTED for method in ("GET", "POST")]
    table += [("GET", base, face.model_metadata) for base in _MODEL_PATHS]
    rest = Route("/v2/{rest:path}", _answering(face.unknown), methods=["GET", "POST", "PUT", "PATCH", "DELETE"])
    return [*(Route(path, _answering(handler), methods=[method]) for method, path, handler in table), rest]


class _Http:
    """The handlers. They raise `RouterError`; `_answering` gives it KServe's form."""

    def __init__(
        self, models: Models, generator: Generator, metrics: Metrics, config: RouterConfig, ready: Ready
    ) -> None:
        self._ready = ready
        self._models = models
        self._generator = generator
        self._metrics = metrics
        self._max_body_bytes = config.max_body_bytes

    async def server(self, request: Request) -> HttpResponse:
        return _json(server_metadata())

    async def live(self, request: Request) -> HttpResponse:
        return HttpResponse()

    async def ready(self, request: Request) -> HttpResponse:
        return HttpResponse(status_code=200 if self._ready(None) else 400)

    async def model_ready(self, request: Request) -> HttpResponse:
        return HttpResponse(status_code=200 if self._ready(self._model(request).name) else 400)

    async def model_metadata(self, request: Request) -> HttpResponse:
        return _json(model_metadata(self._model(request)))

    async def model_config(self, request: Request) -> HttpResponse:
        return _json(model_config(self._model(request)))

    async def unimplemented(self, request: Request) -> HttpResponse:
        raise Unimplemented(f"{request.method} {request.url.path[:128]} is not supported by this router")

    async def unknown(self, request: Request) -> HttpResponse:
        raise NotFound(f"{request.method} {request.url.path[:128]} does not exist")

    async def counted(self, endpoint: str, handler: Handler, request: Request) -> HttpResponse:
        """Run a handler and count what it answers; an `EventStream` counts itself when it ends."""
        status: int | None = 500  # of a request that a shutdown cuts off
        try:
            response = await _answering(handler)(request)
            status = None if isinstance(response, EventStream) else response.status_code
            return response
        finally:
            if status is not None:
                self._metrics.count_request(endpoint, self._known(request), status)

    async def infer(self, request: Request) -> HttpResponse:
        model, body = self._model(request), await self._body(request)
        length = request.headers.get(http_body.HEADER_LENGTH)
        inferred, form = await _offload(len(body), http_body.decode_infer, body, length, model)
        job, response = await self._whole(request, inferred, model, "streams come by generate_stream or gRPC")
        encoded, json_length = http_body.encode_infer(response, model.name, job.id, form)
        return _infer_response(encoded, json_length, request.headers.get("accept-encoding", ""), response.parameters)

    async def generate(self, request: Request) -> HttpResponse:
        model, body = self._model(request), await self._body(request)
        inferred = await _offload(len(body), http_body.decode_generate, body, model)
        job, response = await self._whole(request, inferred, model, "generate gives one response, use generate_stream")
        encoded = http_body.encode_generate(response, model.name, job.id)
        return HttpResponse(encoded, media_type="application/json", headers=_headers(response.parameters))

    async def generate_stream(self, request: Request) -> HttpResponse:
        model, body = self._model(request), await self._body(request)
        inferred = await _offload(len(body), http_body.decode_generate, body, model)
        inferred.trace = trace_context(request.scope)

        async def prepared() -> tuple[Job, Model]:
            return await prepare(inferred, model), model

        def count(status: int) -> None:
            self._metrics.count_request("kserve_generate_stream", model.name, status)

        encode = partial(http_body.encode_generate, model=model.name, request_id=inferred.id)
        return EventStream(self._generator, prepared, encode, count, error_response, _headers)

    async def _whole(
        self, request: Request, inferred: InferRequest, model: Model, no_stream: str
    ) -> tuple[Job, Response]:
        """Serve a request that has one response; a client that goes away cancels it."""
        inferred.trace = trace_context(request.scope)
        job = await prepare(inferred, model)
        if job.stream:
            raise invalid("stream", f"cannot be true here: {no_stream}")
        result = await until_disconnect(request.receive, generate(self._generator, job))
        return job, Responder(job, model.tokenizer).whole(result)

    def _model(self, request: Request) -> Model:
        return find_model(self._models, request.path_params["model"], request.path_params.get("version", ""))

    def _known(self, request: Request) -> str:
        """The model's name for metrics: empty for one that does not exist, or anybody could make new series."""
        try:
            return self._models.get(request.path_params["model"]).name
        except ModelNotFound:
            return ""

    async def _body(self, request: Request) -> bytes:
        body = await read_body(request.scope, request.receive, self._max_body_bytes)
        encoding = request.headers.get("content-encoding", "identity").strip().lower()
        if encoding in ("", "identity"):
            return body
        return await _offload(len(body), http_body.decompress, body, encoding, self._max_body_bytes)


def error_response(error: RouterError) -> HttpResponse:
    """KServe's form of an error, with `Retry-After` where it helps."""
    headers = {}
    if error.retry_after_s is not None or isinstance(error, Overloaded):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s or 0)))
    body = msgspec.json.encode({"error": error.message})
    return HttpResponse(body, http_status(error), headers, "application/json")


def _answering(handler: Handler) -> Handler:
    """The handler, with its errors as responses."""

    async def endpoint(request: Request) -> HttpResponse:
        try:
            return await handler(request)
        except RouterError as error:
            return error_response(error)
        except ClientGone:
            return HttpResponse(status_code=_CLIENT_GONE)
        except Exception:
            # A request's boundary: a fault of ours must still have KServe's form.
            log.exception("%s %s failed", request.method, request.url.path)
            return error_response(RouterError("internal error, see the router's log"))

    return endpoint


async def _offload(size: int, function: Callable[..., _T], *args: object) -> _T:
    """Call it, in a thread where its input is large."""
    return function(*args) if size < _THREAD_FROM_BYTES else await asyncio.to_thread(function, *args)


def _infer_response(body: bytes, json_length: int | None, accepted: str, parameters: Parameters) -> HttpResponse:
    body, encoding = http_body.compress(body, accepted)
    headers = _headers(parameters)
    if encoding is not None:
        headers["content-encoding"] = encoding
    if json_length is None:
        return HttpResponse(body, media_type="application/json", headers=headers)
    headers[http_body.HEADER_LENGTH] = str(json_length)
    return HttpResponse(body, media_type="application/octet-stream", headers=headers)


def _headers(parameters: Parameters) -> dict[str, str]:
    """Placement and cache use, as the OpenAI face tells them."""
    return {_HEADER_OF[name]: str(value) for name, value in parameters.items() if name in _HEADER_OF}


def _json(document: object) -> HttpResponse:
    return HttpResponse(msgspec.json.encode(document), media_type="application/json")
