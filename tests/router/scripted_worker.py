"""A worker that speaks the router's wire over a real gRPC server and says what a test tells it to.

It stands below the boundary that we own (`kvstore.wire`): registration, KV events and transport are the real ones.
"""

import asyncio
from array import array
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import msgspec
from tritonclient.grpc import service_pb2, service_pb2_grpc

from kvstore import model_files, wire
from kvstore.cards import InstanceCard, Role, Stored
from kvstore.events import EventPublisher
from kvstore.hashing import block_hashes, root_seed
from kvstore.keys import Keys
from kvstore.registry import Registry
from kvstore.text import Tokenizer

MODEL_FOLDER = Path(__file__).parents[2] / "model_repository" / "demo" / "1" / "model"
FILES = model_files.read(MODEL_FOLDER)
TOKENIZER = Tokenizer.from_files(FILES)
MODEL = "demo"
BLOCK_SIZE = 16
MAX_CONTEXT = 2048
EOS = 1


def ids_of(text: str) -> list[int]:
    """Token ids of a text, without special tokens."""
    return array("I", TOKENIZER.encode(text, add_special_tokens=False)).tolist()


def prompt_of(submit: wire.Submit) -> list[int]:
    return array("I", submit.token_ids).tolist()


Script = Callable[["ScriptedWorker", wire.Submit], None]


def says(text: str, per_frame: int = 1, finish: wire.FinishReason = "stop", until: int | None = None) -> Script:
    """Answer each request with a text, so many tokens to a frame; `until`: fall silent after so many tokens.

    What the prompt already ends with (after a migration) is not said again.
    """

    def script(worker: "ScriptedWorker", submit: wire.Submit) -> None:
        tokens = ids_of(text) + ([EOS] if finish == "stop" else [])
        done = worker.already_said(submit, tokens)
        tokens = tokens[done : until if until is None else max(until, done)]
        logprobs = submit.sampling.logprobs
        for at in range(0, len(tokens), per_frame):
            part = tokens[at : at + per_frame]
            last = until is None and at + per_frame >= len(tokens)
            worker.emit(
                wire.Output(
                    submit.rid,
                    part,
                    finish_reason=finish if last else None,
                    logprobs=None if logprobs is None else [_logprob(t, logprobs) for t in part],
                    started=worker.started(submit) if at == 0 else None,
                )
            )

    return script


def _logprob(token: int, top: int) -> wire.TokenLogprob:
    return wire.TokenLogprob(token, -0.5, [(token, -0.5), (token + 1, -1.5), (token + 2, float("-inf"))][:top])


def refuses(code: wire.ErrorCode, message: str = "no") -> Script:
    """Refuse each request."""

    def script(worker: "ScriptedWorker", submit: wire.Submit) -> None:
        raise Refusal(wire.WireError(code, message))

    return script


def refuses_late(code: wire.ErrorCode, message: str = "no") -> Script:
    """Accept each request and then refuse it after all, as an engine in a process of its own does."""

    def script(worker: "ScriptedWorker", submit: wire.Submit) -> None:
        worker.emit(wire.Output(submit.rid, [], "error", error=wire.WireError(code, message)))

    return script


def silent(worker: "ScriptedWorker", submit: wire.Submit) -> None:
    """Accept requests and say nothing."""


class Refusal(Exception):
    def __init__(self, error: wire.WireError) -> None:
        self.error = error


class ScriptedWorker(service_pb2_grpc.GRPCInferenceServiceServicer):
    """One instance. Everything that arrives is kept for the test to look at."""

    def __init__(
        self,
        instance: str,
        script: Script = silent,
        model: str = MODEL,
        block_size: int = BLOCK_SIZE,
        files: Mapping[str, bytes] = FILES,
        role: Role = "agg",
        prefill_queue: bool = False,
        kv_events: bool = True,
    ) -> None:
        self.instance = instance
        self.script = script
        self.model = model
        self.block_size = block_size
        self.files = files
        self.role: Role = role
        self.prefill_queue = prefill_queue
        self.kv_events = kv_events
        self.submits: list[wire.Submit] = []
        self.cancels: list[int] = []
        self.batches: list[wire.ControlBatch] = []
        self.sessions: list[str] = []
        self.load = wire.Load()
        self.cached_tokens = 0
        self.hold_control: asyncio.Event | None = None
        """While it is set to an unset event, control calls wait."""
        self._frames: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._server: grpc.aio.Server | None = None
        self._stack = AsyncExitStack()
        self._publisher: EventPublisher | None = None
        self.lease: Any = None
        self.address = ""

    async def start(self) -> "ScriptedWorker":
        self._server = grpc.aio.server()
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, self._server)
        port = self._server.add_insecure_port("127.0.0.1:0")
        self.address = f"127.0.0.1:{port}"
        await self._server.start()
        return self

    async def register(self, registry: Registry, keys: Keys) -> "ScriptedWorker":
        """Announce it, and begin to publish KV events."""
        blob = await registry.put_blob(model_files.pack(self.files))
        self.lease = await registry.register(self.card(blob, keys.namespace))
        self._stack.push_async_callback(self.lease.close)
        self._publisher = await self._stack.enter_async_context(
            EventPublisher(
                registry.redis,
                keys,
                instance=self.instance,
                epoch=1,
                model=self.model,
                block_size=self.block_size,
                heartbeat_s=0.2,
            )
        )
        return self

    def card(self, blob: str = "0" * 64, namespace: str = "default") -> InstanceCard:
        return InstanceCard(
            instance=self.instance,
            namespace=namespace,
            model=self.model,
            role=self.role,
            prefill_queue=self.prefill_queue,
            kv_events=self.kv_events,
            grpc_address=self.address,
            engine="scripted",
            block_size=self.block_size,
            kv_blocks=256,
            max_context=MAX_CONTEXT,
            model_files=blob,
            epoch=1,
        )

    async def change_role(self, role: Role) -> None:
        """Announce another role, as the same instance."""
        self.role = role
        await self.lease.update(msgspec.structs.replace(self.lease.card, role=role))

    async def kill(self) -> None:
        """Die without a word: connections are cut."""
        if self._server is not None:
            await self._server.stop(None)

    async def close(self) -> None:
        await self._stack.aclose()
        self._frames.put_nowait(None)
        if self._server is not None:
            await self._server.stop(0.5)

    # --- what tests do ---

    def emit(self, *outputs: wire.Output) -> None:
        """One frame."""
        self._frames.put_nowait(wire.encode(wire.Frame(1, list(outputs), self.load)))

    def emit_raw(self, frame: bytes) -> None:
        self._frames.put_nowait(frame)

    def end_session(self, reason: str) -> None:
        self._frames.put_nowait(wire.encode(wire.Frame(1, [], self.load, reason)))
        self._frames.put_nowait(None)

    def started(self, submit: wire.Submit) -> wire.Started:
        prompt_logprobs = None
        if submit.sampling.prompt_logprobs is not None:
            tokens = prompt_of(submit)
            prompt_logprobs = [None, *(_logprob(t, submit.sampling.prompt_logprobs) for t in tokens[1:])]
        return wire.Started(self.cached_tokens, 1.0, prompt_logprobs)

    def already_said(self, submit: wire.Submit, tokens: list[int]) -> int:
        """How many of `tokens` the prompt ends with."""
        prompt = prompt_of(submit)
        return next((n for n in range(len(tokens), 0, -1) if prompt[-n:] == tokens[:n]), 0)

    def store(self, token_ids: bytes, cache_salt: str = "") -> int:
        """Publish that it holds the whole blocks of a prompt; how many."""
        seed = root_seed(self.model, "", cache_salt)
        hashes = block_hashes(token_ids, self.block_size, seed=seed).tolist()
        assert self._publisher is not None
        self._publisher.publish([Stored(None, hashes)])
        return len(hashes)

    # --- Triton ---

    async def ServerReady(self, request: Any, context: Any) -> Any:
        return service_pb2.ServerReadyResponse(ready=True)

    async def ModelStreamInfer(self, requests: Any, context: Any) -> Any:
        async for request in requests:
            assert request.model_name == self.model + wire.SESSION_SUFFIX
            self.sessions.append(wire.decode_open(request.raw_input_contents[0]).session)
        frames = self._frames = asyncio.Queue()
        frames.put_nowait(wire.encode(wire.Frame(1, [], self.load)))
        while (frame := await frames.get()) is not None:
            inner = service_pb2.ModelInferResponse(raw_output_contents=[frame])
            yield service_pb2.ModelStreamInferResponse(infer_response=inner)

    async def ModelInfer(self, request: Any, context: Any) -> Any:
        assert request.model_name == self.model + wire.CONTROL_SUFFIX
        batch = wire.decode_batch(request.raw_input_contents[0])
        self.batches.append(batch)
        if self.hold_control is not None:
            await self.hold_control.wait()
        replies = [self._carry_out(command) for command in batch.commands]
        return service_pb2.ModelInferResponse(raw_output_contents=[wire.encode(wire.ControlReply(replies))])

    def _carry_out(self, command: wire.Command) -> wire.Reply:
        if isinstance(command, wire.Submit):
            self.submits.append(command)
            try:
                self.script(self, command)
            except Refusal as refusal:
                return wire.Refused(refusal.error)
        elif isinstance(command, wire.Cancel):
            self.cancels.append(command.rid)
        elif isinstance(command, wire.Snapshot):
            return self._publisher.snapshot() if self._publisher else wire.SnapshotReply(self.instance, 1, 0, [])
        elif isinstance(command, wire.Stats):
            return wire.StatsReply(self.instance, 1, self.load, draining=False)
        elif isinstance(command, wire.Close):
            self.end_session("closed")
        return wire.Done()
