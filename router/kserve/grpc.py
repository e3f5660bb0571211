"""KServe v2 over gRPC, as Triton's clients speak it. `app.py` enters `KServeGrpc`.

The service is registered from its descriptor, with a decoder that hands a broken message to the handler instead of
letting gRPC call it an internal error. ModelStreamInfer serves many requests at once on one stream: see `Outbox`.
"""

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import DecodeError, Message  # type: ignore[import-untyped,unused-ignore]
from tritonclient.grpc import service_pb2 as pb

from router.errors import InvalidRequest, ModelNotFound, RouterError, Unavailable
from router.kserve import grpc_messages as messages
from router.kserve.errors import NotFound, Unimplemented, grpc_status
from router.kserve.face import Ready, find_model, model_config, model_metadata, server_metadata
from router.kserve.outbox import Item, Outbox, generate
from router.kserve.request import Job, prepare
from router.kserve.response import Responder
from router.kserve.tensors import invalid
from router.metrics import Metrics
from router.models import Model, Models
from router.types import Generator

log = logging.getLogger(__name__)

_SERVICE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
_STREAM = "kserve_grpc_stream"
_MAX_RUNS = 1024
"""Requests in flight on one stream; beyond it the stream is read no further: gRPC's flow control holds the client."""
_GRPC_ERRORS = "triton_grpc_error"
"""Metadata by which a client asks that an error ends its stream with a gRPC status, instead of `error_message`."""
_TRACE_METADATA = ("traceparent", "tracestate")

Context: TypeAlias = Any
"""`grpc.aio.ServicerContext`; grpcio carries no types."""
Request: TypeAlias = Any
"""A decoded message, or the `InvalidRequest` it gave rise to."""


class PortBusy(Exception):
    """The address cannot be bound; the message says which and why in one line."""


class KServeGrpc:
    """The gRPC server. Entering it listens; leaving it drains: calls in flight go on for at most `drain_timeout_s`."""

    def __init__(
        self,
        models: Models,
        generator: Generator,
        metrics: Metrics,
        ready: Ready,
        host: str,
        port: int,
        *,
        max_message_bytes: int = 32 * 2**20,
        drain_timeout_s: float = 30.0,
    ) -> None:
        self._models = models
        self._generator = generator
        self._metrics = metrics
        self._ready = ready
        self._host = host
        self.port = port
        """After entering: the port in use."""
        self._drain_timeout_s = drain_timeout_s
        self._options = [
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),
        ]
        self._server: grpc.aio.Server | None = None
        self._outboxes: set[Outbox] = set()

    async def __aenter__(self) -> "KServeGrpc":
        """Raises `PortBusy`."""
        _check_free(self._host, self.port)
        server = grpc.aio.server(options=self._options)
        server.add_generic_rpc_handlers((self._handlers(),))
        try:
            host = f"[{self._host}]" if ":" in self._host else self._host
            self.port = server.add_insecure_port(f"{host}:{self.port}")
        except RuntimeError as error:
            raise PortBusy(f"gRPC cannot listen on {self._host}:{self.port}: {error}") from None
        await server.start()
        self._server = server
        return self

    async def __aexit__(self, *_: object) -> None:
        for outbox in self._outboxes:
            outbox.close()
        server, self._server = self._server, None  # grpcio's finalizer needs a running loop, so let it go here
        if server is not None:
            await server.stop(self._drain_timeout_s)

    def _handlers(self) -> grpc.GenericRpcHandler:
        served: dict[str, Callable[[Any, Context], Any]] = {
            "ServerLive": self._server_live,
            "ServerReady": self._server_ready,
            "ServerMetadata": self._server_metadata,
            "ModelReady": self._model_ready,
            "ModelMetadata": self._model_metadata,
            "ModelConfig": self._model_config,
            "ModelInfer": self._infer,
        }
        handlers = {}
        for method in _SERVICE.methods:
            decode = _decoder(getattr(pb, method.input_type.name))
            if method.name == "ModelStreamInfer":
                handlers[method.name] = grpc.stream_stream_rpc_method_handler(self._stream, decode, _encode)
            else:
                answer = _answering(served.get(method.name) or _unimplemented(method.name))
                handlers[method.name] = grpc.unary_unary_rpc_method_handler(answer, decode, _encode)
        return grpc.method_handlers_generic_handler(_SERVICE.full_name, handlers)

    async def _server_live(self, request: pb.ServerLiveRequest, context: Context) -> Message:
        return pb.ServerLiveResponse(live=True)

    async def _server_ready(self, request: pb.ServerReadyRequest, context: Context) -> Message:
        return pb.ServerReadyResponse(ready=self._ready(None))

    async def _server_metadata(self, request: pb.ServerMetadataRequest, context: Context) -> Message:
        return pb.ServerMetadataResponse(**server_metadata())

    async def _model_ready(self, request: pb.ModelReadyRequest, context: Context) -> Message:
        try:
            ready = self._ready(find_model(self._models, request.name, request.version).name)
        except (ModelNotFound, NotFound):
            ready = False
        return pb.ModelReadyResponse(ready=ready)

    async def _model_metadata(self, request: pb.ModelMetadataRequest, context: Context) -> Message:
        model = find_model(self._models, request.name, request.version)
        return pb.ModelMetadataResponse(**model_metadata(model))

    async def _model_config(self, request: pb.ModelConfigRequest, context: Context) -> Message:
        model = find_model(self._models, request.name, request.version)
        return pb.ModelConfigResponse(config=model_config(model))

    async def _infer(self, request: pb.ModelInferRequest, context: Context) -> Message:
        status, known = grpc.StatusCode.INTERNAL, ""
        try:
            job, model = await self._prepare(request, context)
            known = model.name
            if job.stream:
                raise invalid("stream", "cannot be true here: use ModelStreamInfer")
            result = await generate(self._generator, job)
            status = grpc.StatusCode.OK
            return messages.response(Responder(job, model.tokenizer).whole(result), model.name, job.id)
        except RouterError as error:
            status = grpc_status(error)
            raise
        except asyncio.CancelledError:
            status = grpc.StatusCode.CANCELLED
            raise
        finally:
            self._metrics.count_request("kserve_grpc_infer", known, status.name)

    async def _prepare(self, request: pb.ModelInferRequest, context: Context) -> tuple[Job, Model]:
        model = find_model(self._models, request.model_name, request.model_version)
        inferred = messages.request(request, model)
        inferred.trace = {k: v for k, v in context.invocation_metadata() or () if k in _TRACE_METADATA}
        return await prepare(inferred, model), model

    async def _stream(self, requests: AsyncIterator[Request], context: Context) -> None:
        """Many requests on one stream. Returning ends it with OK; a client that cancels it cancels this task."""
        as_status = dict(context.invocation_metadata() or ()).get(_GRPC_ERRORS) == "true"
        async with Outbox(self._generator) as outbox:
            self._outboxes.add(outbox)
            reader = asyncio.create_task(self._read(requests, outbox, context))
            try:
                while items := await outbox.next():
                    for item in items:
                        self._count(item)
                    for item in items:
                        if as_status and isinstance(item.response, RouterError):
                            await _abort(context, item.response)
                        await context.write(messages.stream_response(item))
            finally:
                for run in outbox.runs:
                    self._metrics.count_request(_STREAM, run.model, grpc.StatusCode.CANCELLED.name)
                self._outboxes.discard(outbox)
                reader.cancel()
                await asyncio.gather(reader, return_exceptions=True)

    async def _read(self, requests: AsyncIterator[Request], outbox: Outbox, context: Context) -> None:
        """Start a run for each request until the client has no more, or until we drain."""
        try:
            async for request in requests:
                if outbox.closed:
                    request = Unavailable("the router is shutting down, try another one")
                await outbox.room(_MAX_RUNS)
                outbox.start("" if isinstance(request, RouterError) else request.id, self._preparing(request, context))
        finally:
            outbox.close()

    def _preparing(self, request: Request, context: Context) -> Callable[[], Awaitable[tuple[Job, Model]]]:
        async def prepared() -> tuple[Job, Model]:
            if isinstance(request, RouterError):
                raise request
            return await self._prepare(request, context)

        return prepared

    def _count(self, item: Item) -> None:
        """Count a run's last item."""
        if isinstance(item.response, RouterError):
            self._metrics.count_request(_STREAM, item.run.model, grpc_status(item.response).name)
        elif item.response.final:
            self._metrics.count_request(_STREAM, item.run.model, grpc.StatusCode.OK.name)


def _answering(
    handler: Callable[[Any, Context], Awaitable[Message]],
) -> Callable[[Request, Context], Awaitable[Message]]:
    """The handler, with its errors as gRPC statuses."""

    async def answer(request: Request, context: Context) -> Message:
        try:
            if isinstance(request, RouterError):
                raise request
            return await handler(request, context)
        except RouterError as error:
            await _abort(context, error)
        except Exception:
            # A request's boundary: a fault of ours must not show its traceback to the client.
            log.exception("gRPC call failed")
            await _abort(context, RouterError("internal error, see the router's log"))
        raise AssertionError("abort returned")

    return answer


async def _abort(context: Context, error: RouterError) -> None:
    """End the call with the error's status; gRPC's own retry policies read the push-back."""
    trailing = () if error.retry_after_s is None else (("grpc-retry-pushback-ms", str(int(error.retry_after_s * 1e3))),)
    await context.abort(grpc_status(error), error.message, trailing)


def _unimplemented(method: str) -> Callable[[Any, Context], Awaitable[Message]]:
    async def refuse(request: Any, context: Context) -> Message:
        raise Unimplemented(f"{method} is not supported by this router")

    return refuse


def _decoder(kind: Any) -> Callable[[bytes], Request]:
    def decode(data: bytes) -> Request:
        try:
            return kind.FromString(data)
        except DecodeError:
            return InvalidRequest(f"the message is no valid {kind.DESCRIPTOR.name}")

    return decode


def _encode(message: Message) -> bytes:
    return bytes(message.SerializeToString())


def _check_free(host: str, port: int) -> None:
    """gRPC's own message for a busy port fills the log and names no reason."""
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            pass
    except OSError as error:
        raise PortBusy(f"gRPC cannot listen on {host}:{port}: {error.strerror}") from None
