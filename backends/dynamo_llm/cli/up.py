"""`dynamo-llm up`: a whole cluster on one machine, under one supervisor, until a signal ends it."""

import asyncio
import contextlib
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from dynamo_llm.cli import checks
from dynamo_llm.cli.errors import CommandError, StartError
from dynamo_llm.cli.plan import Mode, Plan, roles_of
from dynamo_llm.cli.progress import Progress
from dynamo_llm.cli.router_api import fetch_status
from dynamo_llm.config import ConfigError, resolve_model
from dynamo_llm.supervisor import Child, ChildFailed, ChildRefused, Supervisor
from kvstore.embedded import fits

EPILOG = """[bold]Examples[/bold]

  dynamo-llm up --model model_repository/demo --workers 2

  dynamo-llm up --model DIR --mode agg    [dim]round robin, not KV-aware[/dim]

  dynamo-llm up --model DIR --mode disagg-router --prefill 1 --decode 2

  dynamo-llm up --model DIR --redis redis://HOST:6379 --http-port 9000

[bold]Output[/bold]

  [bold]ready http://HOST:PORT[/bold] on stdout once a request can be served.

  Everything else goes to stderr, each line of a part after its name.

[bold]End[/bold]

  Ctrl-C or SIGTERM: requests in flight finish, exit code 0. A second one stops at once.

  Exit code 2: it could not start as it was told to; 1: a part failed for good.
"""

_EXIT_MARGIN_S = 15.0
"""Beyond its drain, a child has so long to close what it holds."""


class Dialect(str, Enum):
    """`WorkerConfig.dialect`."""

    vllm = "vllm"
    tensorrtllm = "tensorrtllm"


def up(
    model: Annotated[
        str,
        typer.Option(help="Folder of a Hugging Face model, or entry of a Triton model repository.", metavar="DIR"),
    ],
    name: Annotated[str, typer.Option(help="Name that clients use.", show_default="the folder's")] = "",
    engine: Annotated[str, typer.Option(help="Engine that runs the model.")] = "torch",
    engine_option: Annotated[
        list[str] | None,
        typer.Option(help="Option of the engine, its value in JSON; repeatable.", metavar="KEY=VALUE"),
    ] = None,
    prefill_option: Annotated[
        list[str] | None,
        typer.Option(help="The same, for the prefill workers alone.", metavar="KEY=VALUE"),
    ] = None,
    decode_option: Annotated[
        list[str] | None,
        typer.Option(help="The same, for the decode workers alone.", metavar="KEY=VALUE"),
    ] = None,
    python: Annotated[
        str,
        typer.Option(
            help="Interpreter of the environment that the engines live in, each in a process of its own.",
            metavar="PATH",
            show_default="the workers' own processes",
        ),
    ] = "",
    dialect: Annotated[
        Dialect, typer.Option(help="Whose Triton clients the model's name is for, on the workers.")
    ] = Dialect.vllm,
    mode: Annotated[
        Mode,
        typer.Option(
            help="Whole requests or prefill and decode apart; in turn, or (-router) where the prefix is cached.",
            rich_help_panel="Cluster",
        ),
    ] = Mode.agg_router,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Workers to run, in the agg modes.", show_default="1", rich_help_panel="Cluster"),
    ] = None,
    prefill: Annotated[
        int | None,
        typer.Option(min=1, help="Prefill workers, in the disagg modes.", show_default="1", rich_help_panel="Cluster"),
    ] = None,
    decode: Annotated[
        int | None,
        typer.Option(min=1, help="Decode workers, in the disagg modes.", show_default="1", rich_help_panel="Cluster"),
    ] = None,
    redis: Annotated[
        str,
        typer.Option(
            help="redis://, rediss:// or unix:// URL.",
            metavar="URL",
            envvar="DYNAMO_LLM_REDIS",
            show_default="an embedded one",
            rich_help_panel="Cluster",
        ),
    ] = "",
    namespace: Annotated[
        str, typer.Option(help="Keeps clusters on one Redis apart.", rich_help_panel="Cluster")
    ] = "default",
    host: Annotated[
        str, typer.Option(help="Address that the router binds.", rich_help_panel="Addresses")
    ] = "127.0.0.1",
    http_port: Annotated[
        int,
        typer.Option(min=0, max=65535, help="OpenAI and KServe HTTP; 0: any free one.", rich_help_panel="Addresses"),
    ] = 8000,
    grpc_port: Annotated[
        int, typer.Option(min=0, max=65535, help="KServe gRPC; 0: any free one.", rich_help_panel="Addresses")
    ] = 8001,
    drain_timeout: Annotated[
        float,
        typer.Option(min=0, help="Seconds that requests in flight have after a signal.", rich_help_panel="Operation"),
    ] = 30.0,
    start_timeout: Annotated[
        float, typer.Option(min=1, help="Seconds that a part has to become ready.", rich_help_panel="Operation")
    ] = 300.0,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose", "-v", help="Show what the parts log as information too.", rich_help_panel="Operation"
        ),
    ] = False,
) -> None:
    """Run Redis, workers and a router on this machine.

    A part that dies is named and started again, with growing pauses.
    """
    roles = roles_of(mode, workers, prefill, decode)
    if "agg" in roles and (prefill_option or decode_option):
        raise StartError("--prefill-option and --decode-option go with --mode disagg or disagg-router")
    options = checks.parse_engine_options(engine_option or [])
    by_role = {"prefill": prefill_option or [], "decode": decode_option or []}
    role_options = {role: checks.parse_engine_options(pairs) for role, pairs in by_role.items()}
    try:
        folder, name = resolve_model(model, name)
    except ConfigError as error:
        raise StartError(str(error)) from None
    checks.check_engine_packages(engine, python)
    http_port, grpc_port = checks.check_ports(host, {"--http-port": http_port, "--grpc-port": grpc_port})
    if not redis:
        checks.check_embedded_redis()
    plan = Plan(
        str(folder), name, engine, options, role_options, python, dialect.value, mode, roles, host, http_port,
        grpc_port, redis, "", namespace, drain_timeout, start_timeout, verbose,
    )  # fmt: skip
    try:
        code = asyncio.run(_run(plan, Progress(verbose=verbose)))
    except ChildRefused as error:
        raise StartError(str(error)) from None
    except ChildFailed as error:
        raise CommandError(str(error)) from None
    raise typer.Exit(code)


@contextlib.contextmanager
def _scratch() -> Iterator[str]:
    """A folder for all temporary files of the cluster, the socket of the embedded Redis included."""
    folder = tempfile.mkdtemp(prefix="dynamo-")
    if not fits(Path(folder)):  # as in a TMPDIR of a batch system
        os.rmdir(folder)
        folder = tempfile.mkdtemp(prefix="dynamo-", dir="/tmp")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Signals:
    """The first signal asks for an orderly end, the second one for an end at once."""

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        self.forced_by = 0
        self._kill: Callable[[], object] = lambda: None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal, number)

    def on_second(self, kill: Callable[[], object]) -> None:
        self._kill = kill

    def _on_signal(self, number: int) -> None:
        if self.stop.is_set():
            self.forced_by = number
            self._kill()
        self.stop.set()


async def _run(plan: Plan, progress: Progress) -> int:
    """The exit code: 0 after an orderly end, 128 and the signal after a forced one. Raises `ChildFailed`."""
    signals = _Signals()  # before anything is there that a signal could leave behind
    with _scratch() as scratch, progress:
        if plan.redis_url:
            await checks.check_redis(plan.redis_url)
        else:
            plan = replace(plan, redis_folder=scratch, redis_url=f"unix://{scratch}/redis.sock")
        async with Supervisor(progress.notify, scratch) as supervisor:
            signals.on_second(supervisor.kill)
            await _supervise(plan, supervisor, signals, progress)
    return 128 + signals.forced_by if signals.forced_by else 0


async def _supervise(plan: Plan, supervisor: Supervisor, signals: _Signals, progress: Progress) -> None:
    stop_timeout_s = plan.drain_timeout_s + _EXIT_MARGIN_S
    if plan.redis_folder:
        redis = supervisor.start(plan.redis())
        if not await _unless_stopped(redis.became_ready.wait(), signals, supervisor):
            return await supervisor.stop(["redis"], stop_timeout_s)
    router = supervisor.start(plan.router())
    workers = [supervisor.start(spec) for spec in plan.workers()]
    if await _unless_stopped(_until_served(router, workers, plan.start_timeout_s), signals, supervisor):
        url = router.ready_line.split()[1]
        progress.quiet()
        progress.say(f"[green]serving {plan.model_name}[/] at {url}, with Redis at {plan.redis_url}")
        print(f"ready {url}", flush=True)
        await _unless_stopped(asyncio.Event().wait(), signals, supervisor)
        progress.say("[yellow]draining[/]: requests in flight finish; a second signal stops at once")
        await supervisor.stop(["router"], stop_timeout_s)
    await supervisor.stop([child.spec.name for child in (router, *workers)], stop_timeout_s)
    if plan.redis_folder:  # last: the others take their leave there
        await supervisor.stop(["redis"], stop_timeout_s)
    progress.say("stopped")


async def _unless_stopped(work: Awaitable[Any], signals: _Signals, supervisor: Supervisor) -> bool:
    """True when `work` came to its end, False when a signal came first. Raises `ChildFailed`."""
    tasks = [asyncio.ensure_future(work), *map(asyncio.create_task, (signals.stop.wait(), supervisor.wait()))]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task.done():
                task.result()
        return tasks[0].done() and not signals.stop.is_set()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _until_served(router: Child, workers: list[Child], timeout_s: float) -> None:
    """Until the router is connected to every worker, so that the first request is as good as any later one.

    Raises `CommandError` when all run and that does not come about within `timeout_s`.
    """
    together_s: float | None = None
    while True:
        for child in (router, *workers):
            if not child.became_ready.is_set():
                together_s = None
                await child.became_ready.wait()
        together_s = together_s or time.monotonic()
        missing = await _missing(router, {_field(worker.ready_line, "instance") for worker in workers})
        if missing is None:
            return
        if time.monotonic() - together_s > timeout_s:
            raise CommandError(f"the router did not reach every worker within {timeout_s:g} s: {missing}")
        await asyncio.sleep(0.1)


async def _missing(router: Child, wanted: set[str]) -> str | None:
    """Why the router cannot serve with all these instances yet; None if it can."""
    try:
        status = await asyncio.to_thread(fetch_status, router.ready_line.split()[1])
    except CommandError as error:
        return str(error)
    ready = {i["instance"] for i in status["instances"] if i["ready"]}
    if status["ready"] and wanted <= ready:
        return None
    reasons = [f"{i['address']}: {i['error']}" for i in status["instances"] if i["error"]]
    return reasons[0] if reasons else "an instance is not in its registry, or the index is not read"


def _field(ready_line: str, name: str) -> str:
    """`instance` of `ready demo grpc=… instance=…`."""
    return dict(word.split("=", 1) for word in ready_line.split() if "=" in word).get(name, "")
