"""Which bytes become whose: plans and descriptors against a plain numpy model of the pools."""

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pools import make_layout

from dynamo_llm.transfer.errors import TransferError
from dynamo_llm.transfer.layout import Layout, descriptors, make_plan, select

READER_AT, WRITER_AT = 1 << 20, 1 << 40


@st.composite
def pulls(draw: st.DrawFn) -> dict[str, Any]:
    """Two pools, and blocks of a sequence in them."""
    unit = draw(st.sampled_from([1, 4, 16]))
    factor = draw(st.sampled_from([1, 2, 4]))
    sizes = draw(st.permutations([unit, unit * factor]))
    dims = {"layers": draw(st.integers(1, 3)), "kv_heads": draw(st.integers(1, 3)), "head_dim": draw(st.integers(1, 3))}
    reader = make_layout(blocks=draw(st.integers(4, 12)), block_size=sizes[0], address=READER_AT, **dims)
    writer = make_layout(blocks=draw(st.integers(4, 12)), block_size=sizes[1], address=WRITER_AT, **dims)
    remote = draw(st.lists(st.integers(0, writer.blocks - 1), unique=True, min_size=1))
    blocks = -(-len(remote) * writer.block_size // reader.block_size)
    skip = draw(st.integers(0, min(blocks - 1, 3)))
    wanted = min(blocks - skip, reader.blocks)
    local = draw(st.permutations(range(reader.blocks)))[: draw(st.integers(1, wanted))]
    return {"reader": reader, "writer": writer, "remote": remote, "local": local, "skip": skip}


def tokens_of(data: np.ndarray, layout: Layout, blocks: list[int]) -> np.ndarray:
    """[tokens, layers, 2, kv_heads, head_dim] of the blocks in their order."""
    shape = (layout.blocks, layout.layers, 2, layout.kv_heads, layout.block_size, layout.head_dim)
    chosen = data.view(np.float32).reshape(shape)[blocks]
    return np.moveaxis(chosen, 4, 1).reshape(-1, layout.layers, 2, layout.kv_heads, layout.head_dim)


@given(pull=pulls(), most_bytes=st.integers(1, 4096))
def test_descriptors_move_the_right_tokens(pull: dict[str, Any], most_bytes: int) -> None:
    """Whatever the block sizes: token t of the local blocks is token t + skip of the remote ones, all else is left."""
    reader, writer, local, skip = pull["reader"], pull["writer"], pull["local"], pull["skip"]
    source = np.random.default_rng(0).integers(0, 256, writer.pool_bytes, dtype=np.uint8)
    target = np.zeros(reader.pool_bytes, dtype=np.uint8)
    selection = select(make_plan(reader, writer), local, pull["remote"], skip=skip)
    moved = 0
    for here, there in descriptors(selection, most_bytes):
        assert np.array_equal(here[:, 1], there[:, 1])
        for (to, length), (start, _) in zip((here).tolist(), there.tolist(), strict=True):
            assert READER_AT <= to <= to + length <= READER_AT + len(target)
            target[to - READER_AT :][:length] = source[start - WRITER_AT :][:length]
            moved += length
    assert moved == selection.bytes
    wanted = tokens_of(source, writer, pull["remote"])[skip * reader.block_size :]
    wanted = wanted[: len(local) * reader.block_size]
    got = tokens_of(target, reader, local)
    assert got[: len(wanted)].tobytes() == wanted.tobytes()
    assert not got[len(wanted) :].view(np.uint8).any()
    assert not tokens_of(target, reader, [b for b in range(reader.blocks) if b not in local]).view(np.uint8).any()


def test_runs_are_one_descriptor() -> None:
    """Blocks that follow each other on both sides merge, in whatever order they were named."""
    plan = make_plan(make_layout(address=READER_AT), make_layout(address=WRITER_AT))
    (here, there), *rest = descriptors(select(plan, [7, 5, 6, 20], [12, 10, 11, 30]), 1 << 30)
    size = plan.reader.block_bytes
    assert rest == []
    assert here.tolist() == [[READER_AT + 5 * size, 3 * size], [READER_AT + 20 * size, size]]
    assert there.tolist() == [[WRITER_AT + 10 * size, 3 * size], [WRITER_AT + 30 * size, size]]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"model": "other"}, "the models differ: 'other' there, 'm' here"),
        ({"dtype": "bfloat16", "block_bytes": 2048}, "the dtypes differ"),
        ({"layers": 3}, "numbers of layers differ: 3 there, 2 here"),
        ({"kv_heads": 1}, "numbers of KV heads differ"),
        ({"head_dim": 16}, "head dimensions differ"),
        ({"tp_size": 2}, "tensor-parallel sizes differ: 2 there, 1 here"),
        ({"block_size": 24}, "neither divides the other: 24 tokens there, 16 here"),
        ({"version": 2}, "layout version 2"),
        ({"kind": "layer-block-token"}, "blocks lie as 'layer-block-token'"),
        ({"dtype": "int3"}, "dtype 'int3' is none of"),
        ({"block_bytes": 5}, "5 bytes a block do not follow"),
        ({"blocks": 0}, "out of range"),
        ({"tp_rank": 1}, "out of range"),
        ({"blocks": 1 << 60}, "beyond the address space"),
        ({"device": "tpu"}, "neither cpu nor cuda:N"),
    ],
)
def test_what_is_not_converted_is_refused(change: dict[str, Any], text: str) -> None:
    """In one line that says what differs."""
    with pytest.raises(TransferError, match=text) as refusal:
        make_plan(make_layout(), make_layout(**change))
    assert refusal.value.reason == "layout"
    assert "\n" not in str(refusal.value)


def test_memory_of_a_device() -> None:
    """NIXL's words for where a pool lies."""
    assert make_layout().memory == ("DRAM", 0)
    assert make_layout(device="cuda:3").memory == ("VRAM", 3)
    assert make_layout(device="cuda").memory == ("VRAM", 0)


def test_too_many_pieces_are_refused() -> None:
    """A conversion that falls into millions of pieces is no transfer any more."""
    dims = {"layers": 100, "kv_heads": 16, "head_dim": 1}
    plan = make_plan(make_layout(blocks=1000, block_size=16, **dims), make_layout(blocks=1000, block_size=8, **dims))
    with pytest.raises(TransferError, match="pieces; use equal block sizes"):
        select(plan, list(range(500)), list(range(1000)))


def test_a_layout_travels() -> None:
    """Through msgpack and back."""
    layout = make_layout(device="cuda:1", tp_rank=1, tp_size=2)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(layout), type=Layout) == layout
