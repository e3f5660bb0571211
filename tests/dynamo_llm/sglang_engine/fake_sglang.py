"""A stand-in for SGLang, below its own boundary: names and signatures are the recorded ones, outputs are scripted.

A request's tokens count up from its last prompt token. Processes are real (they sleep), and so are the sockets on which
KV events are published.
"""

import asyncio
import json
import os
import pickle
import shutil
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

from event_publisher import Publisher
from recorded_api import Recording

RECORDING = Recording(Path(__file__).parent / "recorded_sglang_0.5.23.json")
VOCABULARY = 1000
EOS = 7

ServerArgs = RECORDING.struct(
    "ServerArgs",
    namespace={"resolved_dict": lambda self: {name: getattr(self, name) for name in self.__struct_fields__}},
)
SamplingParams = RECORDING.struct("SamplingParams")
LoadSnapshot = RECORDING.struct("LoadSnapshot")


class TokenizerManager:
    def __init__(self) -> None:
        self.model_config = SimpleNamespace(context_len=64, vocab_size=VOCABULARY, hf_eos_token_id={EOS})
        self._subprocess_watchdog = SimpleNamespace(stop=lambda: None)
        self.aborted: list[str] = []
        self.load = LoadSnapshot(max_total_num_tokens=1024, num_used_tokens=0, num_waiting_reqs=0)

    def abort_request(self, *args: Any, **kwargs: Any) -> None:
        self.aborted.append(RECORDING.bind("TokenizerManager.abort_request", *args, **kwargs)["rid"])

    async def get_loads(self, *args: Any, **kwargs: Any) -> list[Any]:
        RECORDING.bind("TokenizerControlMixin.get_loads", *args, **kwargs)
        return [self.load]


class Engine:
    """`fail` is what the next constructor raises, `script` what the next requests do (see `_stream`)."""

    made: ClassVar[list["Engine"]] = []
    fail: ClassVar[Exception | None] = None

    def __init__(self, **kwargs: Any) -> None:
        RECORDING.bind("Engine.__init__", **kwargs)
        if Engine.fail is not None:
            raise Engine.fail
        defaults = {"disaggregation_mode": "null", "disaggregation_bootstrap_port": 8998}
        self.server_args = ServerArgs(**{**defaults, "incremental_streaming_output": False, **kwargs})
        self.tokenizer_manager = TokenizerManager()
        self.calls: list[dict[str, Any]] = []
        self.script = ""
        self.pid = os.posix_spawn(shutil.which("sleep") or "sleep", ["sleep", "1000"], dict(os.environ))
        events = json.loads(self.server_args.kv_events_config or "{}")
        assert events.keys() <= set(RECORDING.fields["KVEventsConfig"])
        published = events.get("publisher") == "zmq"
        self.publisher = Publisher(endpoints=(events["endpoint"], events["replay_endpoint"]) if published else ("", ""))
        handler = self.server_args.custom_sigquit_handler
        assert pickle.loads(pickle.dumps(handler)) is handler  # it goes to SGLang's processes with the other arguments
        signal.signal(signal.SIGQUIT, handler)
        Engine.made.append(self)

    def get_all_child_pids(self) -> list[int]:
        return [self.pid]

    def shutdown(self) -> None:
        raise AssertionError("it would kill every child of this process")

    async def async_generate(self, *args: Any, **kwargs: Any) -> AsyncIterator[dict[str, Any]]:
        call = RECORDING.bind("Engine.async_generate", *args, **kwargs)
        SamplingParams(**call["sampling_params"])
        self.calls.append(call)
        assert call["stream"] is True
        return self._stream(call)

    async def _stream(self, call: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """`refuse`: a ValueError; `abort N`: given up with status N; `stop`: at the third token; `short`: no end.

        `hang`: nothing after two.
        """
        if self.script == "refuse":
            raise ValueError("no such thing")
        tokens: list[int] = []
        reason: dict[str, Any] | None = None
        while reason is None:
            await asyncio.sleep(0)
            tokens.append((call["input_ids"][-1] + len(tokens) + 1) % VOCABULARY)
            if len(tokens) == call["sampling_params"]["max_new_tokens"]:
                reason = {"type": "length", "length": len(tokens)}
            if self.script == "stop" and len(tokens) == 3:
                reason = {"type": "stop", "matched": tokens[-1]}
            if self.script.startswith("abort"):
                reason = {"type": "abort", "message": "given\nup", "status_code": int(self.script[6:])}
            if self.script == "short" and len(tokens) == 2:
                return
            if self.script == "hang" and len(tokens) == 3:
                await asyncio.Event().wait()
            begin = len(tokens) - 1 if self.server_args.incremental_streaming_output else 0
            yield {"text": None, "output_ids": tokens[begin:], "meta_info": _meta(call, tokens, begin, reason)}


def _meta(call: dict[str, Any], tokens: list[int], begin: int, reason: dict[str, Any] | None) -> dict[str, Any]:
    meta: dict[str, Any] = {"id": call["rid"], "finish_reason": reason, "cached_tokens": 1, "queue_time": 0.5}
    if call["return_logprob"]:
        top = call["top_logprobs_num"]
        meta["output_token_logprobs"] = [(-0.5, token, None) for token in tokens[begin:]]
        meta["input_token_logprobs"], meta["input_top_logprobs"] = [], []
        if call["logprob_start_len"] == 0:
            prompt = call["input_ids"]
            meta["input_token_logprobs"] = [(None, prompt[0], None), *((-0.25, token, None) for token in prompt[1:])]
        if top:
            likely = [(-0.5 - rank, rank, None) for rank in range(top)]
            meta["output_top_logprobs"] = [likely for _ in tokens[begin:]]
            meta["input_top_logprobs"] = [None, *(likely for _ in meta["input_token_logprobs"][1:])]
    return meta


MODULES: dict[str, dict[str, Any]] = {
    "sglang": {"Engine": Engine, "__version__": RECORDING.version},
    "sglang.srt": {},
    "sglang.srt.server_args": {"ServerArgs": ServerArgs},
    "sglang.srt.sampling": {},
    "sglang.srt.sampling.sampling_params": {"SamplingParams": SamplingParams},
}
