"""Where an instance says that it is reached."""

import socket

import pytest

from dynamo_llm.card import own_address
from dynamo_llm.config import ConfigError, WorkerConfig

ELSEWHERE = "redis://redis.example:6379"


def config(**options: str) -> WorkerConfig:
    return WorkerConfig(model_path="/m", **{"host": "0.0.0.0", "redis_url": ELSEWHERE, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("found", ["127.0.1.1", OSError("unknown")])
def test_an_address_that_only_this_machine_reaches_is_not_advertised(
    found: str | OSError, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bound to all addresses, a worker asks for one where its own name leads to loopback or nowhere."""

    def resolve(name: str) -> str:
        if isinstance(found, OSError):
            raise found
        return found

    monkeypatch.setattr(socket, "gethostbyname", resolve)
    with pytest.raises(ConfigError, match="give advertise_host an address of it"):
        own_address(config())


def test_this_machines_address_is_advertised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its name leads to one that others reach; an address that was bound or given itself is told as it is."""
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "10.0.0.7")
    assert own_address(config()) == "10.0.0.7"
    assert own_address(config(host="10.0.0.9")) == "10.0.0.9"
    assert own_address(config(advertise_host="node1")) == "node1"


@pytest.mark.parametrize("url", ["redis://127.0.0.1:6379", "redis://localhost", "unix:///tmp/redis.sock"])
def test_around_a_redis_of_this_machine_loopback_will_do(url: str) -> None:
    """Whoever finds the instance there is on this machine, too."""
    assert own_address(config(redis_url=url)) == "127.0.0.1"
