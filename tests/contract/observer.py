"""Looks at a worker from outside, by calls that block: also while the router under test is kept from running."""

import time
from collections.abc import Callable

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc
from wire_router import request

from kvstore import wire


class Observer:
    """Sends commands that need no session. A context manager."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def __enter__(self) -> "Observer":
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def ask(self, command: wire.Command) -> wire.Reply:
        batch = wire.encode(wire.ControlBatch("observer", [command]))
        response = self._stub.ModelInfer(request("demo.control", batch), timeout=10.0)
        (reply,) = wire.decode_reply(response.raw_output_contents[0]).replies
        return reply

    def load(self) -> wire.Load:
        """What the engine has to do now."""
        reply = self.ask(wire.Stats())
        assert isinstance(reply, wire.StatsReply)
        return reply.load

    @property
    def idle(self) -> bool:
        """Whether the engine has no request."""
        load = self.load()
        return load.running == load.waiting == 0

    def control_calls(self) -> int:
        """Calls of `M.control` that Triton has counted."""
        statistics = self._stub.ModelStatistics(service_pb2.ModelStatisticsRequest(name="demo.control"), timeout=10.0)
        return int(statistics.model_stats[0].inference_count)


def block_until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Wait without letting the event loop run: so a router is that has no time for its workers."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "the condition did not come true in time"
        time.sleep(0.005)
