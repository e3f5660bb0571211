"""vLLM behind the interface of all engines: `AsyncLLM`, its scheduler's figures, and its KV events over ZMQ.

`AsyncEngine` owns the thread with the event loop, the requests in flight and the end; here is what is vLLM's own. Its
engine core is a process that vLLM starts (on a CPU, with one more for the model): its death is ours.
"""

import asyncio
import contextlib
import os
import tempfile
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from vllm import __version__ as VLLM_VERSION
from vllm.config import KVEventsConfig, KVTransferConfig
from vllm.exceptions import GracefulHTTPError, VLLMClientError
from vllm.inputs.engine import TokensInput, tokens_input
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.stats import SchedulerStats

from dynamo_llm.engines.async_engine import AsyncEngine
from dynamo_llm.engines.async_types import Delta, EngineDied, EngineLoad, one_line, run_blocking
from dynamo_llm.engines.base import ALONE, Duty, EngineError, EngineInfo, EngineRequest, RequestError
from dynamo_llm.engines.kv_events import KvEventSubscriber, Translator
from dynamo_llm.engines.kv_events.subscribe import reachable
from dynamo_llm.engines.vllm_engine.figures import Figures
from dynamo_llm.engines.vllm_engine.options import parse_options
from dynamo_llm.engines.vllm_engine.outputs import to_delta
from dynamo_llm.engines.vllm_engine.sampling import prompt_ids, to_vllm
from dynamo_llm.engines.vllm_engine.transfer import environment, lease_s
from kvstore.cards import Role
from kvstore.wire import Load

_LIVENESS_S = 0.25
"""How often an idle engine core is looked at: when it dies, vLLM notes it, and tells only those who wait for tokens."""
_SHUTDOWN_S = 10.0
"""Time for vLLM's processes to end by themselves; then vLLM kills them."""


class VllmEngine(AsyncEngine):
    """See the module's docstring. The constructor loads the model, which takes tens of seconds."""

    def __init__(
        self,
        folder: Path,
        model: str,
        options: dict[str, Any],
        duty: Duty = ALONE,
    ) -> None:
        """Raises `EngineError` for options, folders and models that cannot be served."""
        _prepare_environment()
        with contextlib.ExitStack() as undo:
            # Where the sockets of the KV events lie: a socket's path must be short.
            scratch = undo.enter_context(tempfile.TemporaryDirectory(prefix="dynamo-vllm-"))
            self._options = parse_options(folder, options, _events_config(scratch), duty)
            self._lease_s = lease_s(self._options.args)
            super().__init__("vllm", max_waiting=self._options.max_waiting)
            self._pace = self._figures = Figures()
            self._translator: Translator | None = None
            try:
                with environment(self._options.args, duty):
                    self._llm = self.call(self._make())
                undo.callback(_shut_down, self._llm)
                self.call(self._load_adapters())
                self.info = _info(self._llm, model)
                self._follow_events(undo)
            except BaseException:
                undo.close()
                self.stop_loop()
                raise
            self._undo = undo.pop_all()

    async def _make(self) -> AsyncLLM:
        """On the loop, so that vLLM's sockets belong to it from the beginning."""
        args = self._options.args
        try:
            config = args.create_engine_config(UsageContext.ENGINE_CONTEXT)
            if args.disable_log_stats:  # exact figures of each step; vLLM's own logger would print a line for each
                config.observability_config.enable_logging_iteration_details = True
            llm = AsyncLLM.from_vllm_config(
                config,
                stat_loggers=[lambda config, index=0: _StepLogger(self._stepped)],
                enable_log_requests=args.enable_log_requests,
                disable_log_stats=args.disable_log_stats,
            )
        except Exception as error:
            # vLLM's boundary: whatever it raises means that it does not run this model with these arguments.
            raise EngineError(f"vLLM does not start: {one_line(error)} (its log, before this, says more)") from error
        await llm.get_supported_tasks()  # vLLM keeps the answer, and from now on enters a request without a pause
        return llm

    async def _load_adapters(self) -> None:
        """Each once. vLLM would read one when the first request asks for it: too late to refuse a broken one."""
        name = ""
        try:
            for lora in self._options.loras.values():
                name = lora.lora_name
                await self._llm.add_lora(lora)
        except Exception as error:
            # vLLM's boundary, as above.
            raise EngineError(f"lora_modules: vLLM does not load the adapter {name!r}: {one_line(error)}") from error

    def _follow_events(self, undo: contextlib.ExitStack) -> None:
        """Until `undo` is carried out. Without a publisher there are none, and routers guess."""
        config = self._llm.vllm_config.kv_events_config
        if config is None or not _publishes(config):
            return
        self._translator = Translator(self.info.model, self.info.block_size)
        subscriber = KvEventSubscriber(
            reachable(config.endpoint),
            self._translator,
            self.add_ops,
            replay_endpoint=reachable(config.replay_endpoint) if config.replay_endpoint else None,
            topic=config.topic,
            on_lost=self._events_lost,
        )
        undo.callback(subscriber.close)
        subscriber.start()

    def _events_lost(self) -> None:
        """On the subscriber's thread. We believe the cache empty then; vLLM makes it so, unless it is at work."""
        asyncio.run_coroutine_threadsafe(self._llm.reset_prefix_cache(), self._loop)

    # --- the hooks of `AsyncEngine` -----------------------------------------------------------------------------------

    def prepare(self, request: EngineRequest) -> "_Prepared":
        lora = self._lora(request.lora)
        params = to_vllm(request, self.info)
        prompt = tokens_input(prompt_ids(request), cache_salt=request.cache_salt or None)
        config = self._llm.vllm_config
        try:
            params.verify(
                config.model_config,
                config.speculative_config,
                config.structured_outputs_config,
                self._llm.renderer.tokenizer,
            )
        except (ValueError, VLLMClientError) as error:
            raise _refusal(error) from None
        return _Prepared(prompt, params, lora)

    async def generate(self, request: EngineRequest, prepared: "_Prepared") -> AsyncGenerator[Delta, None]:
        name, sampling = str(request.key), request.sampling
        ended = first = False
        stream = self._llm.generate(
            prepared.prompt, prepared.params, name, lora_request=prepared.lora, priority=request.priority
        )
        try:
            async with aclosing(stream):
                async for output in stream:
                    delta = to_delta(output, prepared.params.num_logprobs, sampling.prompt_logprobs, self._lease_s)
                    ended = delta.finish_reason is not None
                    if not first and delta.token_ids:
                        first = True
                        self._figures.first_token(len(request.token_ids) // 4 - delta.cached_tokens)
                    yield delta
        except EngineDeadError:
            raise EngineDied("vLLM's engine core died; its log says why") from None
        except GracefulHTTPError as error:  # a full queue
            raise RequestError("overloaded", one_line(error)) from None
        except (VLLMClientError, ValueError) as error:
            raise _refusal(error) from None
        except EngineGenerateError as error:
            cause = error.__cause__ or error
            raise RequestError("engine_failure", f"vLLM: {one_line(cause)}") from error
        finally:
            if not ended:  # vLLM itself does not abort a request that was cancelled while it was being entered
                await self._abort(name)

    async def watch(self) -> str:
        while not self._llm.errored:  # noqa: ASYNC110 - vLLM has no event for it
            await asyncio.sleep(_LIVENESS_S)
        return "vLLM's engine core died; its log says why"

    async def shut(self) -> None:
        if self._llm.output_handler is not None:
            self._llm.output_handler.cancel()  # it would take the end for a death, and fill the log with it
        await run_blocking(self._undo.close)

    def load(self) -> Load:
        load = super().load()
        resident = self._translator.blocks if self._translator else 0
        return msgspec.structs.replace(
            load,
            waiting_prefill_tokens=max(load.waiting_prefill_tokens - self._figures.prefill_done, 0),
            kv_blocks_cached=max(min(resident, load.kv_blocks_total) - load.kv_blocks_used, 0),
        )

    # --- vLLM's side --------------------------------------------------------------------------------------------------

    def _stepped(self, stats: SchedulerStats) -> None:
        """On the loop, in the turn that carries the step's outputs and before they are read."""
        self._figures.step(stats)
        waiting = stats.num_waiting_reqs + stats.num_skipped_waiting_reqs
        used = round(stats.kv_cache_usage * self.info.kv_blocks)
        self.set_engine_load(EngineLoad(waiting=waiting, kv_blocks_used=used))

    async def _abort(self, name: str) -> None:
        if not self._llm.errored:
            await self._llm.abort(name)

    def _lora(self, name: str) -> LoRARequest | None:
        if not name:
            return None
        lora = self._options.loras.get(name)
        if lora is None:
            known = ", ".join(sorted(self._options.loras)) or "none"
            raise RequestError("invalid_request", f"there is no LoRA adapter {name!r}; the engine holds: {known}")
        return lora


class _Prepared(NamedTuple):
    prompt: TokensInput
    params: SamplingParams
    lora: LoRARequest | None


class _StepLogger(StatLoggerBase):
    """vLLM calls it once a step."""

    def __init__(self, stepped: Callable[[SchedulerStats], None]) -> None:
        self._stepped = stepped

    def record(self, scheduler_stats: SchedulerStats | None, *args: Any, **kwargs: Any) -> None:
        if scheduler_stats is not None:
            self._stepped(scheduler_stats)

    def log_engine_initialized(self) -> None:
        """Nothing to say."""


def _shut_down(llm: AsyncLLM) -> None:
    """Not on the loop: vLLM's sockets close there."""
    llm.shutdown(_SHUTDOWN_S)
    llm.engine_core.resources.ctx.term()  # vLLM leaves it to the garbage collection, with a warning


def _prepare_environment() -> None:
    """Before vLLM reads it; what the user has set stays."""
    # A fork of this process would carry its threads' locks into the engine core, taken for ever.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


def _events_config(scratch: str) -> KVEventsConfig:
    return KVEventsConfig(
        enable_kv_cache_events=True,
        publisher="zmq",
        endpoint=f"ipc://{scratch}/events",
        replay_endpoint=f"ipc://{scratch}/replay",
    )


def _info(llm: AsyncLLM, model: str) -> EngineInfo:
    """After the start, when vLLM has settled what its arguments left open."""
    cache, config = llm.vllm_config.cache_config, llm.model_config
    generation = config.try_get_generation_config().get("eos_token_id")
    eos = [generation] if isinstance(generation, int) else list(generation or ())
    primary = llm.renderer.get_eos_token_id()
    return EngineInfo(
        name="vllm",
        version=VLLM_VERSION,
        model=model,
        block_size=cache.block_size,
        kv_blocks=(cache.num_gpu_blocks or 1) - 1,  # vLLM keeps one as a placeholder
        max_context=config.max_model_len,
        vocab_size=config.get_vocab_size(),
        eos_token_ids=tuple(dict.fromkeys([*([] if primary is None else [primary]), *eos])),
        announces_blocks=not cache.enable_prefix_caching or _publishes(llm.vllm_config.kv_events_config),
        roles=_roles(llm.vllm_config.kv_transfer_config),
    )


def _publishes(events: KVEventsConfig | None) -> bool:
    return events is not None and events.enable_kv_cache_events and events.publisher == "zmq"


def _roles(transfer: KVTransferConfig | None) -> tuple[Role, ...]:
    """A connector that does not do both is said so by `kv_role`."""
    if transfer is None or transfer.kv_connector is None:
        return ("agg",)
    roles: dict[str, tuple[Role, ...]] = {"kv_producer": ("agg", "prefill"), "kv_consumer": ("agg", "decode")}
    return roles.get(str(transfer.kv_role), ("agg", "prefill", "decode"))


def _refusal(error: Exception) -> RequestError:
    return RequestError("invalid_request", one_line(error))
