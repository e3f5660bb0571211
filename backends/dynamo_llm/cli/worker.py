"""`dynamo-llm worker`: one engine behind one Triton server, registered in Redis."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from dynamo_llm.cli.checks import check_engine_packages, parse_engine_options
from dynamo_llm.cli.errors import StartError
from dynamo_llm.config import ConfigError, WorkerConfig, by_field

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

EPILOG = """[bold]Examples[/bold]

  dynamo-llm worker --model DIR --redis redis://HOST:6379 --host ADDRESS

  dynamo-llm worker --model DIR --engine-option kv_blocks=4096

  dynamo-llm worker --config worker.toml --grpc-port 8101

[bold]The file[/bold] holds the long options with underscores, and a table [bold]engine_options[/bold]. Flags win.

[bold]Output[/bold]

  [bold]ready MODEL grpc=… http=… metrics=… instance=…[/bold] on stdout once it serves and is registered.

[bold]End[/bold]

  SIGTERM or Ctrl-C: requests in flight finish, exit code 0.
"""

_DEFAULT = WorkerConfig(model_path="-")
_SERVER, _CLUSTER, _OPERATION = "Triton server", "Cluster", "Operation"


def worker(
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder of a Hugging Face model, or entry of a Triton model repository.",
            metavar="DIR",
            show_default="required, here or in the file",
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name that clients use.", show_default="the folder's")] = None,
    engine: Annotated[
        str | None, typer.Option(help="Engine that runs the model.", show_default=_DEFAULT.engine)
    ] = None,
    engine_option: Annotated[
        list[str] | None,
        typer.Option(help="Option of the engine, its value in JSON; repeatable.", metavar="KEY=VALUE"),
    ] = None,
    python: Annotated[
        str | None,
        typer.Option(
            help="Interpreter of the environment that the engine lives in, in a process of its own.",
            metavar="PATH",
            show_default="this process",
        ),
    ] = None,
    instances: Annotated[
        int | None,
        typer.Option(help="Engines in this worker, each an instance to routers.", show_default=f"{_DEFAULT.instances}"),
    ] = None,
    dialect: Annotated[
        str | None,
        typer.Option(
            help="Whose Triton clients the model's name is for, vllm or tensorrtllm; the others have one beside it.",
            show_default=_DEFAULT.dialect,
            rich_help_panel=_SERVER,
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML file with any of these options.", metavar="FILE", dir_okay=False)
    ] = None,
    redis: Annotated[
        str | None,
        typer.Option(
            help="redis://, rediss:// or unix:// URL.",
            metavar="URL",
            envvar="DYNAMO_LLM_REDIS",
            show_default=_DEFAULT.redis_url,
            rich_help_panel=_CLUSTER,
        ),
    ] = None,
    namespace: Annotated[
        str | None,
        typer.Option(
            help="Keeps clusters on one Redis apart.", show_default=_DEFAULT.namespace, rich_help_panel=_CLUSTER
        ),
    ] = None,
    role: Annotated[
        str | None, typer.Option(help="agg, prefill or decode.", show_default=_DEFAULT.role, rich_help_panel=_CLUSTER)
    ] = None,
    host: Annotated[
        str | None,
        typer.Option(help="Address to bind.", show_default=_DEFAULT.host, rich_help_panel=_SERVER),
    ] = None,
    advertise_host: Annotated[
        str | None,
        typer.Option(help="Address that routers are told.", show_default="--host", rich_help_panel=_SERVER),
    ] = None,
    grpc_port: Annotated[
        int | None,
        typer.Option(help="Triton's gRPC port.", show_default="any free one", rich_help_panel=_SERVER),
    ] = None,
    http_port: Annotated[
        int | None,
        typer.Option(help="Triton's HTTP port.", show_default="any free one", rich_help_panel=_SERVER),
    ] = None,
    metrics_port: Annotated[
        int | None,
        typer.Option(help="Port of /metrics.", show_default="any free one", rich_help_panel=_SERVER),
    ] = None,
    lease_ttl: Annotated[
        float | None,
        typer.Option(
            help="Seconds after which a silent worker is taken off the registry.",
            show_default=f"{_DEFAULT.lease_ttl_s:g}",
            rich_help_panel=_OPERATION,
        ),
    ] = None,
    drain_timeout: Annotated[
        float | None,
        typer.Option(
            help="Seconds that requests in flight have after SIGTERM.",
            show_default=f"{_DEFAULT.drain_timeout_s:g}",
            rich_help_panel=_OPERATION,
        ),
    ] = None,
    max_inflight: Annotated[
        int | None,
        typer.Option(
            help="Requests admitted at once; more are refused.",
            show_default=f"{_DEFAULT.max_inflight}",
            rich_help_panel=_OPERATION,
        ),
    ] = None,
) -> None:
    """Run one worker: an engine behind a Triton server.

    Routers on the same Redis and namespace find it by themselves.
    """
    flags = {
        "model_path": model,
        "model_name": name,
        "engine": engine,
        "python": python,
        "instances": instances,
        "dialect": dialect,
        "redis_url": redis,
        "namespace": namespace,
        "role": role,
        "host": host,
        "advertise_host": advertise_host,
        "grpc_port": grpc_port,
        "http_port": http_port,
        "metrics_port": metrics_port,
        "lease_ttl_s": lease_ttl,
        "drain_timeout_s": drain_timeout,
        "max_inflight": max_inflight,
    }
    raise typer.Exit(_run(worker_config(flags, engine_option or [], config)))


def worker_config(flags: dict[str, Any], engine_options: list[str], file: Path | None) -> WorkerConfig:
    """Flags (None: not given) over the file over the defaults. Raises `StartError`."""
    values = _read(file) if file else {}
    values |= {key: value for key, value in flags.items() if value is not None}
    if engine_options:
        values["engine_options"] = {**values.get("engine_options", {}), **parse_engine_options(engine_options)}
    if not values.get("model_path"):
        raise StartError("no model is named: pass --model DIR, or `model` in the file of --config")
    try:
        return WorkerConfig.from_dict(values)
    except ConfigError as error:
        raise StartError(f"{file}: {error}" if file else str(error)) from None


def _read(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as stream:
            values = tomllib.load(stream)
    except OSError as error:
        raise StartError(f"--config {file}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise StartError(f"--config {file} is no TOML: {error}") from None
    if not isinstance(values.get("engine_options", {}), dict):
        raise StartError(f"--config {file}: engine_options must be a table")
    return by_field(values)


def _run(config: WorkerConfig) -> int:
    check_engine_packages(config.engine, config.python)
    from dynamo_llm.worker import run  # torch and Triton come with it: only once all else is well

    return run(config)
