"""`dynamo-llm status`: what a router sees, as a table or as its JSON."""

import json
import sys
import time
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dynamo_llm.cli.errors import CommandError
from dynamo_llm.cli.router_api import fetch_status

EPILOG = """[bold]Examples[/bold]

  dynamo-llm status

  dynamo-llm status --url http://HOST:8000 --watch

  dynamo-llm status --json | jq '.instances[].load'

Exit code 1, with one line on stderr, where no router answers.
"""

_REFRESH_S = 1.0
_PLAIN_WIDTH = 240
"""Columns where there is no terminal: in a file or a pipe, a row should be a line."""


def status(
    url: Annotated[str, typer.Option(help="The router.", metavar="URL")] = "http://127.0.0.1:8000",
    as_json: Annotated[bool, typer.Option("--json", help="Print the router's own document.")] = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show it anew every second, until Ctrl-C.")] = False,
) -> None:
    """Show instances, load, KV blocks and the prefix index of a router."""
    if not watch:
        document = fetch_status(url)
        if as_json:
            typer.echo(json.dumps(document, indent=2))
        else:
            console = Console() if sys.stdout.isatty() else Console(width=_PLAIN_WIDTH)
            console.print(render(document))
        return
    try:
        _watch_json(url) if as_json else _watch_table(url)
    except KeyboardInterrupt:
        raise typer.Exit from None


def _watch_json(url: str) -> None:
    """One document a line."""
    while True:
        typer.echo(json.dumps(fetch_status(url)))
        time.sleep(_REFRESH_S)


def _watch_table(url: str) -> None:
    with Live(render(fetch_status(url)), auto_refresh=False) as live:
        while True:
            time.sleep(_REFRESH_S)
            try:
                live.update(render(fetch_status(url)), refresh=True)
            except CommandError as error:  # it may be restarting: keep watching
                live.update(Text(str(error), "red"), refresh=True)


def render(document: dict[str, Any]) -> RenderableType:
    """The router's `/status` for people."""
    return Group(_headline(document), "", _instances(document["instances"]), "", _models(document["models"]))


def _headline(document: dict[str, Any]) -> RenderableType:
    redis = _state(document["redis_connected"], "Redis connected", "Redis lost: the last known view is used")
    ready = _state(document["ready"], "ready", "not ready")
    what = f"router {document['version']}, namespace {document['namespace']}, policy {document['policy']}"
    return Text.assemble(f"{what} · ", ready, " · ", redis, f" · {document['inflight']:,} in flight")


def _instances(instances: list[dict[str, Any]]) -> RenderableType:
    table = _table(
        ("instance", "model", "role", "engine", "address", "state"),
        ("in\nflight", "running/\nwaiting", "KV used/\ncached/total"),
    )
    for instance in instances:
        load = instance["load"] or {}
        if instance["connected"]:
            state = _state(instance["ready"], "ready", "draining")
        else:
            state = Text(f"not connected: {instance['error'] or 'connecting'}", "red")
        table.add_row(
            *(str(instance[key]) for key in ("instance", "model", "role", "engine", "address")),
            state,
            f"{instance['inflight']:,}",
            f"{load.get('running', 0):,}/{load.get('waiting', 0):,}",
            "/".join(f"{instance[f'kv_blocks_{what}']:,}" for what in ("used", "cached", "total")),
        )
    return table if instances else Text("no instance is registered", "yellow")


def _models(models: list[dict[str, Any]]) -> RenderableType:
    table = _table(
        ("model",),
        ("instances", "block\nsize", "index\nblocks", "lag ms", "behind", "gaps", "resyncs", "unsynced"),
    )
    for model in models:
        index = model["index"] or {}
        table.add_row(
            model["model"],
            *(f"{model[key]:,}" for key in ("instances", "block_size")),
            f"{index.get('blocks', 0):,}",
            f"{1e3 * index.get('lag_s', 0):,.1f}",
            *(f"{index.get(key, 0):,}" for key in ("lag_entries", "gaps", "resyncs", "unsynced")),
        )
    return table if models else Text("no model is served", "yellow")


def _table(texts: tuple[str, ...], numbers: tuple[str, ...]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True)
    for column in texts:
        table.add_column(column, no_wrap=column in ("instance", "address"))
    for column in numbers:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _state(well: bool, yes: str, no: str) -> Text:
    return Text(yes, "green") if well else Text(no, "red")
