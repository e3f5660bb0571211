"""What `dynamo-llm up` is to run: the command line of each part, by the deployment mode."""

import contextlib
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Any

from dynamo_llm.cli.errors import StartError
from dynamo_llm.supervisor import ChildSpec
from kvstore.cards import Role


class Mode(str, Enum):
    """Deployment modes: who computes prompts, and whether the router places by the KV cache."""

    agg = "agg"
    agg_router = "agg-router"
    disagg = "disagg"
    disagg_router = "disagg-router"


_POLICIES = {Mode.agg: "round-robin", Mode.agg_router: "kv", Mode.disagg: "round-robin", Mode.disagg_router: "kv"}


_AGG: tuple[Role, ...] = ("agg",)
_PREFILL: tuple[Role, ...] = ("prefill",)
_DECODE: tuple[Role, ...] = ("decode",)


def roles_of(mode: Mode, workers: int | None, prefill: int | None, decode: int | None) -> tuple[Role, ...]:
    """One role for each worker; None: not given, which is one. Raises `StartError`."""
    if mode in (Mode.agg, Mode.agg_router):
        if prefill is not None or decode is not None:
            raise StartError(
                f"--prefill and --decode go with --mode disagg or disagg-router; {mode.value} has --workers"
            )
        return _AGG * (workers or 1)
    if workers is not None:
        raise StartError(f"--workers goes with --mode agg or agg-router; {mode.value} has --prefill and --decode")
    return _PREFILL * (prefill or 1) + _DECODE * (decode or 1)


@dataclass(frozen=True)
class Plan:
    """What to run, checked."""

    model_path: str
    model_name: str
    engine: str
    engine_options: dict[str, Any]
    role_options: dict[str, dict[str, Any]]
    """Over `engine_options`, for the workers of one role."""
    python: str
    dialect: str
    mode: Mode
    roles: tuple[Role, ...]
    """Of the workers, in their order."""
    host: str
    http_port: int
    grpc_port: int
    redis_url: str
    redis_folder: str
    """Where the embedded Redis has its socket; empty when the user has a Redis."""
    namespace: str
    drain_timeout_s: float
    start_timeout_s: float
    verbose: bool

    def redis(self) -> ChildSpec:
        return ChildSpec("redis", [sys.executable, "-m", "kvstore.embedded", self.redis_folder], {}, 30.0)

    def router(self) -> ChildSpec:
        argv = ["router", "--host", self.host, "--http-port", str(self.http_port), "--grpc-port", str(self.grpc_port)]
        argv += ["--policy", _POLICIES[self.mode], "--drain-timeout", f"{self.drain_timeout_s:g}"]
        argv += ["--log-level", "info" if self.verbose else "warning"]
        return self._child("router", argv)

    def workers(self) -> list[ChildSpec]:
        return [self.worker(number) for number in range(1, len(self.roles) + 1)]

    def worker(self, number: int) -> ChildSpec:
        """The nth worker, from 1; parts of a role are named after it."""
        role = self.roles[number - 1]
        options = {**self._share(), **self.engine_options, **self.role_options.get(role, {})}
        argv = ["worker", "--model", self.model_path, "--name", self.model_name, "--engine", self.engine]
        argv += ["--role", role]
        for key, value in options.items():
            argv += ["--engine-option", f"{key}={json.dumps(value)}"]
        argv += ["--python", self.python] if self.python else []
        argv += ["--dialect", self.dialect, "--drain-timeout", f"{self.drain_timeout_s:g}"]
        name = "worker" if role == "agg" else role
        return self._child(f"{name}-{self.roles[:number].count(role)}", argv, _gpu_of(number))

    def _child(self, name: str, argv: list[str], environment: Mapping[str, str] = MappingProxyType({})) -> ChildSpec:
        return ChildSpec(
            name,
            [sys.executable, "-m", "dynamo_llm", *argv, "--namespace", self.namespace],
            # By the environment: a command line is for everybody on the machine to read, and a URL may hold a password.
            {"DYNAMO_LLM_REDIS": self.redis_url, **environment},
            self.start_timeout_s,
        )

    def _share(self) -> dict[str, Any]:
        """Each worker's share of the cores: more threads than cores slow all of them down."""
        cores = len(os.sched_getaffinity(0))
        return {"threads": max(1, cores // len(self.roles))} if self.engine == "torch" else {}


def _gpu_of(number: int) -> dict[str, str]:
    """One GPU for each worker in turn, where there are any; the engine sees no other one."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        with contextlib.suppress(OSError):
            visible = ",".join(map(str, range(len(os.listdir("/proc/driver/nvidia/gpus")))))
    gpus = [gpu for gpu in (visible or "").split(",") if gpu]
    return {"CUDA_VISIBLE_DEVICES": gpus[(number - 1) % len(gpus)]} if gpus else {}
