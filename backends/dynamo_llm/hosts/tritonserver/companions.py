"""`M.control` and `M.session` on a tritonserver: they hand on to `M` what routers send. `open_model` makes them.

They hold nothing: when `M` is loaded again, the next call finds the new one.
"""

import os
import threading
from contextlib import closing
from typing import Any

import numpy as np

from dynamo_llm.hosts.tritonserver.link import CallError, Link, LinkLost, link_name
from kvstore.wire import CONTROL_SUFFIX, PAYLOAD


def open_companion(name: str, suffix: str, triton: Any) -> "Control | Sessions":
    """The companion of that suffix."""
    link = link_name(os.getppid(), name[: -len(suffix)])
    return Control(link, triton) if suffix == CONTROL_SUFFIX else Sessions(link, triton)


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
            return _response(self._triton, self._link.ask("control", _payload(self._triton, request)))
        except (CallError, LinkLost) as error:
            return self._triton.InferenceResponse(error=_error(self._triton, error))


class Sessions:
    """Each session has a thread, which looks at each frame whether its router is still there."""

    def __init__(self, link: str, triton: Any) -> None:
        self._name = link
        self._triton = triton
        self._threads: set[threading.Thread] = set()
        self._closing = False

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            arguments = (_payload(self._triton, request), request.get_response_sender())
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
            with closing(Link(self._name)) as link:
                for frame in link.call("session", payload, lambda: not (self._closing or sender.is_cancelled())):
                    sender.send(_response(self._triton, frame))
        except (CallError, LinkLost) as error:
            sender.send(self._triton.InferenceResponse(error=_error(self._triton, error)))
        finally:
            sender.send(flags=self._triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
            self._threads.discard(threading.current_thread())


def _payload(triton: Any, request: Any) -> bytes:
    array: Any = triton.get_input_tensor_by_name(request, PAYLOAD).as_numpy()
    return bytes(array.tobytes())


def _response(triton: Any, payload: bytes) -> Any:
    return triton.InferenceResponse([triton.Tensor(PAYLOAD, np.frombuffer(payload, np.uint8))])


def _error(triton: Any, error: CallError | LinkLost) -> Any:
    text = str(error) if isinstance(error, CallError) else f"engine_failure: {error}"
    return triton.TritonError(text)
