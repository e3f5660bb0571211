"""The command line `dynamo-llm`. `main` is the console script; each subcommand is imported only when it is asked for.

Subcommands that other packages bring (`router`) are found by the entry point group `dynamo_llm.commands`: an entry is a
function in the manner of typer, and the module it lives in may hold an `EPILOG` of examples.
"""

import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points, version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from dynamo_llm.cli.errors import CommandError

ENTRY_POINTS = "dynamo_llm.commands"
_OWN = {
    name: EntryPoint(name, f"dynamo_llm.cli.{name}:{name}", ENTRY_POINTS)
    for name in ("up", "worker", "tritonserver", "status", "role")
}
_ORDER = ("up", "worker", "tritonserver", "router", "status", "role")

EPILOG = """[bold]A cluster on this machine[/bold]

  dynamo-llm up --model model_repository/demo --workers 2

  dynamo-llm status --watch

[bold]Or on several, around a Redis of yours[/bold]

  dynamo-llm worker --model DIR --redis redis://HOST:6379 --host ADDRESS

  dynamo-llm router --redis redis://HOST:6379 --host 0.0.0.0
"""


class _Commands(Mapping[str, Any]):
    """Click commands by name. A command's module is imported when its value is looked up."""

    def __init__(self) -> None:
        found = {**{entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}, **_OWN}
        names = [name for name in _ORDER if name in found] + sorted(set(found) - set(_ORDER))
        self._entries = {name: found[name] for name in names}

    def __getitem__(self, name: str) -> Any:
        entry = self._entries[name]
        function = entry.load()
        epilog = getattr(import_module(entry.module), "EPILOG", None)
        single = typer.Typer(add_completion=False, rich_markup_mode="rich")
        single.command(name=name, epilog=epilog)(function)
        return typer.main.get_command(single)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


class _Group(TyperGroup):
    """The top of the tree, with its subcommands loaded lazily: `dynamo-llm status` need not import what `up` needs."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.commands = _Commands()  # type: ignore[assignment]  # nobody adds to it

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)


app = typer.Typer(
    cls=_Group,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,  # a plain traceback reads better in a log, and its last line says it all
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=EPILOG,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dynamo-llm {version('dynamo-llm')}")
        raise typer.Exit


@app.callback()
def _top(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Distributed LLM inference on Triton: KV-aware routing, a Redis control plane, OpenAI and KServe v2 clients."""


def main() -> None:
    """Run the command line and exit: 0 well, 1 failed while running, 2 could not start as it was told to."""
    try:
        app(prog_name="dynamo-llm")
    except CommandError as error:
        print(f"dynamo-llm: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
