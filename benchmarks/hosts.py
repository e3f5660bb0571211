"""What it costs to bring tokens from an engine to a router through Triton: each host, and a model without frames.

The hosts are PyTriton (`dynamo-llm worker`) and a tritonserver with our backend (`dynamo-llm tritonserver`), both with
the mock engine, and the router's own connection as the client. `raw` is a plain decoupled model on the same
tritonserver that sends each token in a response of its own. They are started and measured in turns, twice in each
round: with steps that take no time, which shows the most that a host can carry (frames hold several steps then), and
with steps of `--step-ms`, as an engine has them, which shows the cost of a step's tokens (one frame each).
"""

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import _packages  # noqa: F401 - first
import grpc
import numpy as np
import uvloop
from _hosts import COMMANDS, cpu_s, started
from tritonclient.grpc import service_pb2, service_pb2_grpc

from kvstore import wire
from kvstore.cards import InstanceCard
from kvstore.connect import connect
from kvstore.embedded import EmbeddedRedis
from kvstore.keys import Keys
from kvstore.registry import Registry
from router.worker_client import WorkerConnection, next_rid

CALLS = 300
"""Empty calls in a round."""


class Connection(WorkerConnection):
    """The router's own, with a count of what arrives."""

    frames = 0

    def on_frame(self, frame: wire.Frame, inflight: Any) -> None:
        self.frames += 1
        super().on_frame(frame, inflight)


class Sink:
    """Counts a request's tokens."""

    def __init__(self) -> None:
        self.tokens = 0
        self.first_s = 0.0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def on_output(self, output: wire.Output) -> None:
        self.first_s = self.first_s or time.perf_counter()
        self.tokens += len(output.token_ids)
        if output.finish_reason is not None:
            self.done.set_result(None)

    def on_refused(self, error: wire.WireError) -> None:
        self.done.set_exception(SystemExit(f"a request was refused: {error.message}"))

    def on_lost(self, reason: str) -> None:
        self.done.set_exception(SystemExit(f"a request was lost: {reason}"))

    on_failed = on_lost


def submit(connection: WorkerConnection, tokens: int) -> Sink:
    sink, prompt = Sink(), np.arange(1, 9, dtype="<u4").tobytes()
    sampling = wire.SamplingParams(max_tokens=tokens, ignore_eos=True)
    connection.submit(wire.Submit(rid=next_rid(), token_ids=prompt, sampling=sampling), sink)
    return sink


async def through_frames(connection: Connection, sequences: int, tokens: int) -> tuple[int, int]:
    """Tokens and frames of so many sequences at once."""
    frames = connection.frames
    sinks = [submit(connection, tokens) for _ in range(sequences)]
    await asyncio.gather(*(sink.done for sink in sinks))
    return sum(sink.tokens for sink in sinks), connection.frames - frames


async def through_responses(stub: Any, sequences: int, tokens: int, step_ms: float = 0.0) -> tuple[int, int]:
    """Tokens and responses of so many requests at once on the raw model, all on one stream."""
    stream = stub.ModelStreamInfer()
    for number in range(sequences):
        await stream.write(raw_request(number, tokens, step_ms))
    await stream.done_writing()
    received = 0
    while (message := await stream.read()) is not grpc.aio.EOF:
        if message.error_message:
            raise SystemExit(f"the raw model failed: {message.error_message}")
        received += len(message.infer_response.raw_output_contents)
    return received, received


def raw_request(number: int, tokens: int, step_ms: float) -> Any:
    request = service_pb2.ModelInferRequest(model_name="raw", id=str(number))
    tensor = request.inputs.add(name="tokens_and_step_us", datatype="INT32")
    tensor.shape.append(2)
    request.raw_input_contents.append(np.array([tokens, 1000 * step_ms], "<i4").tobytes())
    return request


async def round_trips_ms(call: Callable[[], Awaitable[Any]]) -> dict[str, float]:
    """Of calls one after the other."""
    times = []
    for _ in range(CALLS):
        began = time.perf_counter()
        await call()
        times.append(1e3 * (time.perf_counter() - began))
    times.sort()
    return {"p50": round(times[CALLS // 2], 3), "p99": round(times[CALLS * 99 // 100], 3)}


async def measure(
    run: Callable[[int, int], Awaitable[tuple[int, int]]], cpu: Callable[[], Counter[str]], sequences: int, tokens: int
) -> dict[str, Any]:
    """Warm up with a tenth, then run."""
    await run(sequences, max(1, tokens // 10))
    before, began = cpu(), time.perf_counter()
    got, messages = await run(sequences, tokens)
    wall_s, used = time.perf_counter() - began, cpu()
    if got != sequences * tokens:
        raise SystemExit(f"{got} tokens came instead of {sequences * tokens}")
    used.subtract(before)
    return {
        "tokens_per_s": round(got / wall_s),
        "messages_per_s": round(messages / wall_s),
        "tokens_per_message": round(got / messages, 1),
        "cpu_us_per_token": {name: round(1e6 * seconds / got, 2) for name, seconds in sorted(used.items())},
    }


# --- a round --------------------------------------------------------------------------------------------------------


async def our_round(root: int, address: str, redis: str, args: argparse.Namespace, step_ms: float) -> dict[str, Any]:
    async with connect(redis) as client:
        cards = await Registry(client, Keys()).instances()
    (card,) = [card for card in cards if card.grpc_address == address]
    changed = asyncio.Event()
    async with Connection(card, "benchmark", 20.0, 20.0, changed.set) as connection:
        while not connection.ready:
            await asyncio.wait_for(changed.wait(), 20)
            changed.clear()

        async def run(sequences: int, tokens: int) -> tuple[int, int]:
            return await through_frames(connection, sequences, tokens)

        async def one_token() -> None:
            await submit(connection, 1).done

        def cpu() -> Counter[str]:
            return cpu_s(root, card.pid)

        if step_ms:
            return {"paced": await measure(run, cpu, args.sequences, args.paced_tokens)}
        return {
            "empty_call_ms": await empty_calls_ms(card),
            "one_token_ms": await round_trips_ms(one_token),
            "one_sequence": await measure(run, cpu, 1, args.tokens),
            "many_sequences": await measure(run, cpu, args.sequences, args.tokens),
        }


async def empty_calls_ms(card: InstanceCard) -> dict[str, float]:
    """A control call without a command: all that a submit costs but the submit."""
    batch = wire.encode(wire.ControlBatch("benchmark", []))
    request = service_pb2.ModelInferRequest(model_name=(card.triton_model or card.model) + wire.CONTROL_SUFFIX)
    tensor = request.inputs.add(name=wire.PAYLOAD, datatype="UINT8")
    tensor.shape.append(len(batch))
    request.raw_input_contents.append(batch)
    async with grpc.aio.insecure_channel(card.grpc_address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        return await round_trips_ms(lambda: stub.ModelInfer(request))


async def raw_round(root: int, address: str, redis: str, args: argparse.Namespace, step_ms: float) -> dict[str, Any]:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)

        async def run(sequences: int, tokens: int) -> tuple[int, int]:
            return await through_responses(stub, sequences, tokens, step_ms)

        def cpu() -> Counter[str]:
            return cpu_s(root, 0)

        if step_ms:
            return {"paced": await measure(run, cpu, args.sequences, args.paced_tokens)}
        tokens = args.tokens // args.raw_share
        return {
            "one_token_ms": await round_trips_ms(lambda: through_responses(stub, 1, 1)),
            "one_sequence": await measure(run, cpu, 1, tokens),
            "many_sequences": await measure(run, cpu, args.sequences, tokens),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="how often each host is started and measured (default 3)")
    parser.add_argument("--sequences", type=int, default=32, help="sequences in a step (default 32)")
    parser.add_argument("--tokens", type=int, default=10000, help="tokens of each sequence (default 10000)")
    parser.add_argument(
        "--raw-share", type=int, default=10, help="the raw model gets 1/N of the tokens, it is slow (default 10)"
    )
    parser.add_argument("--step-ms", type=float, default=10.0, help="length of a paced step (default 10)")
    parser.add_argument(
        "--paced-tokens", type=int, default=600, help="tokens of each sequence in paced steps (default 600)"
    )
    parser.add_argument("--json", action="store_true", help="say nothing but the JSON")
    args = parser.parse_args()
    rounds: dict[str, list[dict[str, Any]]] = {host: [] for host in COMMANDS}
    with EmbeddedRedis(port=0) as redis:
        for number in range(args.rounds):
            for host in COMMANDS:
                if not args.json:
                    print(f"round {number + 1} of {args.rounds}: {host}", file=sys.stderr)
                run, found = raw_round if host == "raw" else our_round, {}
                for step_ms in (0.0, args.step_ms):
                    with started(host, redis.url, step_ms) as (root, fields):
                        found |= uvloop.run(run(root, fields["grpc"], redis.url, args, step_ms))
                rounds[host].append(found)
    print(json.dumps(summary(rounds), indent=2))


def summary(rounds: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians; how many times the raw model's tokens each host brings, and what share of its CPU time a token costs."""
    median = {host: merged(found) for host, found in rounds.items()}
    raw = median["raw"]
    ratios = {
        host: {
            "tokens_per_s": round(figures["many_sequences"]["tokens_per_s"] / raw["many_sequences"]["tokens_per_s"], 1),
            "cpu_per_token_paced": round(all_cpu(figures["paced"]) / all_cpu(raw["paced"]), 3),
        }
        for host, figures in median.items()
    }
    return {"median": median, "to_raw": ratios, "rounds": rounds}


def all_cpu(figures: dict[str, Any]) -> float:
    """Server, engine and client together."""
    return sum(figures["cpu_us_per_token"].values())


def merged(values: list[Any]) -> Any:
    """The median of each figure."""
    if isinstance(values[0], dict):
        return {name: merged([value[name] for value in values]) for name in values[0]}
    return round(statistics.median(values), 3)


if __name__ == "__main__":
    main()
