"""`dynamo-llm tritonserver`: Triton model repositories on a plain tritonserver, with our backend in it."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from dynamo_llm.cli.checks import check_ports
from dynamo_llm.cli.errors import StartError

EPILOG = """[bold]Examples[/bold]

  dynamo-llm tritonserver --model-repository model_repository --redis redis://HOST:6379

  dynamo-llm tritonserver --model-repository A --model-repository B -- --log-verbose=1

[bold]Output[/bold]

  [bold]ready DIR grpc=… http=… metrics=… instance=…[/bold] on stdout once the models serve and are registered.
  Triton's log goes to stderr.

[bold]End[/bold]

  SIGTERM or Ctrl-C: requests in flight finish, exit code 0.
"""


class ControlMode(str, Enum):
    """Triton's own."""

    explicit = "explicit"
    none = "none"
    poll = "poll"


def tritonserver(
    model_repository: Annotated[
        list[Path],
        typer.Option(help="Folder of model entries; repeatable.", metavar="DIR", exists=True, file_okay=False),
    ],
    redis: Annotated[
        str | None,
        typer.Option(
            help="redis://, rediss:// or unix:// URL for all models.",
            metavar="URL",
            envvar="DYNAMO_LLM_REDIS",
            show_default="the models' own",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to bind.")] = "127.0.0.1",
    http_port: Annotated[int, typer.Option(help="KServe v2 over HTTP. 0: any free one.", min=0, max=65535)] = 8000,
    grpc_port: Annotated[int, typer.Option(help="KServe v2 over gRPC. 0: any free one.", min=0, max=65535)] = 8001,
    metrics_port: Annotated[int, typer.Option(help="Triton's /metrics. 0: any free one.", min=0, max=65535)] = 8002,
    model_control_mode: Annotated[
        ControlMode,
        typer.Option(
            help="explicit: all models are loaded, and clients may load and unload them. With none and poll the "
            "companions of a model need entries of their own (docs/triton.md).",
        ),
    ] = ControlMode.explicit,
    arguments: Annotated[
        list[str] | None, typer.Argument(help="Further flags of tritonserver, after --.", metavar="[-- FLAGS]")
    ] = None,
) -> None:
    """Run the tritonserver that PyTriton carries on model repositories.

    Their models with the backend dynamo_llm serve routers, too, which find them on the same Redis and namespace.
    """
    wanted = {"--http-port": http_port, "--grpc-port": grpc_port, "--metrics-port": metrics_port}
    http, grpc, metrics = check_ports(host, wanted)
    if ":" in host:
        raise StartError(f"--host {host}: an IPv4 address or a name is needed, like 0.0.0.0")
    from dynamo_llm.hosts.tritonserver.launcher import Settings, run

    settings = Settings(
        repositories=[repository.resolve() for repository in model_repository],
        host=host,
        http_port=http,
        grpc_port=grpc,
        metrics_port=metrics,
        control_mode=model_control_mode.value,
        redis_url=redis,
        arguments=arguments or [],
    )
    raise typer.Exit(run(settings))
