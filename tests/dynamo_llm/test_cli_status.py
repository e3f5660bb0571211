"""`dynamo-llm status` over a small real HTTP server that answers as a router does."""

import json
import socket
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from dynamo_llm.cli import main

STATUS: dict[str, Any] = {
    "version": "0.1.0",
    "ready": True,
    "namespace": "default",
    "policy": "kv",
    "redis_connected": False,
    "inflight": 3,
    "instances": [
        {
            "instance": "00000000000000a1",
            "model": "demo",
            "role": "agg",
            "engine": "torch",
            "address": "127.0.0.1:8101",
            "connected": True,
            "ready": True,
            "error": None,
            "inflight": 3,
            "kv_blocks_used": 11,
            "kv_blocks_cached": 22,
            "kv_blocks_total": 2048,
            "load": {"running": 2, "waiting": 1},
            "load_age_s": 0.1,
        },
        {
            "instance": "00000000000000a2",
            "model": "demo",
            "role": "agg",
            "engine": "torch",
            "address": "127.0.0.1:8102",
            "connected": False,
            "ready": False,
            "error": "refused",
            "inflight": 0,
            "kv_blocks_used": 0,
            "kv_blocks_cached": 0,
            "kv_blocks_total": 512,
            "load": None,
            "load_age_s": None,
        },
    ],
    "models": [
        {
            "model": "demo",
            "instances": 2,
            "block_size": 16,
            "max_context": 4096,
            "index": {
                "blocks": 33,
                "instances": 2,
                "unsynced": 0,
                "lag_s": 0.0042,
                "lag_entries": 7,
                "gaps": 5,
                "resyncs": 6,
            },
        }
    ],
}


class Router:
    """Answers `/status` with `answer`."""

    def __init__(self) -> None:
        self.answer: tuple[int, bytes] = (200, json.dumps(STATUS).encode())
        router = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, body = router.answer if self.path == "/status" else (404, b"{}")
                self.send_response(status)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"


@pytest.fixture
def router() -> Iterator[Router]:
    router = Router()
    thread = threading.Thread(target=router.server.serve_forever, args=(0.01,))
    thread.start()
    yield router
    router.server.shutdown()
    router.server.server_close()
    thread.join()


def _status(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["dynamo-llm", "status", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_the_table_shows_instances_and_index(
    router: Router, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A row for each instance with its load and blocks, one for the model's index, and the state of Redis."""
    assert _status(monkeypatch, "--url", router.url + "/") == 0
    lines = capsys.readouterr().out.splitlines()
    first = next(line for line in lines if "00000000000000a1" in line)
    assert " ".join(first.split()) == "00000000000000a1 demo agg torch 127.0.0.1:8101 ready 3 2/1 11/22/2,048"
    second = next(line for line in lines if "00000000000000a2" in line)
    assert "not connected: refused" in second
    index = next(line for line in lines if line.split()[:1] == ["demo"])
    assert " ".join(index.split()) == "demo 2 16 33 4.2 7 5 6 0"
    assert "Redis lost" in lines[0]


def test_json_is_the_router_s_own_document(
    router: Router, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--json` leaves nothing out and adds nothing."""
    assert _status(monkeypatch, "--url", router.url, "--json") == 0
    assert json.loads(capsys.readouterr().out) == STATUS


def test_an_empty_cluster_is_said_to_be_empty(
    router: Router, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No instance and no model: a sentence instead of an empty table."""
    router.answer = 200, json.dumps({**STATUS, "instances": [], "models": []}).encode()
    assert _status(monkeypatch, "--url", router.url) == 0
    out = capsys.readouterr().out
    assert "no instance is registered" in out
    assert "no model is served" in out


def test_where_no_router_answers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One line with the address and the reason, exit code 1."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert _status(monkeypatch, "--url", f"http://127.0.0.1:{port}") == 1
    captured = capsys.readouterr()
    assert captured.err == f"dynamo-llm: no router answers at http://127.0.0.1:{port}: Connection refused\n"
    assert captured.out == ""


@pytest.mark.parametrize("answer", [(404, b""), (200, b"<html>"), (200, b"[]"), (200, b"{}")])
def test_what_is_no_router(
    answer: tuple[int, bytes], router: Router, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another server on the port gets one line, not a traceback."""
    router.answer = answer
    assert _status(monkeypatch, "--url", router.url) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert router.url in line


def test_a_url_that_is_none(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A host without a scheme gets one line too."""
    assert _status(monkeypatch, "--url", "localhost:8000") == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
