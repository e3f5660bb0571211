"""What an instance says of itself in the registry, and where others reach it. The hosts' entry points call it."""

import contextlib
import os
import socket
import time
from typing import Any
from urllib.parse import urlsplit

from dynamo_llm.config import ConfigError, WorkerConfig
from dynamo_llm.engines.base import Engine
from kvstore.cards import InstanceCard

_LOOPBACK = ("127.0.0.1", "localhost", "")


def make_card(config: WorkerConfig, engine: Engine, **rest: Any) -> InstanceCard:
    """`rest`: what depends on the host. The instance's id and epoch are filled in when it registers."""
    info = engine.info
    return InstanceCard(
        instance="",
        epoch=0,
        namespace=config.namespace,
        component=config.component,
        endpoint=config.endpoint,
        role=config.role,
        engine=info.name,
        engine_version=info.version,
        block_size=info.block_size,
        kv_blocks=info.kv_blocks,
        max_context=info.max_context,
        kv_events=info.announces_blocks,
        pid=os.getpid(),
        started_s=time.time(),
        **rest,
    )


def own_address(config: WorkerConfig) -> str:
    """Where others reach a server that binds `config.host`. Raises `ConfigError` where only this machine would."""
    if config.advertise_host or config.host != "0.0.0.0":
        return config.advertise_host or config.host
    if (urlsplit(config.redis_url).hostname or "") in _LOOPBACK:  # whoever finds us there is on this machine
        return "127.0.0.1"
    address = "127.0.0.1"
    with contextlib.suppress(OSError):
        address = socket.gethostbyname(socket.gethostname())
    if address.startswith("127."):  # Debian has the machine's own name in /etc/hosts with 127.0.1.1
        raise ConfigError(
            f"host {config.host} does not say where routers find this worker: give advertise_host an address of it"
        )
    return address
