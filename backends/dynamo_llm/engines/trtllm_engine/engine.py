"""TensorRT-LLM behind the interface of all engines: its `LLM`, its iteration figures, and its KV events.

`AsyncEngine` owns the thread with the event loop, the requests in flight and the end; here is what is TensorRT-LLM's
own. Its executor lives in processes that it starts by MPI.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any

from dynamo_llm.engines.async_engine import AsyncEngine
from dynamo_llm.engines.async_types import Delta, EngineDied, EngineLoad, one_line, prompt_tokens, run_blocking
from dynamo_llm.engines.base import ALONE, Duty, EngineError, EngineInfo, EngineRequest, RequestError
from dynamo_llm.engines.model_files import read_eos_token_ids, read_json
from dynamo_llm.engines.trtllm_engine.events import Events
from dynamo_llm.engines.trtllm_engine.handover import to_disaggregated
from dynamo_llm.engines.trtllm_engine.options import parse_options
from dynamo_llm.engines.trtllm_engine.outputs import Results
from dynamo_llm.engines.trtllm_engine.roots import Root, Roots
from dynamo_llm.engines.trtllm_engine.sampling import to_trtllm
from dynamo_llm.engines.trtllm_engine.vendor import (
    LLM,
    VERSION,
    LoRARequest,
    RequestOutput,
    SamplingParams,
    VendorRequestError,
)

_LOOK_S = 0.1
"""How often figures and events are fetched, and how long TensorRT-LLM may wait for news each time."""
_FIGURES_S = 30.0
"""Most that the first figures may take after the first token."""


class TrtllmEngine(AsyncEngine):
    """See the module's docstring. The constructor loads the model, which takes a minute or more."""

    def __init__(self, folder: Path, model: str, options: dict[str, Any], duty: Duty = ALONE) -> None:
        """Raises `EngineError` for options, folders and models that cannot be served."""
        self._options = parse_options(folder, options, duty)
        self._following = True
        """Fetch figures and events. Cancelling alone may fail: `asyncio.wait_for`, inside TensorRT-LLM, can lose it."""
        config = read_json(folder / "config.json")
        self._llm = _make(self._options.args)
        with contextlib.ExitStack() as undo:
            undo.callback(self._llm.shutdown)
            super().__init__("trtllm", max_waiting=self._options.max_waiting)
            try:
                self.info = self._describe(model, folder, config, self.call(self._capacity_blocks()))
            except BaseException:
                self.stop_loop()
                raise
            undo.pop_all()
        self._roots = Roots(self.info.block_size)
        self._events = Events(model, self.info.block_size, self._roots)

    async def _capacity_blocks(self) -> int:
        """KV blocks on the device. TensorRT-LLM says so after a step, and for that it needs a request."""
        params = SamplingParams(end_id=-1, pad_id=0, max_tokens=1, top_k=1, detokenize=False)
        async for _ in self._llm.generate_async([0], sampling_params=params, streaming=True):
            pass
        with contextlib.suppress(asyncio.TimeoutError):
            return await asyncio.wait_for(self._first_figure(), _FIGURES_S)
        raise EngineError("TensorRT-LLM does not say how large its KV cache is: leave enable_iter_perf_stats on")

    async def _first_figure(self) -> int:
        async with aclosing(self._news(self._llm.get_stats_async)) as news:
            async for figures in news:
                if blocks := int(figures.get("kvCacheStats", {}).get("maxNumBlocks", 0)):
                    return blocks
        raise EngineError("TensorRT-LLM gives no figures")  # it does not end by itself

    def _describe(self, model: str, folder: Path, config: dict[str, Any], kv_blocks: int) -> EngineInfo:
        args = self._llm.args
        text = config.get("text_config") or config
        block_size = int(args.kv_cache_config.tokens_per_block)
        own = args.max_seq_len or text.get("max_position_embeddings") or kv_blocks * block_size
        return EngineInfo(
            name="trtllm",
            version=VERSION,
            model=model,
            block_size=block_size,
            kv_blocks=kv_blocks,
            max_context=min(int(own), kv_blocks * block_size),
            vocab_size=int(text["vocab_size"]),
            eos_token_ids=read_eos_token_ids(folder, text),
            announces_blocks=self._options.publishes_events or not self._options.reuses_blocks,
            roles=("agg",) if args.cache_transceiver_config is None else ("agg", "prefill", "decode"),
        )

    # --- the hooks of `AsyncEngine` -----------------------------------------------------------------------------------

    def prepare(self, request: EngineRequest) -> dict[str, Any]:
        args = self._llm.args
        transfers = args.cache_transceiver_config is not None
        disaggregated = to_disaggregated(request.kv_transfer_params, enabled=transfers)
        prompt = prompt_tokens(request)
        most = args.max_num_tokens
        if most and len(prompt) > most and not args.enable_chunked_prefill:
            message = f"a prompt of {len(prompt)} tokens; without enable_chunked_prefill at most {most} are taken"
            raise RequestError("context_length_exceeded", message)
        params = to_trtllm(request, self.info, in_torch=self._options.samples_in_torch)
        if params.guided_decoding is not None and args.guided_decoding_backend is None:
            message = "guided decoding is off: start the engine with guided_decoding_backend"
            raise RequestError("invalid_request", message)
        return {
            "inputs": prompt,
            "sampling_params": params,
            "lora_request": self._lora(request.lora),
            "disaggregated_params": disaggregated,
            "cache_salt": request.cache_salt or None,
        }

    async def generate(self, request: EngineRequest, prepared: dict[str, Any]) -> AsyncGenerator[Delta, None]:
        self._roots.note(request.token_ids, Root(request.lora, request.cache_salt))
        results = Results(request.sampling.logprobs)
        async with aclosing(self._steps(prepared)) as steps:
            async for result in steps:
                yield results.delta(result)

    async def watch(self) -> str:
        """Figures, events and life, whichever fails first."""
        followers = [self._follow_load(), self._until_shut_down()]
        if self._options.publishes_events:
            followers.append(self._follow_events())
        tasks = [asyncio.ensure_future(follower) for follower in followers]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return done.pop().result()
        finally:
            self._following = False
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def shut(self) -> None:
        await run_blocking(self._llm.shutdown)

    # --- TensorRT-LLM's side ------------------------------------------------------------------------------------------

    async def _steps(self, prepared: dict[str, Any]) -> AsyncGenerator[RequestOutput, None]:
        """A request's result after each step, and TensorRT-LLM's errors as ours. Left early, it aborts the request."""
        try:
            stream = self._llm.generate_async(**prepared, streaming=True)
        except (ValueError, VendorRequestError) as error:
            raise RequestError("invalid_request", f"TensorRT-LLM: {one_line(error)}") from None
        except Exception as error:
            raise _died(error) from error
        over = False
        try:
            async for result in stream:
                over = result.finished
                yield result
        except (ValueError, AssertionError, VendorRequestError) as error:  # they are about this one request
            raise RequestError("engine_failure", f"TensorRT-LLM: {one_line(error)}") from error
        except Exception as error:
            over = True
            raise _died(error) from error
        finally:
            if not over:
                stream.abort()

    async def _until_shut_down(self) -> str:
        while self._llm._check_health():  # noqa: ASYNC110 - TensorRT-LLM has no event for it
            await asyncio.sleep(_LOOK_S)
        return "TensorRT-LLM shut itself down; its log says why"

    async def _follow_load(self) -> str:
        async with aclosing(self._news(self._llm.get_stats_async)) as news:
            async for figures in news:
                used = int(figures.get("kvCacheStats", {}).get("usedNumBlocks", 0))
                cached = max(min(self._events.blocks, self.info.kv_blocks) - used, 0)
                waiting = figures.get("numQueuedRequests")
                self.set_engine_load(EngineLoad(waiting=waiting, kv_blocks_used=used, kv_blocks_cached=cached))
        return "TensorRT-LLM gives no figures any more"

    async def _follow_events(self) -> str:
        async with aclosing(self._news(self._llm.get_kv_cache_events_async)) as news:
            async for event in news:
                self.add_ops(self._events.take(event))
        return "TensorRT-LLM gives no KV events any more"

    async def _news(self, ask: Callable[..., Any]) -> AsyncGenerator[dict[str, Any], None]:
        """What there is and what comes. The question itself may block, and nothing may be asked before the first
        request."""
        while self._following:
            news = await run_blocking(partial(ask, _LOOK_S))
            news.mark_undone()  # else, once run dry, it stays so until the next request
            async for item in news:
                yield item
                if not self._following:
                    return
            await asyncio.sleep(_LOOK_S)

    def _lora(self, name: str) -> LoRARequest | None:
        if not name:
            return None
        lora = self._options.loras.get(name)
        if lora is None:
            known = ", ".join(sorted(self._options.loras)) or "none"
            raise RequestError("invalid_request", f"there is no LoRA adapter {name!r}; the engine holds: {known}")
        return lora


def _died(error: Exception) -> EngineDied:
    """TensorRT-LLM's boundary: what it raises beside refusals came from its executor, and it shuts itself down."""
    return EngineDied(f"TensorRT-LLM's executor failed: {one_line(error)}")


def _make(args: dict[str, Any]) -> LLM:
    try:
        return LLM(**args)
    except Exception as error:
        # TensorRT-LLM's boundary: whatever it raises means that it does not run this model with these arguments.
        message = f"TensorRT-LLM does not start: {one_line(error)} (its log, before this, says more)"
        raise EngineError(message) from error
