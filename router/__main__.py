"""`python -m router`: the command `dynamo-llm router` without the rest of the command line."""

import typer

from router.cli import EPILOG, router

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_show_locals=False)
app.command(epilog=EPILOG)(router)

if __name__ == "__main__":
    app(prog_name="python -m router")
