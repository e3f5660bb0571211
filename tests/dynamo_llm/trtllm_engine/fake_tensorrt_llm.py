"""A stand-in for TensorRT-LLM, below its own boundary: names and signatures are the recorded ones, outputs scripted.

A request's tokens count up from its last prompt token. Figures and events are queues that are fetched, which say "done"
when they run dry, as TensorRT-LLM's do.
"""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
from recorded_api import Recording

RECORDING = Recording(Path(__file__).parent / "recorded_tensorrt_llm_1.2.1.json")
VOCABULARY = 1000
BLOCKS = 64
BLOCK_SIZE = 16

GuidedDecodingParams = RECORDING.struct("GuidedDecodingParams")
DisaggregatedParams = RECORDING.struct("DisaggregatedParams")
CompletionOutput = RECORDING.struct("CompletionOutput")
Logprob = RECORDING.struct("Logprob")
LoRARequest = RECORDING.struct("LoRARequest")


class RequestError(RuntimeError):
    """A request that TensorRT-LLM's executor refuses or gives up."""


class SamplingParams(RECORDING.struct("SamplingParams")):  # type: ignore[misc]
    """As the real one: at most one guide."""

    def __post_init__(self) -> None:
        guide = self.guided_decoding
        if guide is not None and sum(bool(getattr(guide, name)) for name in guide.__struct_fields__) > 1:
            raise ValueError("Only one guide\ncan be used")


class TorchLlmArgs:
    model_fields: ClassVar[dict[str, None]] = dict.fromkeys(
        [*RECORDING.fields["BaseLlmArgs"], *RECORDING.fields["TorchLlmArgs"]]
    )


class News:
    """What `get_stats_async` and `get_kv_cache_events_async` hand out."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.timeout = 0.0
        self._done = False

    def mark_undone(self, *args: Any, **kwargs: Any) -> None:
        RECORDING.bind("IterationResult.mark_undone", *args, **kwargs)
        self._done = False

    def __aiter__(self) -> "News":
        return self

    async def __anext__(self) -> dict[str, Any]:
        if self._done:
            raise StopAsyncIteration
        try:
            return await asyncio.wait_for(self.queue.get(), self.timeout)
        except asyncio.TimeoutError:
            self._done = True
            raise StopAsyncIteration from None


class Result:
    """A request's result: one object for all its steps. `script`: see `_steps`."""

    def __init__(self, llm: "LLM", call: dict[str, Any]) -> None:
        self._llm = llm
        self._call = call
        self.outputs = [CompletionOutput(index=0, token_ids=[], logprobs=[])]
        self.finished = False
        self.cached_tokens = 0
        self._iterator = self._steps(call["sampling_params"])

    def abort(self, *args: Any, **kwargs: Any) -> None:
        RECORDING.bind("GenerationResult.abort", *args, **kwargs)
        self._llm.aborted.append(self._call["inputs"])

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._iterator

    async def _steps(self, params: Any) -> AsyncIterator["Result"]:
        """`stop`: at the third token; `hang`: nothing after two; `give up`, `break`: the executor refuses, or fails,
        after one; `odd`: an end that nobody knows; `short`: no end."""
        script, output = self._llm.script, self.outputs[0]
        handed = self._call.get("disaggregated_params")
        output.disaggregated_params = handed
        first = list(handed.first_gen_tokens or []) if handed is not None else []
        while not self.finished:
            await asyncio.sleep(0)
            count = len(output.token_ids)
            if script == "hang" and count == 2:
                await asyncio.Event().wait()
            if script == "give up" and count == 1:
                raise RequestError("no\nroom")
            if script == "short" and count == 1:
                return
            if script == "break" and count == 1:
                self._llm.healthy = False
                raise RuntimeError("an illegal memory access")
            token = first[count] if count < len(first) else (self._call["inputs"][-1] + count + 1) % VOCABULARY
            output.token_ids.append(token)
            if params.logprobs:
                output.logprobs.append(self._logprobs(token, params.logprobs))
            self.cached_tokens = 1
            self._end(params, script)
            yield self

    def _end(self, params: Any, script: str) -> None:
        output, handed = self.outputs[0], self._call.get("disaggregated_params")
        if handed is not None and handed.request_type == "context_only":
            output.finish_reason = "not_finished"
            output.disaggregated_params = DisaggregatedParams(
                request_type="context_only",
                first_gen_tokens=list(output.token_ids),
                ctx_request_id=77,
                opaque_state=b"\0x",
            )
        elif len(output.token_ids) == params.max_tokens:
            output.finish_reason = "length"
        elif script in ("stop", "odd") and len(output.token_ids) == 3:
            output.finish_reason = "stop" if script == "stop" else "timeout"
            if not params.include_stop_str_in_output:
                output.token_ids.pop()
        self.finished = output.finish_reason is not None

    def _logprobs(self, token: int, count: int) -> dict[int, Any]:
        entry = {rank: Logprob(logprob=-0.5 - rank, rank=rank + 1) for rank in range(count)}
        return {**entry, token: Logprob(logprob=-9.0, rank=500)}


class LLM:
    """`fail` is what the next constructor raises, `refuse` what the next requests are refused with."""

    made: ClassVar[list["LLM"]] = []
    fail: ClassVar[Exception | None] = None
    figures: ClassVar[bool] = True

    def __init__(self, **kwargs: Any) -> None:
        given = RECORDING.bind("BaseLLM.__init__", **kwargs)
        assert given.pop("kwargs", {}).keys() <= TorchLlmArgs.model_fields.keys()
        if LLM.fail is not None:
            raise LLM.fail
        cache = kwargs["kv_cache_config"]
        assert cache.keys() <= set(RECORDING.fields["KvCacheConfig"])
        args = {**TorchLlmArgs.model_fields, "max_num_tokens": 8192, **kwargs}
        args["kv_cache_config"] = SimpleNamespace(tokens_per_block=cache.get("tokens_per_block", BLOCK_SIZE))
        self.args = SimpleNamespace(**args)
        self.given = kwargs
        self.calls: list[dict[str, Any]] = []
        self.aborted: list[list[int]] = []
        self.script = ""
        self.refuse: Exception | None = None
        self.healthy = True
        self.shut_down = 0
        self.stats: News | None = None
        self.events: News | None = None
        LLM.made.append(self)

    def generate_async(self, *args: Any, **kwargs: Any) -> Result:
        call = RECORDING.bind("BaseLLM.generate_async", *args, **kwargs)
        assert call["streaming"] is True
        assert call["sampling_params"].end_id is not None  # without a tokenizer it knows none
        if self.refuse is not None:
            raise self.refuse
        if self.stats is None or self.events is None:
            self.stats, self.events = News(), News()
            if LLM.figures:
                self.say(0)
        self.calls.append(call)
        return Result(self, call)

    def get_stats_async(self, *args: Any, **kwargs: Any) -> News:
        return self._ask("BaseLLM.get_stats_async", self.stats, *args, **kwargs)

    def get_kv_cache_events_async(self, *args: Any, **kwargs: Any) -> News:
        return self._ask("BaseLLM.get_kv_cache_events_async", self.events, *args, **kwargs)

    def _ask(self, function: str, news: News | None, *args: Any, **kwargs: Any) -> News:
        timeout = RECORDING.bind(function, *args, **kwargs).get("timeout", 2)
        assert news is not None, "nothing may be asked before the first request"
        news.timeout = timeout
        return news

    def say(self, used: int, queued: int = 0) -> None:
        """An iteration's figures; on the engine's loop."""
        assert self.stats is not None
        cache = {"maxNumBlocks": BLOCKS, "usedNumBlocks": used, "freeNumBlocks": BLOCKS - used}
        self.stats.queue.put_nowait({"numActiveRequests": 1, "numQueuedRequests": queued, "kvCacheStats": cache})

    def _check_health(self, *args: Any, **kwargs: Any) -> bool:
        RECORDING.bind("BaseLLM._check_health", *args, **kwargs)
        return self.healthy

    def shutdown(self, *args: Any, **kwargs: Any) -> None:
        RECORDING.bind("BaseLLM.shutdown", *args, **kwargs)
        self.shut_down += 1
        self.healthy = False


def event(number: int, kind: str, *, window: int = 4096, **data: Any) -> dict[str, Any]:
    """A KV event as TensorRT-LLM writes it."""
    assert {"type", *data} == set(RECORDING.keys[f"KVCacheEventSerializer._{kind}_to_json"])
    found = {"event_id": number, "data": {"type": kind, **data}, "window_size": window}
    assert found.keys() < set(RECORDING.keys["KVCacheEventSerializer.to_json_str"])
    return found


def stored(number: int, names: list[int], tokens: list[int], parent: int | None = None, **more: Any) -> dict[str, Any]:
    """Blocks of `BLOCK_SIZE` tokens, the last one of what is left. `level`: the cache level of all."""
    level = more.pop("level", 0)
    blocks = [
        {
            "type": "stored_block",
            "block_hash": name,
            "tokens": [
                {"type": "unique_token", "token_id": token, "token_extra_id": 0}
                for token in tokens[index * BLOCK_SIZE :][:BLOCK_SIZE]
            ],
            "cache_level": level,
            "priority": 35,
        }
        for index, name in enumerate(names)
    ]
    for block in blocks:
        assert block.keys() == set(RECORDING.keys["KVCacheEventSerializer._stored_block_to_json"])
    return event(number, "stored", parent_hash=parent, blocks=blocks, **more)


def removed(number: int, names: list[int], **more: Any) -> dict[str, Any]:
    return event(number, "removed", block_hashes=names, **more)


def moved(number: int, name: int, old: int, new: int) -> dict[str, Any]:
    change = {"type": "event_diff", "old_value": old, "new_value": new}
    assert change.keys() == set(RECORDING.keys["KVCacheEventSerializer._event_diff_to_json"])
    return event(number, "updated", block_hash=name, cache_level=change, priority=None)


def bias(params: Any) -> dict[int, float]:
    """A request's logit bias, as a map."""
    values = np.asarray(params.embedding_bias)
    assert values.shape == (VOCABULARY,)
    return {int(token): float(values[token]) for token in np.flatnonzero(values)}


MODULES: dict[str, dict[str, Any]] = {
    "tensorrt_llm": {"LLM": LLM, "SamplingParams": SamplingParams, "__version__": RECORDING.version},
    "tensorrt_llm.llmapi": {
        "DisaggregatedParams": DisaggregatedParams,
        "GuidedDecodingParams": GuidedDecodingParams,
        "LoRARequest": LoRARequest,
        "RequestError": RequestError,
        "RequestOutput": Result,
        "TorchLlmArgs": TorchLlmArgs,
    },
}
