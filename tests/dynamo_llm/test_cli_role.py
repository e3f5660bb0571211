"""`dynamo-llm role` over a real Redis: what it says where it cannot do its work. That it does is in tests/e2e."""

import asyncio
from collections.abc import Callable

import pytest
from redis.asyncio import Redis

from dynamo_llm.cli import main
from kvstore.cards import InstanceCard
from kvstore.keys import Keys
from kvstore.registry import Registry


def card(instance: str) -> InstanceCard:
    return InstanceCard(
        instance=instance,
        namespace="roles",
        model="demo",
        grpc_address="127.0.0.1:1",
        engine="torch",
        block_size=16,
        kv_blocks=64,
        max_context=1024,
        model_files="",
        epoch=1,
    )


@pytest.fixture
def command(redis_url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs it with these arguments; what it says on stderr, in one line, with exit code 1."""

    def run(*arguments: str, redis: str = redis_url) -> str:
        monkeypatch.setattr("sys.argv", ["dynamo-llm", "role", *arguments, "--redis", redis, "--namespace", "roles"])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 1
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        return said

    return run


async def test_what_is_wrong_is_said_in_one_line(redis: Redis, command: Callable[..., str]) -> None:
    """A role that there is not, an instance that is not there or not the only one, a worker that does not answer, and
    a Redis that is not there."""
    registry = Registry(redis, Keys(namespace="roles"))

    async def says(*arguments: str, **options: str) -> str:
        return await asyncio.to_thread(lambda: command(*arguments, **options))

    assert "no such role: boss; there are agg, prefill, decode" in await says("a1", "boss")
    assert "no instance begins with 'a1'; registered are: none" in await says("a1", "decode")
    async with await registry.register(card("a1")), await registry.register(card("a2")):
        assert "2 instances begin with 'a'; registered are: a1 (agg), a2 (agg)" in await says("a", "decode")
        assert "a1 at 127.0.0.1:1 does not answer" in await says("a1", "decode")
    assert "is --redis right?" in await says("a1", "decode", redis="redis://127.0.0.1:1")
