"""Requests to simulate: a mix of chats and documents, or a trace. Both are requests in the Mooncake format."""

from pathlib import Path
from random import Random

from msgspec import Struct
from msgspec.structs import replace

from dynamo_llm.engines.mock_engine.trace import TraceRequest, read_trace

TRACE_BLOCK = 512


class Mix(Struct, frozen=True, kw_only=True):
    """Chats and documents, Poisson arrivals, no two prompts alike. Lengths are in tokens, drawn evenly from ranges."""

    documents: float = 0.3
    """Their share."""
    chat_tokens: tuple[int, int] = (300, 700)
    document_tokens: tuple[int, int] = (8000, 16000)
    output_tokens: tuple[int, int] = (100, 300)


def mixed(mix: Mix, count: int, seed: int) -> list[TraceRequest]:
    """One request a second on average; `at_rate` makes it another rate, of the same requests in the same order."""
    rng, now_ms, blocks = Random(seed), 0.0, 0
    requests = []
    for _ in range(count):
        now_ms += rng.expovariate(1.0) * 1e3
        length = rng.randint(*(mix.document_tokens if rng.random() < mix.documents else mix.chat_tokens))
        first, blocks = blocks, blocks - (-length // TRACE_BLOCK)
        requests.append(TraceRequest(now_ms, length, rng.randint(*mix.output_tokens), tuple(range(first, blocks))))
    return requests


def traced(path: Path, count: int | None) -> list[TraceRequest]:
    """The first `count` requests of a trace, all for None, in the order of their arrival. Raises `ValueError`."""
    requests = sorted(read_trace(path, TRACE_BLOCK), key=lambda request: request.timestamp)[:count]
    if len(requests) < 2:
        raise ValueError(f"{path} holds too few requests")
    return requests


def at_rate(requests: list[TraceRequest], rate: float) -> list[TraceRequest]:
    """The same requests, `rate` a second on average."""
    span_s = (requests[-1].timestamp - requests[0].timestamp) / 1e3
    stretch = len(requests) / max(span_s, 1e-9) / rate
    return [replace(request, timestamp=request.timestamp * stretch) for request in requests]
