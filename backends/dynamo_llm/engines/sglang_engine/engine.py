"""SGLang behind the interface of all engines: its offline `Engine`, its load figures, its KV events over ZMQ.

`AsyncEngine` owns the thread with the event loop, the requests in flight and the end; here is what is SGLang's own. Its
scheduler and detokenizer are processes that SGLang starts: their death is ours.
"""

import asyncio
import atexit
import contextlib
import logging
import os
import tempfile
import threading
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import psutil
from sglang import Engine
from sglang import __version__ as SGLANG_VERSION

from dynamo_llm.engines.async_engine import AsyncEngine
from dynamo_llm.engines.async_types import Delta, EngineLoad, one_line, run_blocking
from dynamo_llm.engines.base import ALONE, Duty, EngineError, EngineInfo, EngineRequest, RequestError
from dynamo_llm.engines.kv_events import KvEventSubscriber, Translator, reachable
from dynamo_llm.engines.sglang_engine import signals
from dynamo_llm.engines.sglang_engine.options import parse_options
from dynamo_llm.engines.sglang_engine.outputs import Chunks
from dynamo_llm.engines.sglang_engine.sampling import arguments, bootstrap
from kvstore.cards import Role

logger = logging.getLogger(__name__)

_LOOK_S = 0.1
"""How often SGLang's load is read (from shared memory) and its processes are looked at."""
_KILL_TIMEOUT_S = 10.0
_ROLES: dict[str, tuple[Role, ...]] = {"prefill": ("prefill",), "decode": ("decode",)}
"""By `disaggregation_mode`, which SGLang is started with for good."""


class SglangEngine(AsyncEngine):
    """See the module's docstring. The constructor loads the model, which takes tens of seconds.

    It belongs into a process of its own (`python`): SGLang changes signal handlers and the way processes are started.
    """

    def __init__(self, folder: Path, model: str, options: dict[str, Any], duty: Duty = ALONE) -> None:
        """Raises `EngineError` for options, folders and models that cannot be served."""
        # Without it SGLang reports log-probabilities after temperature; the wire wants the model's own.
        os.environ.setdefault("SGLANG_RETURN_ORIGINAL_LOGPROB", "1")
        with contextlib.ExitStack() as undo:
            # Where the sockets of the KV events lie: a socket's path must be short.
            scratch = undo.enter_context(tempfile.TemporaryDirectory(prefix="dynamo-sglang-"))
            self._options = parse_options(folder, options, scratch, duty)
            self._engine = _make(self._options.args)
            undo.callback(_kill, self._engine)
            self._resolved: dict[str, Any] = self._engine.server_args.resolved_dict()
            super().__init__("sglang", max_waiting=self._options.max_waiting)
            try:
                self.info = self._describe(model, self.call(self._capacity_tokens()))
                self._follow_events(undo)
            except BaseException:
                self.stop_loop()
                raise
            self._undo = undo.pop_all()
        signals.ENGINES.add(self)

    async def _capacity_tokens(self) -> int:
        """Tokens that the KV cache holds. SGLang's scheduler writes its figures when it is ready to work."""
        for _ in range(100):
            loads = await self._engine.tokenizer_manager.get_loads()
            if loads and loads[0].max_total_num_tokens:
                return int(loads[0].max_total_num_tokens)
            await asyncio.sleep(_LOOK_S)
        raise EngineError("SGLang does not say how large its KV cache is; is its scheduler alive?")

    def _describe(self, model: str, capacity_tokens: int) -> EngineInfo:
        config = self._engine.tokenizer_manager.model_config
        block_size = int(self._resolved["page_size"])
        return EngineInfo(
            name="sglang",
            version=SGLANG_VERSION,
            model=model,
            block_size=block_size,
            kv_blocks=capacity_tokens // block_size,
            max_context=min(int(config.context_len), capacity_tokens),
            vocab_size=int(config.vocab_size),
            eos_token_ids=tuple(sorted(config.hf_eos_token_id or ())),
            announces_blocks=bool(self._options.events or self._resolved.get("disable_radix_cache")),
            roles=_ROLES.get(str(self._resolved["disaggregation_mode"]), ("agg",)),
        )

    def _follow_events(self, undo: contextlib.ExitStack) -> None:
        """Until `undo` is carried out. Without a publisher there are none, and routers guess."""
        events = self._options.events
        if not events:
            return
        replay = events.get("replay_endpoint")
        subscriber = KvEventSubscriber(
            reachable(events.get("endpoint", "tcp://*:5557")),
            Translator(self.info.model, self.info.block_size),
            self.add_ops,
            replay_endpoint=reachable(replay) if replay else None,
            topic=events.get("topic", ""),
        )
        undo.callback(subscriber.close)
        subscriber.start()

    # --- the hooks of `AsyncEngine` -----------------------------------------------------------------------------------

    def prepare(self, request: EngineRequest) -> dict[str, Any]:
        if request.lora and request.lora not in self._options.loras:
            raise RequestError("invalid_request", f"this engine holds no LoRA adapter {request.lora!r}")
        mode = str(self._resolved["disaggregation_mode"])
        port = int(self._resolved["disaggregation_bootstrap_port"])
        return {
            **arguments(request, self.info),
            **bootstrap(request.kv_transfer_params, mode, self._options.bootstrap_host, port),
            "rid": f"dynamo-{request.key}.",  # SGLang aborts all whose name begins alike: the dot ends it
        }

    async def generate(self, request: EngineRequest, prepared: dict[str, Any]) -> AsyncGenerator[Delta, None]:
        chunks = Chunks(request.sampling, incremental=bool(self._resolved["incremental_streaming_output"]))
        if self._resolved["disaggregation_mode"] == "prefill":
            yield Delta(kv_transfer_params=_for_decode(prepared))
        ended = False
        try:
            async for chunk in await self._engine.async_generate(**prepared):
                delta = chunks.delta(chunk)
                ended = delta.finish_reason is not None
                yield delta
        except RequestError:  # SGLang gave the request up
            ended = True
            raise
        except ValueError as error:  # how SGLang refuses what a request asks for
            ended = True
            raise RequestError("invalid_request", one_line(error)) from None
        finally:
            if not ended:
                self._engine.tokenizer_manager.abort_request(rid=prepared["rid"])

    async def watch(self) -> str:
        """Read the load, and see whether SGLang's processes live: its own reaction to a death is to end everything."""
        pids = self._engine.get_all_child_pids()
        while not (gone := [pid for pid in pids if not _alive(pid)]):
            for load in await self._engine.tokenizer_manager.get_loads():
                used = -(-int(load.num_used_tokens) // self.info.block_size)
                self.set_engine_load(EngineLoad(waiting=int(load.num_waiting_reqs), kv_blocks_used=used))
            await asyncio.sleep(_LOOK_S)
        return f"SGLang's process {gone[0]} died; its log says why"

    async def shut(self) -> None:
        signals.ENGINES.discard(self)
        await run_blocking(self._undo.close)


def _make(args: dict[str, Any]) -> Engine:
    if threading.current_thread() is threading.main_thread():
        args = {**args, "custom_sigquit_handler": signals.on_quit}
    else:
        logger.warning("SGLang ends this process when it fails: signals can only be caught in the main thread")
    try:
        return Engine(**args)
    except Exception as error:
        # SGLang's boundary: whatever it raises means that it does not run this model with these arguments.
        raise EngineError(f"SGLang does not start: {one_line(error)} (its log, before this, says more)") from error


def _kill(engine: Engine) -> None:
    """End SGLang's processes, and no others: its own `shutdown` kills all children of this process."""
    atexit.unregister(engine.shutdown)
    watchdog = engine.tokenizer_manager._subprocess_watchdog
    if watchdog is not None:
        watchdog.stop()  # it would take the end for a crash
    family: list[psutil.Process] = []
    for pid in engine.get_all_child_pids():
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            family += [*process.children(recursive=True), process]
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(family, timeout=_KILL_TIMEOUT_S)


def _alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _for_decode(prepared: dict[str, Any]) -> dict[str, Any]:
    """What the decode engine's request needs; it has to arrive while this one is still at work."""
    names = ("bootstrap_host", "bootstrap_port", "bootstrap_room")
    return {"do_remote_prefill": True, **{name: prepared[name] for name in names}}
