"""Publishes KV events over real ZMQ sockets as vLLM and SGLang do; messages can be lost on purpose."""

import threading
from collections import deque
from typing import Any

import msgspec
import zmq

END = (-1).to_bytes(8, "big", signed=True)


def stored(
    hashes: list[Any], tokens: list[int], block_size: int = 2, parent: Any = None, **more: Any
) -> dict[str, Any]:
    """A `BlockStored` as a map, as engines since vLLM 0.24 send it."""
    event = {"type": "BlockStored", "block_hashes": hashes, "parent_block_hash": parent, "token_ids": tokens}
    return {**event, "block_size": block_size, "lora_id": None, "medium": "GPU", "lora_name": None, **more}


def removed(hashes: list[Any], medium: str | None = "GPU", **more: Any) -> dict[str, Any]:
    return {"type": "BlockRemoved", "block_hashes": hashes, "medium": medium, **more}


CLEARED = {"type": "AllBlocksCleared"}


def batch(*events: Any) -> bytes:
    return msgspec.msgpack.encode([1.5, list(events), 0])


class Publisher:
    """A PUB socket, and a ROUTER that answers for the newest `buffer` batches where `replay` says so."""

    def __init__(
        self,
        *,
        replay: bool = True,
        buffer: int = 1000,
        topic: str = "",
        with_topic: bool = True,
        endpoints: tuple[str, str] = ("", ""),
    ) -> None:
        """`endpoints`: where to bind PUB and ROUTER; otherwise free ports of this machine."""
        self.context = zmq.Context()
        self.asked: list[int] = []
        """Numbers from which on a replay was asked for."""
        self.mute = False
        """Take replay requests and never answer."""
        self.skip: set[int] = set()
        """Left out of the next replay answer, as a socket does whose queue is full."""
        self._topic = topic.encode()
        self._with_topic = with_topic
        self._buffer: deque[tuple[int, bytes]] = deque(maxlen=buffer)
        self._next = 0
        self._pub = self.context.socket(zmq.XPUB)  # a PUB that sees subscriptions
        self.endpoint = _bind(self._pub, endpoints[0])
        self.replay_endpoint: str | None = None
        self._stop = self.context.socket(zmq.PAIR)
        self._stop.bind("inproc://stop")
        self._thread: threading.Thread | None = None
        if replay:
            router = self.context.socket(zmq.ROUTER)
            self.replay_endpoint = _bind(router, endpoints[1])
            self._thread = threading.Thread(target=self._serve, args=(router,), daemon=True)
            self._thread.start()

    def wait_for_subscriber(self) -> None:
        assert self._pub.poll(10_000)
        assert self._pub.recv() == b"\x01" + self._topic

    def send(self, *events: Any, lose: bool = False) -> None:
        self.send_bytes(batch(*events), lose=lose)

    def send_bytes(self, payload: bytes, *, lose: bool = False) -> None:
        """The next batch; a lost one is in the replay buffer only."""
        number, self._next = self._next, self._next + 1
        self._buffer.append((number, payload))
        if not lose:
            self.send_frames(self._topic, number.to_bytes(8, "big"), payload)

    def send_frames(self, *frames: bytes) -> None:
        self._pub.send_multipart(frames)

    def restart(self) -> None:
        """Another engine at the same address: numbers from 0, an empty buffer."""
        self._next = 0
        self._buffer.clear()

    def close(self) -> None:
        if self._thread is not None:
            self._stop.send(b"")
            self._thread.join(10)
        self.context.destroy(linger=0)

    def _serve(self, router: "zmq.Socket[bytes]") -> None:
        with router, self.context.socket(zmq.PAIR) as stopped:
            stopped.connect("inproc://stop")
            self._answer(router, stopped)

    def _answer(self, router: "zmq.Socket[bytes]", stopped: "zmq.Socket[bytes]") -> None:
        poller = zmq.Poller()
        poller.register(router, zmq.POLLIN)
        poller.register(stopped, zmq.POLLIN)
        while stopped not in dict(poller.poll()):
            client, _, start = router.recv_multipart()
            self.asked.append(int.from_bytes(start, "big"))
            topic = [self._topic] if self._with_topic else []
            for number, payload in () if self.mute else tuple(self._buffer):
                if number >= self.asked[-1] and number not in self.skip:
                    router.send_multipart([client, b"", *topic, number.to_bytes(8, "big"), payload])
            self.skip = set()
            if not self.mute:
                router.send_multipart([client, b"", *topic, END, b""])


def _bind(socket: "zmq.Socket[bytes]", endpoint: str) -> str:
    if endpoint:
        socket.bind(endpoint)
        return endpoint
    return f"tcp://127.0.0.1:{socket.bind_to_random_port('tcp://127.0.0.1')}"
