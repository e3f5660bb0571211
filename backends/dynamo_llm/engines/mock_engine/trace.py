"""Requests of a trace in the Mooncake format: lengths, arrival and block hashes, no text. For simulators and tests.

One JSON object a line: `timestamp` (ms), `input_length`, `output_length` (tokens) and `hash_ids`, one for each block of
`trace_block_size` input tokens, the last one perhaps not whole; equal ids stand for equal prefixes.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from dynamo_llm.engines.mock_engine.sequence import MockSequence

_OUTPUT_BLOCKS = 1 << 20
"""More blocks than one answer has."""
_OWN = 1 << 63
"""Names from here on are of blocks with output in them, which no other request shares."""


class TraceSequence(MockSequence):
    """One request of a replay, in which `key` tells it from all others."""

    __slots__ = ()

    def name(self, index: int, parent: int | None) -> int:
        return _OWN + self.key * _OUTPUT_BLOCKS + index


class TraceRequest(Struct, frozen=True, gc=False):
    timestamp: Annotated[float, Meta(ge=0)]
    """Arrival, milliseconds."""
    input_length: Annotated[int, Meta(ge=1)]
    output_length: Annotated[int, Meta(ge=1)]
    hash_ids: tuple[Annotated[int, Meta(ge=0, lt=1 << 48)], ...]

    def chain(self, block_size: int, trace_block_size: int = 512) -> list[int]:
        """Names of the whole blocks of `block_size` in its input. Raises `ValueError` for one that does not fit."""
        if trace_block_size % block_size:
            raise ValueError(f"blocks of {block_size} tokens do not divide the trace's blocks of {trace_block_size}")
        parts = trace_block_size // block_size
        names = [block * parts + part for block in self.hash_ids for part in range(parts)]
        return names[: self.input_length // block_size]

    def sequence(self, key: int, block_size: int, trace_block_size: int = 512) -> TraceSequence:
        end = self.input_length + self.output_length
        return TraceSequence(key, self.input_length, end, self.chain(block_size, trace_block_size))


def read_trace(path: Path, trace_block_size: int = 512) -> Iterator[TraceRequest]:
    """In the order of the file. Raises `ValueError`, one line that names the file's line, for what is no such trace."""
    decode = msgspec.json.Decoder(TraceRequest).decode
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                request = decode(line)
            except msgspec.DecodeError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
            if len(request.hash_ids) * trace_block_size < request.input_length:
                raise ValueError(f"{path}, line {number}: too few hash_ids for {request.input_length} input tokens")
            yield request
