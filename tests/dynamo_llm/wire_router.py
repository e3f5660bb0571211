"""What a router does on the wire, by hand: one session and its control calls (design contract 5)."""

import asyncio
from typing import Any

import grpc
from scripted_engine import tokens
from tritonclient.grpc import service_pb2, service_pb2_grpc

from kvstore import wire
from kvstore.wire import Command, ControlBatch, Done, Frame, OpenSession, SamplingParams, Submit


def request(model: str, payload: bytes) -> Any:
    """A KServe request with one UINT8 tensor."""
    made = service_pb2.ModelInferRequest(model_name=model)
    tensor = made.inputs.add()
    tensor.name, tensor.datatype = wire.PAYLOAD, "UINT8"
    tensor.shape.append(len(payload))
    made.raw_input_contents.append(payload)
    return made


class Router:
    """A session of a model, over a channel of its own."""

    def __init__(self, address: str, session: str, model: str = "demo") -> None:
        self.session = session
        self._model = model
        self.channel = grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self.channel)
        self._stream: Any = None

    async def open(self, payload: bytes | None = None) -> None:
        self._stream = self._stub.ModelStreamInfer()
        opening = payload if payload is not None else wire.encode(OpenSession(self.session))
        await self._stream.write(request(self._model + wire.SESSION_SUFFIX, opening))
        await self._stream.done_writing()

    async def frame(self) -> Frame:
        message = await asyncio.wait_for(self._stream.read(), 10.0)
        if message is grpc.aio.EOF:
            raise EOFError
        if message.error_message:
            raise RuntimeError(message.error_message)
        if not message.infer_response.raw_output_contents:
            return await self.frame()
        return wire.decode_frame(message.infer_response.raw_output_contents[0])

    async def read_to_end(self) -> str | None:
        """The reason in the last frame."""
        reason = None
        while True:
            try:
                reason = (await self.frame()).end
            except EOFError:  # noqa: PERF203 - the end of the stream
                return reason

    async def control(self, *commands: Command) -> list[wire.Reply]:
        return await self.control_raw(wire.encode(ControlBatch(self.session, list(commands))))

    async def control_raw(self, payload: bytes) -> list[wire.Reply]:
        response = await self._stub.ModelInfer(request(self._model + wire.CONTROL_SUFFIX, payload), timeout=10.0)
        return wire.decode_reply(response.raw_output_contents[0]).replies

    async def run(self, *commands: Submit) -> dict[int, list[int]]:
        """Submit in one batch and read until all have ended."""
        assert await self.control(*commands) == [Done()] * len(commands)
        got: dict[int, list[int]] = {command.rid: [] for command in commands}
        ended = set()
        while len(ended) < len(commands):
            for output in (await self.frame()).outputs:
                assert output.rid not in ended
                got[output.rid] += output.token_ids
                if output.finish_reason is not None:
                    ended.add(output.rid)
        return got


def submit(rid: int, last: int = 10, max_tokens: int | None = 5) -> Submit:
    return Submit(rid=rid, token_ids=tokens(1, last), sampling=SamplingParams(max_tokens=max_tokens))
