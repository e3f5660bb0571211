"""Pools with real NIXL: one in the test's process, others in processes of their own."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for `pools` and `peer_process`

from peer_process import Peer
from pools import Pool


@pytest.fixture
def make_pool() -> Iterator[Callable[..., Pool]]:
    """A pool of the test's own; see `Pool` for the arguments."""
    pools: list[Pool] = []

    def make(**options: Any) -> Pool:
        pools.append(Pool(**options))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


@pytest.fixture
def make_peer() -> Iterator[Callable[..., Peer]]:
    """A pool in another process; see `Peer`."""
    peers: list[Peer] = []

    def make(**options: Any) -> Peer:
        peers.append(Peer(**options))
        return peers[-1]

    yield make
    for peer in peers:
        peer.kill()
