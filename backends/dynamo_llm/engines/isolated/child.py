"""The engine's own process: `PYTHON -m dynamo_llm.engines.isolated.child SOCKET PARENT`. `process.py` starts it.

The main thread makes the engine and then carries out orders; the engine's thread sends what each step produced, and
waits where the worker does not read: a step behind is better than memory that grows. Standard output and error are a
pipe to the worker's log.
"""

import contextlib
import ctypes
import faulthandler
import logging
import os
import signal
import socket
import sys
from pathlib import Path

import msgspec

from dynamo_llm.channel import Channel, ChannelError
from dynamo_llm.engines import create_engine
from dynamo_llm.engines.base import Engine, EngineError, EngineInfo, MovesBlocks, RequestError, StepResult
from dynamo_llm.engines.isolated import messages
from dynamo_llm.engines.isolated.messages import (
    Cancel,
    Close,
    Closed,
    Create,
    Died,
    Failed,
    Hello,
    Ready,
    Stepped,
    Submit,
)
from kvstore.wire import Output, WireError

_PR_SET_PDEATHSIG = 1

logger = logging.getLogger(__name__)


def _info(engine: Engine) -> EngineInfo:
    """As the worker is told: what it would have to open here, no order asks for."""
    return msgspec.structs.replace(engine.info, roles=("agg",)) if isinstance(engine, MovesBlocks) else engine.info


class _Child:
    """A made engine and the channel to its worker."""

    def __init__(self, engine: Engine, channel: Channel) -> None:
        self._engine = engine
        self._channel = channel
        self._taken = 0

    def serve(self) -> bool:
        """Carry out orders. False when the worker went away without a `Close`."""
        self._send(Ready(_info(self._engine), self._engine.load()))
        self._engine.start(self._on_step, self._on_death)
        while (order := self._channel.receive(messages.decode_order)) is not None:
            match order:
                case Submit():
                    self._submit(order)
                case Cancel(key):
                    self._engine.cancel(key)
                case Close():
                    self._engine.close()
                    self._send(Closed())
                    return True
                case Create():
                    logger.error("a second engine was ordered")
        return False

    def _submit(self, order: Submit) -> None:
        error: WireError | None = None
        self._taken += 1  # first: its only step may be sent before `submit` returns
        try:
            self._engine.submit(messages.decode_request(order.request))
        except RequestError as refusal:
            error = refusal.to_wire()
        except msgspec.ValidationError as wrong:
            error = WireError("invalid_request", f"the request is not valid: {wrong}")
        except Exception as bug:
            # The engine's boundary: a bug in it must not take the other requests with it.
            logger.exception("the engine could not take a request")
            error = WireError("engine_failure", f"the engine could not take the request: {bug!r}")
        if error is not None:
            self._on_step(
                StepResult(outputs=[Output(order.key, [], "error", error=error)], ops=[], load=self._engine.load())
            )

    def _on_step(self, result: StepResult) -> None:
        taken = self._taken  # one that is being submitted just now is counted by its own first step
        self._send(Stepped(result, taken, self._engine.load()))

    def _on_death(self, reason: str) -> None:
        self._send(Died(reason))

    def _send(self, report: messages.Report) -> None:
        with contextlib.suppress(OSError):  # the worker is gone; the end of its socket's stream says so
            self._channel.send(messages.encode(report))


def _make(order: Create, channel: Channel) -> Engine | None:
    try:
        return create_engine(order.engine, Path(order.folder), order.model, order.options, duty=order.duty)
    except EngineError as error:
        message = str(error)
    except Exception as error:
        # The boundary of somebody else's package: whatever it raises while it loads, the worker gets one line.
        logger.exception("the engine could not be made")
        message = f"the {order.engine} engine could not start: {type(error).__name__}: {error}"
    channel.send(messages.encode(Failed(" ".join(message.split()))))
    return None


def _die_with(parent: int) -> None:
    """Have the kernel kill us when the worker ends, whatever we are doing then."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before we asked
        sys.exit(1)


def main(handle: int, parent: int) -> int:
    """The exit code: 0 after an order to close, 1 when there was no engine or no worker any more."""
    _die_with(parent)
    faulthandler.enable()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    end = socket.socket(fileno=handle)
    end.set_inheritable(False)  # a process of the engine's that outlives us must not hold it
    channel = Channel(end)
    channel.send(messages.encode(Hello(messages.PROTOCOL, messages.own_version())))
    order = channel.receive(messages.decode_order)
    if not isinstance(order, Create):
        return 1
    engine = _make(order, channel)
    if engine is None:
        return 1
    try:
        if _Child(engine, channel).serve():
            return 0
    except ChannelError as error:
        logger.error("the worker sent %s", error)
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)  # nobody reads any more: an orderly end would help none, and may never come
    return 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
