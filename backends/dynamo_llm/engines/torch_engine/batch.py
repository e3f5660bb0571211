"""The tokens of one step laid out flat, with the blocks they read and write. Built by the engine, read by the model."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from dynamo_llm.engines.torch_engine.scheduler import Work


@dataclass(frozen=True)
class Chunk:
    """Several tokens of one sequence: part of its prompt."""

    first: int
    """Where its tokens begin in the flat batch."""
    tokens: int
    sequence: int
    """Row of `Batch.block_tables`."""
    start: int
    """Position of its first token: so many tokens of context lie in the pool already."""


@dataclass(frozen=True)
class Batch:
    """Sequences with one token first (`decodes` of them), then the chunks."""

    token_ids: torch.Tensor
    """int64, shape [tokens]"""
    positions: torch.Tensor
    """int64, shape [tokens]"""
    slots: torch.Tensor
    """Where each token's keys and values go, block * block_size + offset: int64, shape [tokens]."""
    block_tables: torch.Tensor
    """int32, shape [sequences, width]; entries behind a sequence's last block are of no meaning."""
    decodes: int
    chunks: list[Chunk]
    last_tokens: torch.Tensor
    """Flat index of each sequence's last token: int64, shape [sequences]."""
    work: list[Work]
    """The sequences in the batch's order."""


def build_batch(work: Seq[Work], tables: npt.NDArray[np.int32], block_size: int, device: torch.device) -> Batch:
    """Lay out what the scheduler chose. `tables` holds the blocks of all running sequences by `Sequence.row`."""
    ordered = sorted(work, key=_is_chunk)
    counts = np.array([item.tokens for item in ordered])
    starts = np.array([item.sequence.computed for item in ordered])
    ends = np.cumsum(counts)
    owner = np.repeat(np.arange(len(ordered)), counts)
    positions = np.arange(ends[-1]) + (starts - ends + counts)[owner]
    width = int(positions.max()) // block_size + 1
    block_tables = tables[[item.sequence.row for item in ordered], :width]
    slots = block_tables[owner, positions // block_size].astype(np.int64) * block_size + positions % block_size
    decodes = sum(not _is_chunk(item) for item in ordered)
    return Batch(
        token_ids=torch.from_numpy(_token_ids(ordered)).to(device),
        positions=torch.from_numpy(positions).to(device),
        slots=torch.from_numpy(slots).to(device),
        block_tables=torch.from_numpy(block_tables).to(device),
        decodes=decodes,
        chunks=[
            Chunk(int(ends[i] - counts[i]), int(counts[i]), i, int(starts[i])) for i in range(decodes, len(ordered))
        ],
        last_tokens=torch.from_numpy(ends - 1).to(device),
        work=ordered,
    )


def _is_chunk(item: Work) -> bool:
    return item.tokens > 1


def _token_ids(ordered: list[Work]) -> npt.NDArray[np.int64]:
    ids: list[int] = []
    for item in ordered:
        sequence = item.sequence
        if item.tokens == 1:
            ids.append(sequence.tokens[sequence.computed])
        else:
            ids.extend(sequence.tokens[sequence.computed : sequence.computed + item.tokens])
    return np.array(ids, dtype=np.int64)
