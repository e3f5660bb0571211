"""What stands around the transfers: the missing package, metrics, and the thread's own death."""

import builtins
import logging
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from pools import Pool, make_layout
from prometheus_client import generate_latest

from dynamo_llm.transfer import KvTransfer, TransferError
from dynamo_llm.transfer.layout import Layout


def test_without_the_package_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """It names the extra to install."""
    real = builtins.__import__

    def without_nixl(name: str, *args: Any, **named: Any) -> Any:
        if name.startswith("nixl"):
            raise ImportError(name)
        return real(name, *args, **named)

    monkeypatch.setattr(builtins, "__import__", without_nixl)
    with pytest.raises(TransferError, match=r"needs nixl: pip install 'dynamo-llm\[nixl\]'") as refusal:
        KvTransfer("a-1", make_layout(), lambda request_id, blocks: None)
    assert refusal.value.reason == "missing"


def test_nixl_is_imported_when_an_agent_is_made() -> None:
    """Not with the package: a worker that moves no blocks pays nothing."""
    code = "import sys, dynamo_llm.transfer as t; print([n for n in sys.modules if n.startswith(('nixl', 'torch'))])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert shown.stdout.strip() == "[]"


def test_importing_nixl_leaves_our_logging_alone(make_pool: Callable[..., Pool]) -> None:
    """It would switch the reports of failing log handlers off for the whole process."""
    before = logging.raiseExceptions
    make_pool()
    assert logging.raiseExceptions == before


def test_figures(make_pool: Callable[..., Pool]) -> None:
    """Every family, with what has happened."""
    pool, writer = make_pool(), make_pool(name="writer-1")
    pool.transfer.add_peer("writer-1", writer.transfer.metadata)
    assert pool.pull(writer.transfer.exporter.pin("a", [1, 2], 60), [1, 2])[1].reason() is None
    writer.wait_freed("a")
    writer.transfer.exporter.pin("b", [1, 2, 3], 60)
    with pytest.raises(TransferError):
        pool.pull({}, [1])
    shown = generate_latest(pool.transfer.metrics.registry).decode()
    pulled = float(2 * pool.transfer.layout.block_bytes)
    for line in (
        f'dynamo_llm_worker_kv_transfer_bytes_total{{model="m"}} {pulled}',
        'dynamo_llm_worker_kv_transfer_failures_total{model="m",reason="params"} 1.0',
        'dynamo_llm_worker_kv_transfer_seconds_count{model="m"} 1.0',
        'dynamo_llm_worker_kv_transfers_running{model="m"} 0.0',
        'dynamo_llm_worker_kv_transfers_unsettled{model="m"} 0.0',
    ):
        assert line in shown
    shown = generate_latest(writer.transfer.metrics.registry).decode()
    for line in (
        'dynamo_llm_worker_kv_pins{model="m"} 1.0',
        'dynamo_llm_worker_kv_blocks_pinned{model="m"} 3.0',
        'dynamo_llm_worker_kv_pins_expired_total{model="m"} 0.0',
    ):
        assert line in shown


def test_a_broken_thread_answers_everything(
    make_pool: Callable[..., Pool], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever ends the transfer's thread: pulls fail, pins are given back, and nothing new is taken."""
    pool, writer = make_pool(), make_pool(name="writer-1")
    pool.transfer.add_peer("writer-1", writer.transfer.metadata)
    params = writer.transfer.exporter.pin("a", [1], 60)
    pool.transfer.exporter.pin("own", [1], 60)

    def broken(*args: Any) -> None:
        raise ZeroDivisionError("boom")

    monkeypatch.setattr(pool.transfer.puller, "_continue", broken)
    _, heard = pool.pull(params, [0])
    assert heard.reason() == "nixl"
    assert "boom" in str(heard.error)
    assert pool.wait_freed("own")
    with pytest.raises(TransferError):
        pool.pull(params, [0])
    assert "the transfer of KV blocks has failed" in caplog.text


def test_an_impossible_layout_is_refused() -> None:
    """Before any agent is made."""
    layout: Layout = make_layout(block_bytes=7)
    with pytest.raises(TransferError, match="7 bytes a block"):
        KvTransfer("a-1", layout, lambda request_id, blocks: None)
