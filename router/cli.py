"""`dynamo-llm router`: the command's options, and its errors as one line each."""

import asyncio
import logging
import sys
from enum import Enum
from typing import Annotated

import typer

from router.config import PlacementSettings, RouterConfig

EPILOG = """[bold]Examples[/bold]

  dynamo-llm router --redis redis://HOST:6379

  dynamo-llm router --host 0.0.0.0 --http-port 80 --policy round-robin

[bold]Output[/bold]

  [bold]ready http://HOST:PORT grpc HOST:PORT[/bold] on stdout once it listens.

  Workers are found through Redis, now or later: /ready says when the first one takes requests.

[bold]End[/bold]

  SIGTERM or Ctrl-C: requests in flight finish, exit code 0. A second one stops at once.

  Exit code 2: it could not start as it was told to.
"""

_DEFAULT = RouterConfig(redis_url="redis://127.0.0.1:6379")
_ADDRESSES, _PLACEMENT, _LIMITS, _OPERATION = "Addresses", "Placement", "Limits", "Operation"


class Policy(str, Enum):
    """How a worker is chosen."""

    kv = "kv"
    round_robin = "round-robin"
    random = "random"


class LogLevel(str, Enum):
    """What goes to stderr."""

    debug = "debug"
    info = "info"
    warning = "warning"
    error = "error"


def router(
    redis: Annotated[
        str, typer.Option(help="redis://, rediss:// or unix:// URL.", metavar="URL", envvar="DYNAMO_LLM_REDIS")
    ] = _DEFAULT.redis_url,
    namespace: Annotated[str, typer.Option(help="Keeps clusters on one Redis apart.")] = _DEFAULT.namespace,
    host: Annotated[str, typer.Option(help="Address to bind.", rich_help_panel=_ADDRESSES)] = _DEFAULT.host,
    http_port: Annotated[
        int, typer.Option(min=0, max=65535, help="OpenAI and KServe HTTP; 0: any free one.", rich_help_panel=_ADDRESSES)
    ] = _DEFAULT.http_port,
    grpc_port: Annotated[
        int, typer.Option(min=0, max=65535, help="KServe gRPC; 0: any free one.", rich_help_panel=_ADDRESSES)
    ] = _DEFAULT.grpc_port,
    policy: Annotated[
        Policy, typer.Option(help="Where the prefix is cached, in turn, or anywhere.", rich_help_panel=_PLACEMENT)
    ] = Policy.kv,
    temperature: Annotated[
        float,
        typer.Option(
            min=0, help="Of the kv policy: 0 takes the lowest cost, more spreads.", rich_help_panel=_PLACEMENT
        ),
    ] = _DEFAULT.placement.temperature,
    prefill_load_scale: Annotated[
        float,
        typer.Option(min=0, help="Of the kv policy: weight of prefill against decode.", rich_help_panel=_PLACEMENT),
    ] = _DEFAULT.placement.prefill_load_scale,
    predicted_ttl: Annotated[
        float,
        typer.Option(
            min=0,
            help="Seconds that a block counts as cached on a worker without KV events, after its last use.",
            rich_help_panel=_PLACEMENT,
        ),
    ] = _DEFAULT.placement.predicted_ttl_s,
    max_inflight: Annotated[
        int, typer.Option(min=1, help="Sequences in flight; more are answered 429.", rich_help_panel=_LIMITS)
    ] = _DEFAULT.max_inflight,
    max_body_mib: Annotated[
        int, typer.Option(min=1, max=1024, help="Largest request body.", rich_help_panel=_LIMITS)
    ] = _DEFAULT.max_body_bytes // 2**20,
    request_timeout: Annotated[
        float, typer.Option(min=0, help="Seconds for one request; 0: no limit.", rich_help_panel=_LIMITS)
    ] = _DEFAULT.request_timeout_s,
    max_attempts: Annotated[
        int,
        typer.Option(min=1, help="Workers that a request is tried on; 1: no migration.", rich_help_panel=_OPERATION),
    ] = _DEFAULT.max_attempts,
    drain_timeout: Annotated[
        float,
        typer.Option(min=0, help="Seconds that requests in flight have after a signal.", rich_help_panel=_OPERATION),
    ] = _DEFAULT.drain_timeout_s,
    log_level: Annotated[LogLevel, typer.Option(help="What to log.", rich_help_panel=_OPERATION)] = LogLevel.warning,
) -> None:
    """Serve OpenAI and KServe v2 clients in front of the workers that Redis lists."""
    config = RouterConfig(
        redis_url=redis,
        namespace=namespace,
        host=host,
        http_port=http_port,
        grpc_port=grpc_port,
        placement=PlacementSettings(
            policy=policy.value,
            temperature=temperature,
            prefill_load_scale=prefill_load_scale,
            predicted_ttl_s=predicted_ttl,
        ),
        max_inflight=max_inflight,
        max_body_bytes=max_body_mib * 2**20,
        request_timeout_s=request_timeout,
        max_attempts=max_attempts,
        drain_timeout_s=drain_timeout,
    )
    logging.basicConfig(level=log_level.value.upper(), format="%(levelname)s %(name)s: %(message)s")
    _run(config)


def _run(config: RouterConfig) -> None:
    # Not above: `--help` and wrong options should not wait for what only a running router needs.
    import uvloop

    from kvstore.errors import StoreError
    from router.app import StartError, serve

    loop = uvloop.new_event_loop()
    try:
        loop.run_until_complete(serve(config))
    except (StartError, StoreError) as error:
        print(f"dynamo-llm: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
        asyncio.set_event_loop(None)
        loop.close()
