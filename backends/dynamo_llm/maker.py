"""Makes one engine on a thread of its own, and closes it there. `instance.Instance` has one for each life.

A model may take minutes to load, and nothing can interrupt that. Whoever waits can leave all the same: an engine that
was given up is closed as soon as it has been made, or ends with the process. The thread lives as long as the engine,
since a process that was started by a thread may be bound to that thread's end.
"""

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future

from dynamo_llm.engines.base import Engine, EngineError

logger = logging.getLogger(__name__)


class Maker:
    """See the module's docstring. It begins at once."""

    def __init__(self, create: Callable[[], Engine]) -> None:
        self._create = create
        self._made: Future[Engine] = Future()
        self._closed: Future[None] = Future()
        for future in (self._made, self._closed):
            future.set_running_or_notify_cancel()  # who waits and is cancelled does not cancel them
        self._given_up = threading.Event()
        threading.Thread(target=self._run, name="engine-maker", daemon=True).start()

    @property
    def busy(self) -> bool:
        """The engine is being made."""
        return not self._made.done()

    async def engine(self) -> Engine:
        """The engine, once it has been made. Raises `EngineError`. A caller that is cancelled gives it up."""
        try:
            return await asyncio.wrap_future(self._made)
        except asyncio.CancelledError:
            self._given_up.set()
            raise

    async def close(self) -> None:
        """Close the engine, or see to it that it is closed when it comes, which is not waited for. May be called twice,
        and goes on when the caller is cancelled."""
        self._given_up.set()
        if not self.busy:
            await asyncio.wrap_future(self._closed)

    def _run(self) -> None:
        try:
            engine = self._create()
        except EngineError as error:
            self._fail(str(error))
        except BaseException as error:
            # The boundary of somebody else's package, some of which call `sys.exit`: who waits gets one line.
            logger.exception("the engine could not be made")
            self._fail(" ".join(f"the engine could not start: {type(error).__name__}: {error}".split()))
        else:
            self._made.set_result(engine)
            self._given_up.wait()
            self._end(engine)

    def _fail(self, reason: str) -> None:
        self._closed.set_result(None)
        # A new error: the traceback of the one that was raised would hold on to what had been loaded by then.
        self._made.set_exception(EngineError(reason))

    def _end(self, engine: Engine) -> None:
        try:
            engine.close()
        except Exception:
            # The engine's boundary: what it still holds is free when the process ends.
            logger.exception("the engine could not be closed")
        self._closed.set_result(None)
