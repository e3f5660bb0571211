"""Connections to Redis, and the one place where the redis package's errors become ours.

Any Redis from 6.2 on or Valkey, by `redis://`, `rediss://` or `unix://`. User, password, database and the TLS options
of redis-py (`ssl_ca_certs`, `ssl_cert_reqs`, `ssl_certfile`, `ssl_keyfile`, `ssl_check_hostname`, …) are taken from
the URL.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any
from urllib.parse import urlsplit

from redis.asyncio import ConnectionPool
from redis.asyncio import Redis as Redis  # others name the type from here: redis is imported in this package only
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    ConnectionError,
    NoPermissionError,
    RedisError,
    ResponseError,
    TimeoutError,
)

from kvstore.errors import StoreConfigError, StoreError, StoreRefused, StoreUnavailable

OLDEST_VERSION = (6, 2)
_SCHEMES = ("redis", "rediss", "unix")


@asynccontextmanager
async def connect(url: str, *, timeout_s: float = 5.0, client_name: str = "dynamo-llm") -> AsyncIterator[Redis]:
    """A client whose server has been seen to answer and to be new enough; its connections are closed at the end.

    `timeout_s` bounds connecting and each command; a command that meets a broken connection is tried once again, so
    that an idle connection may break unseen. Raises `StoreConfigError`, `StoreRefused` or `StoreUnavailable`.
    """
    redis = _client(url, timeout_s, client_name)
    try:
        with store_errors(redis):
            await _check(redis, 2 * timeout_s)
        yield redis
    finally:
        await redis.aclose()


@contextmanager
def store_errors(redis: Redis) -> Iterator[None]:
    """Turn the redis package's errors into ours, with the server's address in the message."""
    try:
        yield
    except RedisError as error:
        raise translate(error, redis) from error


def translate(error: RedisError, redis: Redis) -> StoreError:
    """The error to raise in place of redis-py's."""
    place = f"Redis at {address(redis)}"
    text = " ".join(str(error).split())
    # Most specific first: redis-py derives AuthenticationError and BusyLoadingError from ConnectionError.
    if isinstance(error, AuthenticationError) or "NOAUTH" in text:
        return StoreRefused(f"{place} rejected the login: put the right user and password into the URL ({text})")
    if isinstance(error, NoPermissionError):
        return StoreRefused(f"{place} does not permit this user what is needed: {text}")
    if isinstance(error, BusyLoadingError):
        return StoreUnavailable(f"{place} is still loading its data: try again in a moment")
    if isinstance(error, TimeoutError):
        return StoreUnavailable(f"{place} did not answer in time: check address and network")
    if isinstance(error, ConnectionError):
        return StoreUnavailable(f"{place} {_why_unreachable(error, text)}")
    if isinstance(error, ResponseError):
        return StoreRefused(f"{place} refused a command: {text}")
    return StoreError(f"{place}: {text}")


def address(redis: Redis) -> str:
    """Where a client connects to, without user and password."""
    options = redis.connection_pool.connection_kwargs
    if "path" in options:
        return f"unix://{options['path']}"
    scheme = "rediss" if "SSL" in redis.connection_pool.connection_class.__name__ else "redis"
    return f"{scheme}://{options.get('host', 'localhost')}:{options.get('port', 6379)}"


def _client(url: str, timeout_s: float, client_name: str) -> Redis:
    scheme = url.split(":", 1)[0]
    if scheme not in _SCHEMES or "//" not in url:
        raise StoreConfigError("the Redis URL must begin with redis://, rediss:// or unix://")
    options: dict[str, Any] = {
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "socket_keepalive": True,
        "health_check_interval": 15,
        "retry": Retry(ExponentialBackoff(cap=0.5, base=0.05), 1),
        "client_name": client_name,
    }
    _check_url(url, scheme)
    if scheme == "unix":
        del options["socket_keepalive"]
    try:
        pool = ConnectionPool.from_url(url, **options)
        # One reply shape whatever redis-py's default or the URL says.
        pool.connection_kwargs.update(protocol=2, decode_responses=False)
        pool.connection_class(**pool.connection_kwargs)  # an unknown option in the URL shows here, as a TypeError
    except (TypeError, ValueError) as error:
        raise StoreConfigError(f"the Redis URL cannot be used: {error}") from None
    return Redis.from_pool(pool)


def _check_url(url: str, scheme: str) -> None:
    """Find what a password with special characters makes of a URL, without repeating any of it: urllib's errors do."""
    try:
        parts = urlsplit(url)
        broken = scheme != "unix" and "@" in parts.path + parts.fragment
        _ = parts.port
    except ValueError:
        broken = True
    if broken:
        raise StoreConfigError(
            "the Redis URL cannot be used: bad host or port (percent-encode special characters of the password)"
        )


async def _check(redis: Redis, timeout_s: float) -> None:
    """redis-py tries again both to connect and to send: bound the whole."""
    try:
        await asyncio.wait_for(redis.ping(), timeout_s)
        await asyncio.wait_for(_require_version(redis), timeout_s)
    except asyncio.TimeoutError:
        raise TimeoutError("no answer to the first command") from None


async def _require_version(redis: Redis) -> None:
    try:
        info = await redis.info("server")
    except NoPermissionError:
        return  # some hosted ones hide INFO; they are new enough
    version = str(info.get("redis_version", ""))
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers and numbers < OLDEST_VERSION:
        wanted = ".".join(map(str, OLDEST_VERSION))
        raise StoreConfigError(
            f"Redis at {address(redis)} is version {version}: {wanted} or newer is needed (or Valkey)"
        )


def _why_unreachable(error: ConnectionError, text: str) -> str:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ConnectionRefusedError):
            return "refused the connection: start it or pass --redis URL"
        if isinstance(cause, FileNotFoundError):
            return "has no socket there: start it or pass --redis URL"
        cause = cause.__cause__ or cause.__context__
    return f"cannot be reached: {text}"
