"""A pool of KV blocks in plain memory with its `KvTransfer`: what an engine would hold."""

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from dynamo_llm.transfer import KvTransfer, Layout, TransferError
from dynamo_llm.transfer.pull import Pull

SHAPE = {"layers": 2, "kv_heads": 2, "head_dim": 8}


def make_layout(*, blocks: int = 64, block_size: int = 16, address: int = 1 << 20, **rest: Any) -> Layout:
    """Of a small model in float32; `rest` overrides any field."""
    fields: dict[str, Any] = {"model": "m", "dtype": "float32", **SHAPE, **rest}
    floats = fields["layers"] * 2 * fields["kv_heads"] * block_size * fields["head_dim"]
    fields.setdefault("block_bytes", floats * 4)
    return Layout(blocks=blocks, block_size=block_size, address=address, **fields)


class Heard:
    """What a pull has said so far."""

    def __init__(self) -> None:
        self.error: TransferError | None = None
        self.words: list[str] = []
        self._done, self._settled = threading.Event(), threading.Event()

    def on_done(self, error: TransferError | None) -> None:
        self.error = error
        self.words.append("done")
        self._done.set()

    def on_settled(self) -> None:
        self.words.append("settled")
        self._settled.set()

    @property
    def settled(self) -> bool:
        return self._settled.is_set()

    def reason(self) -> str | None:
        """Waits until it is done: why it failed, None after a success."""
        assert self._done.wait(30), "the pull is not done"
        return None if self.error is None else self.error.reason

    def wait_settled(self) -> None:
        assert self._settled.wait(30), "the pull is not settled"


class Pool:
    """Block b of a pool that was filled holds the numbers `seed + b * floats + 0, 1, 2, …`."""

    def __init__(self, name: str = "reader-1", *, blocks: int = 64, slots: int | None = None, **layout: Any) -> None:
        probe = make_layout(blocks=blocks, **layout)
        self.data = np.zeros((blocks, probe.block_bytes // 4), dtype=np.float32)
        layout["address"] = self.data.ctypes.data
        self.freed: list[str] = []
        self._on_free = threading.Condition()
        self.transfer = KvTransfer(name, make_layout(blocks=blocks, **layout), self._free, slots=slots)

    def fill(self, seed: int) -> None:
        self.data[:] = pattern(self.data.shape, seed)

    def pull(
        self, params: dict[str, Any], local: Sequence[int], *, skip: int = 0, timeout_s: float = 30.0
    ) -> tuple[Pull, Heard]:
        heard = Heard()
        pull = self.transfer.puller.start(
            params, local, skip=skip, timeout_s=timeout_s, on_done=heard.on_done, on_settled=heard.on_settled
        )
        return pull, heard

    def wait_freed(self, request_id: str, timeout_s: float = 30.0) -> bool:
        with self._on_free:
            return self._on_free.wait_for(lambda: request_id in self.freed, timeout_s)

    def close(self) -> None:
        self.transfer.close()

    def _free(self, request_id: str, blocks: tuple[int, ...]) -> None:
        with self._on_free:
            self.freed.append(request_id)
            self._on_free.notify_all()


def pattern(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Numbers that float32 holds exactly."""
    return ((np.arange(np.prod(shape)) + seed * 7919) % (1 << 22)).astype(np.float32).reshape(shape)
