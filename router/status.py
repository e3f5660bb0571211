"""`/status`: what this router sees, as one JSON document for `dynamo-llm status` and for people with curl."""

import os
import time
from collections import Counter
from functools import cache
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from typing import Any

import msgspec

from kvstore.cards import InstanceCard
from router.config import DisaggSettings, RouterConfig
from router.generation import Generation
from router.models import Model, Models
from router.pool import Pool
from router.worker_client import WorkerConnection


@cache
def version() -> str:
    """Of the installed package."""
    try:
        return package_version("dynamo-llm")
    except PackageNotFoundError:  # run from a source tree
        return "unknown"


def status(
    config: RouterConfig, disagg: DisaggSettings, models: Models, pool: Pool, generation: Generation
) -> dict[str, Any]:
    """The whole document."""
    return {
        "version": version(),
        "pid": os.getpid(),
        "ready": pool.can_serve(),
        "namespace": config.namespace,
        "policy": config.placement.policy,
        "disaggregation": msgspec.structs.asdict(disagg),
        "redis_connected": pool.redis_connected,
        "inflight": generation.inflight,
        "instances": [_instance(connection, models, pool) for connection in pool.connections()],
        "models": [_model(model, pool) for model in models],
    }


def _instance(connection: WorkerConnection, models: Models, pool: Pool) -> dict[str, Any]:
    card, load = connection.card, connection.load
    report = load.report
    return {
        "instance": card.instance,
        "model": card.model,
        "role": card.role,
        "engine": card.engine,
        "pid": card.pid,
        "epoch": card.epoch,
        "address": card.grpc_address,
        "connected": connection.connected,
        "ready": connection.ready,
        "error": None if connection.connected else connection.last_error,
        "inflight": connection.inflight,
        "kv_blocks_used": report.kv_blocks_used if report else 0,
        "kv_blocks_cached": report.kv_blocks_cached if report else 0,
        "kv_blocks_total": (report.kv_blocks_total if report else 0) or card.kv_blocks,
        "index": _digest(card, models, pool),
        "load": msgspec.structs.asdict(report) if report else None,
        "load_age_s": round(time.monotonic() - load.reported_at_s, 3) if report else None,
    }


def _model(model: Model, pool: Pool) -> dict[str, Any]:
    mirror = pool.mirror(model)
    index = None
    if mirror is not None:
        stats = mirror.stats()
        index = {
            "blocks": stats.blocks,
            "instances": stats.instances,
            "unsynced": stats.unsynced,
            "lag_s": round(stats.lag_s, 4),
            "lag_entries": stats.lag_entries,
            "gaps": stats.gaps,
            "resyncs": stats.resyncs,
        }
    return {
        "model": model.name,
        "instances": len(model.cards),
        "roles": dict(sorted(Counter(card.role for card in model.cards).items())),
        "block_size": model.block_size,
        "max_context": model.max_context,
        "index": index,
    }


def _digest(card: InstanceCard, models: Models, pool: Pool) -> dict[str, Any] | None:
    """What the index holds of an instance, to be compared with another router's, or with itself after a restart."""
    model = models.find(card.model)
    mirror = pool.mirror(model) if model is not None else None
    if mirror is None:
        return None
    digest = mirror.digest(card.instance)
    return {"blocks": digest.count, "xor": f"{digest.xor:016x}", "synced": mirror.is_synced(card.instance)}
