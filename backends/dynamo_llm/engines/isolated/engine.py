"""The worker's side of an engine in its own process. `engines.create_engine` makes it where a `python` is named.

`submit` refuses at once what `EngineInfo` tells to be wrong and passes the rest on without waiting: an answer per
request would hold the worker's threads for as long as the other process is busy. What the engine then refuses comes as
the request's only output, with finish reason `error` and the engine's code.
"""

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from dynamo_llm.channel import Channel, ChannelError, Outbox
from dynamo_llm.engines.base import ALONE, Duty, EngineError, EngineInfo, EngineRequest, RequestError, StepResult
from dynamo_llm.engines.checks import check_request
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
from dynamo_llm.engines.isolated.process import EngineProcess
from kvstore.cards import Cleared
from kvstore.wire import FinishReason, Load, Output, WireError

HELLO_LIMIT_S = 120.0
LOAD_LIMIT_S = 3600.0
"""Far beyond any model's start; there to be an end."""
CLOSE_LIMIT_S = 10.0
"""How long an engine may take to end its requests and itself; then it is killed."""
_OUTBOX_BYTES = 64 << 20
_EXIT_S = 2.0
"""Between the end of the stream and the end of the process."""

logger = logging.getLogger(__name__)


class IsolatedEngine:
    """See `engines.base.Engine`. The constructor starts the process and waits until the model is loaded."""

    def __init__(
        self, name: str, folder: Path, model: str, options: dict[str, Any], python: str, duty: Duty = ALONE
    ) -> None:
        """`python`: an interpreter that `check_interpreter` found fit. Raises `EngineError`."""
        try:
            create = messages.encode(Create(name, str(folder.absolute()), model, options, duty))
        except TypeError as error:
            raise EngineError(f"the {name} engine's options cannot be passed on: {error}") from None
        self._process = EngineProcess(python)
        self._channel = Channel(self._process.socket)
        try:
            ready = self._begin(create)
        except BaseException:  # a signal too: it must not leave a process that loads a model
            self._process.end()
            self._channel.close()
            raise
        self.info: EngineInfo = ready.info
        self._reader: threading.Thread | None = None
        self._outbox = Outbox(self._channel, _OUTBOX_BYTES)
        self._close_lock = threading.Lock()
        self._lock = threading.Lock()
        """Guards what follows."""
        self._load = ready.load
        self._unseen: deque[int] = deque()
        """Prompt tokens of the requests which that load does not count yet."""
        self._taken = 0
        """Requests before those."""
        self._keys: set[int] = set()
        self._closing = False
        self._dead: str | None = None

    # --- any thread ---------------------------------------------------------------------------------------------------

    @property
    def pid(self) -> int:
        return self._process.pid

    def start(self, on_step: Callable[[StepResult], None], on_death: Callable[[str], None]) -> None:
        if self._reader is not None:
            raise RuntimeError("the engine has been started already")
        self._reader = threading.Thread(target=self._serve, args=(on_step, on_death), name="engine-reader", daemon=True)
        self._reader.start()

    def submit(self, request: EngineRequest) -> None:
        check_request(request, self.info)
        document = messages.encode(Submit(request.key, msgspec.Raw(messages.encode(request))))
        with self._lock:
            if self._dead or self._closing:
                raise RequestError("engine_failure", self._dead or "the engine is closed")
            if request.key in self._keys:
                raise RequestError("invalid_request", f"a request with key {request.key} is in flight")
            if not self._outbox.put(document):
                raise RequestError("overloaded", "the engine does not take what waits already; try another worker")
            self._keys.add(request.key)
            self._unseen.append(len(request.token_ids) // 4 - request.generated)

    def cancel(self, key: int) -> None:
        with self._lock:
            if key in self._keys:
                self._outbox.put(messages.encode(Cancel(key)), force=True)

    def load(self) -> Load:
        with self._lock:
            if not self._unseen:
                return self._load
            return msgspec.structs.replace(
                self._load,
                waiting=self._load.waiting + len(self._unseen),
                waiting_prefill_tokens=self._load.waiting_prefill_tokens + sum(self._unseen),
            )

    def close(self) -> None:
        with self._lock:
            self._closing = True
        if self._reader is threading.current_thread():
            return self._process.kill()  # it ends by itself, when its caller lets it
        with self._close_lock:
            if self._reader is None:
                self.start(lambda step: None, lambda reason: None)
            assert self._reader is not None  # just started
            if self._reader.is_alive():
                self._outbox.put(messages.encode(Close()), force=True)
                self._reader.join(CLOSE_LIMIT_S)
                if self._reader.is_alive():
                    logger.warning("the engine's process did not end within %g s and is killed", CLOSE_LIMIT_S)
                    self._process.end()
                    self._reader.join()
            self._process.hang_up()  # a process that could not be killed must not hold the outbox
            self._outbox.close()
            self._channel.close()

    # --- the start ----------------------------------------------------------------------------------------------------

    def _begin(self, create: bytes) -> Ready:
        """Raises `EngineError`."""
        hello = self._expect(Hello, HELLO_LIMIT_S)
        ours = messages.own_version()
        if hello.protocol != messages.PROTOCOL or (ours and hello.version and hello.version != ours):
            theirs = hello.version or "another"
            raise EngineError(
                f"the engine's environment has dynamo-llm {theirs}, this one {ours}: install the same version there"
            )
        with contextlib.suppress(OSError):  # it is gone: how it ended comes next
            self._channel.send(create)
        ready: Ready = self._expect(Ready, LOAD_LIMIT_S)
        return ready

    def _expect(self, kind: type[Any], limit_s: float) -> Any:
        try:
            report = self._channel.receive(messages.decode_report, limit_s)
        except ChannelError as error:
            raise EngineError(f"the engine's process sent {error}{self._process.last_words()}") from None
        except TimeoutError:
            words = self._process.last_words()
            raise EngineError(f"the engine was not ready within {limit_s:g} s and was stopped{words}") from None
        if isinstance(report, Failed):
            raise EngineError(report.message)
        if report is None:
            raise EngineError(f"{self._process.story(_EXIT_S)} before it was ready")
        if not isinstance(report, kind):
            raise EngineError(f"the engine's process sent {type(report).__name__} instead of {kind.__name__}")
        return report

    # --- the reader's thread ------------------------------------------------------------------------------------------

    def _serve(self, on_step: Callable[[StepResult], None], on_death: Callable[[str], None]) -> None:
        reason = self._read(on_step)
        with self._lock:
            closing, self._closing = self._closing, True
            self._dead = None if closing else reason
            left = sorted(self._keys)
            self._keys.clear()
            self._unseen.clear()
            self._load = Load(kv_blocks_total=self.info.kv_blocks)
        finish: FinishReason = "cancelled" if closing else "error"
        error = None if closing else WireError("engine_failure", reason)
        outputs = [Output(key, [], finish, error=error) for key in left]
        try:
            on_step(StepResult(outputs=outputs, ops=[Cleared()], load=self._load))
        except Exception:
            # What broke before may break again; the worker must be told in any case.
            logger.exception("requests in flight could not be answered one by one")
        try:
            self._process.end(_EXIT_S if closing else 0.0)  # its memory is free before another engine is made
        except Exception:
            # As above.
            logger.exception("what the engine's process left behind could not be ended")
        if not closing:
            on_death(reason)

    def _read(self, on_step: Callable[[StepResult], None]) -> str:
        """Until the end, which is what it returns, in one line."""
        try:
            while (report := self._channel.receive(messages.decode_report)) is not None:
                match report:
                    case Stepped():
                        self._note(report)
                        on_step(report.result)
                    case Died(reason):
                        return " ".join(reason.split())
                    case Closed():
                        return "the engine is closed"
            return self._process.story(_EXIT_S)
        except ChannelError as error:
            self._process.end()
            return f"the engine's process (pid {self.pid}) sent {error}"
        except Exception as error:
            # The thread's boundary: whatever broke, every request gets its answer and the worker learns why.
            logger.exception("the engine's reports could not be passed on")
            self._process.end()
            return f"{type(error).__name__}: {error}"

    def _note(self, report: Stepped) -> None:
        with self._lock:
            self._keys.difference_update(output.rid for output in report.result.outputs if output.finish_reason)
            self._load = report.load
            while self._taken < report.taken:
                self._unseen.popleft()
                self._taken += 1
