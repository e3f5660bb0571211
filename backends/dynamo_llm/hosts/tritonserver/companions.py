"""The companions of `M` on a tritonserver: they hand on to `M` what clients send. `open_model` makes them.

They hold nothing: when `M` is loaded again, the next call finds the new one.
"""

import os
import threading
from collections.abc import Callable
from contextlib import closing
from typing import Any

import numpy as np

from dynamo_llm.hosts.tritonserver import translate
from dynamo_llm.hosts.tritonserver.link import CallError, Link, LinkLost, link_name
from kvstore.wire import CONTROL_SUFFIX, PAYLOAD, SESSION_SUFFIX, WireError


def open_companion(name: str, owner: str, triton: Any) -> "Control | Streams":
    """`name` begins with the owner's, and ends with what it is."""
    link = link_name(os.getppid(), owner)
    match name.removeprefix(owner):
        case suffix if suffix == CONTROL_SUFFIX:
            return Control(link, triton)
        case suffix if suffix == SESSION_SUFFIX:
            return Streams(link, "session", triton, _payload, _frame)
        case _:
            return Streams(link, "generate", triton, _request, _answer)


class Control:
    """One batch of commands after the other; what comes meanwhile waits with its router, and shares the next batch."""

    def __init__(self, link: str, triton: Any) -> None:
        self._link = Link(link)
        self._triton = triton

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._answer(request) for request in requests]

    def is_ready(self) -> bool:
        return True

    def close(self) -> None:
        self._link.close()

    def _answer(self, request: Any) -> Any:
        try:
            return _frame(self._triton, self._link.ask("control", _payload(request)))
        except (CallError, LinkLost) as error:
            return _failed(self._triton, error)


class Streams:
    """Each request has a thread, which looks at each answer, and twice a second, whether its client is still there."""

    def __init__(
        self,
        link: str,
        method: str,
        triton: Any,
        payload: Callable[[Any], bytes],
        response: Callable[[Any, bytes], Any],
    ) -> None:
        """`payload` of a request, for the link's `method`; `response` of (Triton, an answer)."""
        self._link = link
        self._method = method
        self._triton = triton
        self._payload = payload
        self._response = response
        self._threads: set[threading.Thread] = set()
        self._closing = False

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            arguments = (self._payload(request), request.get_response_sender())
            thread = threading.Thread(target=self._pass_on, args=arguments, daemon=True)
            self._threads.add(thread)
            thread.start()

    def is_ready(self) -> bool:
        return True

    def close(self) -> None:
        self._closing = True
        for thread in list(self._threads):
            thread.join()

    def _pass_on(self, payload: bytes, sender: Any) -> None:
        try:
            with closing(Link(self._link)) as link:
                answers = link.call(self._method, payload, lambda: not (self._closing or sender.is_cancelled()))
                for answer in answers:
                    sender.send(self._response(self._triton, answer))
        except (CallError, LinkLost) as error:
            sender.send(_failed(self._triton, error))
        finally:
            sender.send(flags=self._triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
            self._threads.discard(threading.current_thread())


def _payload(request: Any) -> bytes:
    (tensor,) = request.inputs()
    return bytes(tensor.as_numpy().tobytes())


def _frame(triton: Any, payload: bytes) -> Any:
    return translate.response_of(triton, {PAYLOAD: np.frombuffer(payload, np.uint8)})


def _request(request: Any) -> bytes:
    tensors = translate.pack(translate.tensors_of(request))
    return translate.encode(translate.PackedRequest(tensors, translate.parameters_of(request)))


def _answer(triton: Any, answer: bytes) -> Any:
    return translate.response_of(triton, translate.unpack(translate.decode_tensors(answer)))


def _failed(triton: Any, error: CallError | LinkLost) -> Any:
    cause = error.error if isinstance(error, CallError) else WireError("engine_failure", str(error))
    return translate.failed(triton, cause)
