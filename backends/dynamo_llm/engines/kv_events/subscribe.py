"""Follows the KV events that vLLM and SGLang publish over ZMQ. Their adapters start it; it has a thread of its own.

Batches are numbered. One that is missing is asked for at the replay socket of the engine. Where that cannot give it
(there is none, or its buffer has gone on), nothing is known for certain any more: everything is forgotten and
announced as `Cleared`, `on_lost` is told, and blocks are learnt anew as the engine stores them. Who wants the two to
agree at once empties the engine's prefix cache in `on_lost`; otherwise we believe, until blocks are evicted and stored
again, that the engine holds less than it does, which costs hits and never correctness.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence

import zmq

from dynamo_llm.engines.base import EngineError
from dynamo_llm.engines.kv_events.decode import KvEventError, decode_events
from dynamo_llm.engines.kv_events.sequence import Sequence as Numbers
from dynamo_llm.engines.kv_events.translate import Translator
from kvstore.cards import KvOp

logger = logging.getLogger(__name__)

_END = -1
_CLOSE_TIMEOUT_S = 5.0
_MOST_BYTES = 64 << 20


class KvEventSubscriber:
    """From `start` to `close`, hands what the engine stored and removed to `on_ops`, on its own thread.

    `endpoint` and `replay_endpoint` are addresses to connect to (see `reachable`); they need not be bound yet.
    """

    def __init__(
        self,
        endpoint: str,
        translator: Translator,
        on_ops: Callable[[Sequence[KvOp]], None],
        *,
        replay_endpoint: str | None = None,
        topic: str = "",
        replay_timeout_s: float = 2.0,
        on_lost: Callable[[], None] = lambda: None,
    ) -> None:
        """`replay_timeout_s`: how long the replay socket may be silent before a gap counts as lost."""
        self.broken = 0
        """Messages that were no batch of events."""
        self.replayed = 0
        """Batches that came by replay."""
        self.lost = 0
        """Gaps that could not be filled."""
        self._endpoint = endpoint
        self._replay_endpoint = replay_endpoint
        self._topic = topic
        self._replay_timeout_s = replay_timeout_s
        self._translator = translator
        self._on_ops = on_ops
        self._on_lost = on_lost
        self._numbers = Numbers()
        self._context = zmq.Context()
        self._stop, self._stopped = (self._context.socket(zmq.PAIR) for _ in range(2))
        self._stop.bind("inproc://stop")
        self._stopped.connect("inproc://stop")
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="kv-events", daemon=True)

    def start(self) -> None:
        """Connect at once, and follow the events on a thread. Raises `EngineError` for what is no ZMQ address."""
        self._events = self._context.socket(zmq.SUB)
        self._events.setsockopt(zmq.RCVHWM, 100_000)
        self._events.setsockopt(zmq.MAXMSGSIZE, _MOST_BYTES)
        self._events.setsockopt_string(zmq.SUBSCRIBE, self._topic)
        try:
            self._events.connect(self._endpoint)
        except zmq.ZMQError as error:
            raise EngineError(f"cannot follow KV events at {self._endpoint!r}: {error}") from None
        self._thread.start()

    def close(self) -> None:
        """End the thread and close the sockets; a replay in progress is broken off. May be called twice."""
        if self._closing:
            return
        self._closing = True
        if self._thread.ident is not None:
            self._stop.send(b"")
            self._thread.join(_CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            logger.warning("the KV event thread is stuck in what it calls, and is left behind")
            return
        self._context.destroy(linger=0)

    # --- on the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._events, zmq.POLLIN)
        poller.register(self._stopped, zmq.POLLIN)
        while not self._closing:
            ready = dict(poller.poll())
            if self._events in ready and not self._closing:
                self._message(self._events.recv_multipart())

    def _message(self, frames: list[bytes]) -> None:
        if len(frames) != 3 or len(frames[1]) != 8:
            self._note_broken(f"{len(frames)} frames instead of topic, number and payload")
            return
        number = int.from_bytes(frames[1], "big")
        arrival = self._numbers.arrived(number)
        if arrival.restarted:
            logger.info("the KV events began anew: the engine was restarted")
            self._on_ops(self._translator.clear())
        if arrival.kind == "late":
            return
        if arrival.kind == "gap":
            self._fill(number)
        if self._closing or self._numbers.expected > number:
            return
        if self._numbers.expected < number:
            self._lose(f"KV events {self._numbers.expected} to {number - 1} are lost")
        self._apply(number, frames[2])

    def _apply(self, number: int, payload: bytes) -> None:
        self._numbers.applied(number)
        try:
            ops = self._translator.translate(decode_events(payload))
        except KvEventError as error:
            self._note_broken(str(error))
            self._lose(f"KV events {number} cannot be read")
            return
        if ops:
            self._on_ops(ops)

    def _lose(self, what: str) -> None:
        """The policy of the module's docstring. Before anything is known there is nothing to lose."""
        ops = self._translator.clear()
        if ops:
            self.lost += 1
            logger.warning("%s: all blocks count as gone until they are stored again", what)
            self._on_ops(ops)
            self._on_lost()

    def _note_broken(self, what: str) -> None:
        self.broken += 1
        if self.broken & (self.broken - 1) == 0:  # the 1st, 2nd, 4th, 8th ...: a flood must not fill the log
            logger.warning("a broken KV event message (%d so far): %s", self.broken, what)

    # --- replay -------------------------------------------------------------------------------------------------------

    def _fill(self, end: int) -> None:
        """Apply what is missing before `end`, or as much of it as there is."""
        before = -1
        while self._replay_endpoint is not None and before < self._numbers.expected < end:
            before = self._numbers.expected
            for number, payload in self._replay(self._replay_endpoint, before):
                if number > self._numbers.expected:
                    if before != self._numbers.expected:
                        break  # the other side dropped a part of a long answer: ask again from there
                    self._lose(f"KV events {before} to {number - 1} are no longer in the engine's buffer")
                if number >= self._numbers.expected:
                    self.replayed += 1
                    self._apply(number, payload)

    def _replay(self, endpoint: str, start: int) -> Iterator[tuple[int, bytes]]:
        """Numbers and payloads from `start` on, as far as the engine still has them."""
        with self._context.socket(zmq.DEALER) as socket:
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.RCVHWM, 0)  # what it does not take, the other side drops
            socket.setsockopt(zmq.MAXMSGSIZE, _MOST_BYTES)
            socket.connect(endpoint)
            socket.send_multipart([b"", start.to_bytes(8, "big")])
            while (frames := self._receive(socket)) is not None:
                if len(frames) < 3 or len(frames[-2]) != 8:  # an older engine leaves the topic out
                    self._note_broken(f"{len(frames)} frames in a replay")
                    return
                number = int.from_bytes(frames[-2], "big", signed=True)
                if number == _END:
                    return
                yield number, frames[-1]

    def _receive(self, socket: "zmq.Socket[bytes]") -> list[bytes] | None:
        """The next message, or None when none comes in time or the subscriber is to close."""
        poller = zmq.Poller()
        poller.register(socket, zmq.POLLIN)
        poller.register(self._stopped, zmq.POLLIN)
        ready = dict(poller.poll(int(self._replay_timeout_s * 1e3)))
        return socket.recv_multipart() if socket in ready and not self._closing else None


def reachable(endpoint: str) -> str:
    """The address at which a publisher of this machine is reached that binds `endpoint` (`tcp://*:5557`)."""
    for wildcard in ("*", "0.0.0.0", "[::]"):
        if endpoint.startswith(f"tcp://{wildcard}:"):
            return f"tcp://127.0.0.1:{endpoint.rpartition(':')[2]}"
    return endpoint
