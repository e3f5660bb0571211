"""Where a model finds itself: its entry and version in the repository, and the server around it."""

import json
import os
from pathlib import Path
from typing import Any

from msgspec import Struct

from dynamo_llm.config import ConfigError
from dynamo_llm.hosts.tritonserver import options


class Place(Struct, frozen=True):
    """One version of one entry of a model repository, loaded in a stub process."""

    model: str
    version: str
    entry: Path
    parameters: dict[str, str]
    config: dict[str, Any]
    """Triton's, of the model."""
    server_pid: int
    server: dict[str, str]
    """The flags of the tritonserver."""

    @property
    def folder(self) -> Path:
        return self.entry / self.version

    @property
    def name(self) -> str:
        """What `.control` and `.session` follow: the model's for version 1, the others' ends with their number."""
        return self.model if self.version == "1" else f"{self.model}.{self.version}"

    @property
    def served_as(self) -> str:
        """What clients of a router call it: the model's name is the newest version's."""
        return self.model if self.version == self._newest() else f"{self.model}.{self.version}"

    @property
    def explicit(self) -> bool:
        """Whether models can be loaded and unloaded."""
        return self.server.get("model-control-mode") == "explicit"

    @property
    def grpc_address(self) -> str:
        """Of the server, for a client on this machine."""
        host = self.server.get("grpc-address") or "0.0.0.0"
        port = self.server.get("grpc-port") or options.GRPC_PORT
        return f"{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"

    def _newest(self) -> str:
        policy = self.config.get("version_policy", {})
        if chosen := policy.get("specific", {}).get("versions"):
            return str(max(int(version) for version in chosen))
        versions = [int(entry.name) for entry in self.entry.iterdir() if entry.name.isdecimal() and entry.is_dir()]
        return str(max(versions, default=int(self.version)))


def place_of(arguments: dict[str, str]) -> Place:
    """From what Triton tells a stub, which is the server's child. Raises `ConfigError`."""
    config = json.loads(arguments["model_config"])
    groups = config.get("instance_group", [])
    if sum(group.get("count", 1) * max(len(group.get("gpus", [])), 1) for group in groups) > 1:
        raise ConfigError("one engine serves a model: instance_group must be [{ count: 1, kind: KIND_MODEL }]")
    pid = os.getppid()
    return Place(
        model=arguments["model_name"],
        version=arguments["model_version"],
        entry=Path(arguments["model_repository"]),
        parameters={key: value["string_value"] for key, value in config.get("parameters", {}).items()},
        config=config,
        server_pid=pid,
        server=options.flags_of(Path(f"/proc/{pid}/cmdline").read_bytes()),
    )
