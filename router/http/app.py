"""The ASGI application: which path goes where. The two generating endpoints are looked up first, in a dict."""

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Route, Router

from router.errors import ModelNotFound, RouterError
from router.http.asgi import REQUEST_ID, Receive, Scope, Send, request_id, send_whole
from router.http.chat import ChatCompletions
from router.http.completions import Completions
from router.http.endpoint import Endpoint
from router.http.errors import encoded, error_body
from router.metrics import CONTENT_TYPE, Metrics
from router.models import Model, Models

logger = logging.getLogger(__name__)

Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]


class Figures:
    """What the operator's endpoints ask; the application's own state, narrowed."""

    def __init__(self, ready: Callable[[], bool], status: Callable[[], dict[str, Any]], metrics: Metrics) -> None:
        self.ready = ready
        self.status = status
        self.metrics = metrics


class App:
    """The router's HTTP face. `more` are routes of other APIs (KServe)."""

    def __init__(
        self,
        chat: ChatCompletions,
        completions: Completions,
        models: Models,
        figures: Figures,
        more: Sequence[BaseRoute] = (),
    ) -> None:
        self._models = models
        self._figures = figures
        generating: dict[str, Endpoint] = {"/v1/chat/completions": chat, "/v1/completions": completions}
        self._hot: dict[tuple[str, str], Asgi] = {("POST", path): asgi for path, asgi in generating.items()}
        reading: dict[str, Any] = {
            "/v1/models": self._list_models,
            "/v1/models/{name:path}": self._show_model,
            "/health": self._live,
            "/live": self._live,
            "/ready": self._ready,
            "/status": self._status,
            "/metrics": self._render_metrics,
        }
        self._router = Router(
            [
                *(Route(path, _Asgi(asgi), methods=["POST"]) for path, asgi in generating.items()),
                *(Route(path, _Asgi(asgi), methods=["GET"]) for path, asgi in reading.items()),
                *more,
            ],
            redirect_slashes=False,
            default=_not_found,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            hot = self._hot.get((scope["method"], scope["path"]))
            if hot is not None:
                await hot(scope, receive, send)
                return
            scope["app"] = self  # makes starlette raise for a wrong method instead of answering in plain text
            await self._router(scope, receive, send)
        except HTTPException as error:
            await _send_error(scope, send, error.status_code, error.detail, dict(error.headers or {}))
        except RouterError as error:
            status, body, headers = encoded(error)
            await send_whole(send, status, body, [*headers, _id(scope)])
        except Exception:  # the boundary of one request: a bug here must answer it and end no other
            logger.exception("%s %s failed", scope["method"], scope["path"])
            await _send_error(scope, send, 500, "internal error; the router's log says more", {})

    # --- models ---

    async def _list_models(self, scope: Scope, receive: Receive, send: Send) -> None:
        models = [_model_object(self._models.get(name)) for name in self._models.names()]
        await _send_json(send, 200, {"object": "list", "data": models})

    async def _show_model(self, scope: Scope, receive: Receive, send: Send) -> None:
        name = scope["path_params"]["name"]
        if name not in self._models.names():
            raise ModelNotFound(f"the model `{name}` does not exist", param="model")
        await _send_json(send, 200, _model_object(self._models.get(name)))

    # --- operation ---

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        await _send_json(send, 200, {"status": "live"})

    async def _ready(self, scope: Scope, receive: Receive, send: Send) -> None:
        ready = self._figures.ready()
        await _send_json(send, 200 if ready else 503, {"status": "ready" if ready else "no worker is ready"})

    async def _status(self, scope: Scope, receive: Receive, send: Send) -> None:
        await _send_json(send, 200, self._figures.status())

    async def _render_metrics(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send_whole(send, 200, self._figures.metrics.render(), content_type=CONTENT_TYPE.encode())


class _Asgi:
    """starlette takes a function for a handler of its own kind, and an object for an ASGI application."""

    def __init__(self, asgi: Asgi) -> None:
        self._asgi = asgi

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._asgi(scope, receive, send)


def _model_object(model: Model) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": int(model.created_s),
        "owned_by": "dynamo-llm",
        "max_model_len": model.max_context,
    }


async def _send_json(send: Send, status: int, body: dict[str, Any]) -> None:
    await send_whole(send, status, msgspec.json.encode(body))


async def _send_error(scope: Scope, send: Send, status: int, message: str, headers: dict[str, str]) -> None:
    type_ = "server_error" if status >= 500 else "invalid_request_error"
    body = msgspec.json.encode(error_body(message, type_))
    more = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send_whole(send, status, body, [*more, _id(scope)])


def _id(scope: Scope) -> tuple[bytes, bytes]:
    return REQUEST_ID, request_id(scope).encode()


async def _not_found(scope: Scope, receive: Receive, send: Send) -> None:
    raise HTTPException(404, f"{scope['method']} {scope['path']} does not exist")
