"""Connecting: every kind of URL, and one clear line for everything that can be wrong with it."""

import asyncio
from pathlib import Path

import pytest
from redis.asyncio import Redis

from kvstore.connect import connect
from kvstore.embedded import EmbeddedRedis
from kvstore.errors import StoreConfigError, StoreError, StoreRefused, StoreUnavailable

PASSWORD = "p@ss/w#rd"
QUOTED = "p%40ss%2Fw%23rd"


async def failure(url: str) -> StoreError:
    """The error that connecting ends in; it is one line and does not hold the password."""
    with pytest.raises(StoreError) as caught:
        async with connect(url, timeout_s=0.5):
            pass
    message = str(caught.value)
    assert "\n" not in message
    assert PASSWORD not in message
    assert QUOTED not in message
    return caught.value


async def test_password(redis_server: EmbeddedRedis) -> None:
    """The right password opens, a wrong one and none are told apart from an unreachable server."""
    with EmbeddedRedis(port=0, password=PASSWORD) as server:
        async with connect(server.url) as redis:
            assert await redis.ping()
        for url in (server.url.replace(QUOTED, "wrong"), server.url.replace(f":{QUOTED}@", "")):
            error = await failure(url)
            assert isinstance(error, StoreRefused)
            assert "password" in str(error)
    error = await failure(redis_server.url.replace("redis://", f"redis://user:{QUOTED}@"))
    assert isinstance(error, StoreRefused)


async def test_unix_socket_with_password() -> None:
    """A unix socket takes its password and database from the query."""
    with EmbeddedRedis(password=PASSWORD) as server:
        assert server.url.startswith("unix://")
        async with connect(f"{server.url}&db=3") as redis:
            await redis.set("here", 1)
        async with connect(server.url) as redis:
            assert await redis.get("here") is None


async def test_database(redis_server: EmbeddedRedis) -> None:
    """The path of the URL chooses the database; one that does not exist is refused."""
    base = redis_server.url.removesuffix("/0")
    async with connect(f"{base}/2") as redis:
        await redis.set("here", 1)
    async with connect(base) as redis:
        assert await redis.get("here") is None
    assert isinstance(await failure(f"{base}/99"), StoreError)


async def test_reply_shape_is_ours(redis_url: str) -> None:
    """Options of the URL that would change what commands return are overruled."""
    async with connect(f"{redis_url}?protocol=3&decode_responses=True") as redis:
        await redis.set("name", "value")
        assert await redis.get("name") == b"value"


async def test_nobody_there(tmp_path: Path) -> None:
    """A refused connection and a missing socket say what to do."""
    server = EmbeddedRedis(port=0)
    error = await failure(server.url.replace("redis://", f"redis://:{QUOTED}@"))
    assert isinstance(error, StoreUnavailable)
    assert (
        str(error) == f"Redis at {server.url.removesuffix('/0')} refused the connection: start it or pass --redis URL"
    )
    error = await failure(f"unix://{tmp_path}/none.sock")
    assert isinstance(error, StoreUnavailable)
    assert "no socket" in str(error)


async def test_silent_server() -> None:
    """A server that accepts and says nothing is given up after the timeout."""
    held = []
    silent = await asyncio.start_server(lambda _, writer: held.append(writer), "127.0.0.1", 0)
    port = silent.sockets[0].getsockname()[1]
    error = await failure(f"redis://127.0.0.1:{port}")
    assert isinstance(error, StoreUnavailable)
    assert "in time" in str(error)
    for writer in held:
        writer.close()
    silent.close()
    await silent.wait_closed()


async def test_tls_to_a_plain_server(redis_server: EmbeddedRedis) -> None:
    """TLS to a server without it is an error, not a hang."""
    error = await failure(redis_server.url.replace("redis://", "rediss://") + "?ssl_cert_reqs=none")
    assert isinstance(error, StoreUnavailable)


@pytest.mark.parametrize(
    ("url", "word"),
    [
        ("http://localhost", "redis://"),
        ("localhost:6379", "redis://"),
        (f"redis://:{QUOTED}@localhost:port", "[Pp]ort"),
        ("redis://[::1", "host"),
        ("redis://localhost?db=x", "db"),
        ("redis://localhost?no_such_option=1", "no_such_option"),
    ],
)
async def test_bad_url(url: str, word: str) -> None:
    """A URL that can never work is a configuration error that names what is wrong."""
    with pytest.raises(StoreConfigError, match=word):
        async with connect(url):
            pass
    await failure(url)


@pytest.mark.parametrize("password", ["sec/ret", "sec#ret", "123/ret", "sec\u2100ret"])
async def test_unquoted_password(password: str) -> None:
    """What looks like a broken port or host may be a part of the password: no part of the URL is repeated."""
    with pytest.raises(StoreConfigError, match="percent-encode") as caught:
        async with connect(f"redis://:{password}@localhost:6379", timeout_s=0.5):
            pass
    for part in ("sec", "ret", "123"):
        assert part not in str(caught.value).replace("percent", "")


async def test_old_server(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Redis before 6.2 is refused by its version."""

    async def old(self: Redis, *sections: str) -> dict[str, str]:
        return {"redis_version": "5.0.14"}

    monkeypatch.setattr(Redis, "info", old)
    error = await failure(redis_url)
    assert isinstance(error, StoreConfigError)
    assert "5.0.14" in str(error)
    assert "6.2" in str(error)
