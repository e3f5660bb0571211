"""What `async_engine.AsyncEngine` and its subclasses say to each other, and what they do alike."""

import asyncio
import contextlib
import difflib
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, TypeVar

import numpy as np
from msgspec import Struct

from dynamo_llm.engines.base import EngineInfo, EngineRequest, RequestError
from kvstore.wire import FinishReason, TokenLogprob, WireError

_T = TypeVar("_T")


class Delta(Struct, frozen=True, kw_only=True):
    """What a request got since its last delta. The first with a token carries what `Started` needs; one may come before
    it with nothing but `kv_transfer_params`, where another engine has to know them to begin."""

    token_ids: list[int] = []
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    cached_tokens: int = 0
    queue_ms: float = 0.0
    prompt_logprobs: list[TokenLogprob | None] | None = None
    kv_transfer_params: dict[str, Any] | None = None
    error: WireError | None = None


class EngineLoad(Struct, frozen=True, kw_only=True):
    """What an engine says of itself."""

    waiting: int | None = None
    """Requests not in the batch yet; None: it does not say, and those without a first token are counted."""
    kv_blocks_used: int = 0
    kv_blocks_cached: int = 0


class EngineDied(Exception):
    """Raised by `generate`: the engine as a whole is gone, not one request."""


def check_request(request: EngineRequest, info: EngineInfo) -> None:
    """Raises `RequestError` for a prompt that no engine can serve, in the words of the built-in one."""
    if not request.token_ids or len(request.token_ids) % 4:
        raise RequestError("invalid_request", "token_ids must be one or more little-endian uint32")
    tokens = np.frombuffer(request.token_ids, dtype="<u4")
    _check_ids("token_ids names", (int(tokens.max()),), info)
    _check_ids("logit_bias names", request.sampling.logit_bias, info)
    _check_ids("stop_token_ids names", request.sampling.stop_token_ids, info)
    if len(tokens) >= info.max_context:
        message = f"the prompt has {len(tokens)} tokens; with the answer at most {info.max_context} fit"
        raise RequestError("context_length_exceeded", message)


def prompt_tokens(request: EngineRequest) -> list[int]:
    """The prompt as engines take it that are called in Python."""
    tokens: list[int] = np.frombuffer(request.token_ids, dtype="<u4").tolist()
    return tokens


def tokens_left(request: EngineRequest, info: EngineInfo) -> int:
    """Most tokens still to be generated: what an earlier attempt generated counts, and the context has an end."""
    prompt = len(request.token_ids) // 4
    asked = request.sampling.max_tokens
    room = info.max_context - prompt
    return max(room if asked is None else min(asked - request.generated, room), 1)


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that looks most like a wrong one."""
    return difflib.get_close_matches(name, list(known), n=1, cutoff=0)[0]


def one_line(error: BaseException) -> str:
    """What an error of others says, as our messages have to be."""
    return " ".join(str(error).split()) or type(error).__name__


class Ranked(Protocol):
    """A token's log-probability as vLLM and TensorRT-LLM say it; ranks count from 1."""

    logprob: float
    rank: int | None


def token_logprob(token: int, entry: Mapping[int, Ranked], count: int) -> TokenLogprob:
    """`entry` holds the `count` likeliest tokens, or as many that the request named, and the token itself."""
    ranked = sorted(entry.items(), key=lambda item: (-item[1].logprob, item[1].rank or 0, item[0]))
    top = [(other, one.logprob) for other, one in ranked if (one.rank or 0) <= count]
    return TokenLogprob(token, entry[token].logprob, top)


def _check_ids(what: str, ids: Iterable[int], info: EngineInfo) -> None:
    for token in ids:
        if not 0 <= token < info.vocab_size:
            message = f"{what} token {token}, outside the vocabulary of {info.vocab_size}"
            raise RequestError("invalid_request", message)


async def run_blocking(function: Callable[[], _T]) -> _T:
    """Call what blocks on a daemon thread of its own: one that hangs holds up neither the loop nor the interpreter's
    end. Results and errors come through."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[_T] = loop.create_future()

    def settle(set_it: Callable[[Any], None], value: Any) -> None:
        if not done.done():
            set_it(value)

    def work() -> None:
        try:
            outcome: tuple[Callable[[Any], None], Any] = done.set_result, function()
        except Exception as error:  # noqa: BLE001 - carried over to the one who waits
            outcome = done.set_exception, error
        with contextlib.suppress(RuntimeError):  # nobody waits any more
            loop.call_soon_threadsafe(settle, *outcome)

    threading.Thread(target=work, daemon=True).start()
    return await done
