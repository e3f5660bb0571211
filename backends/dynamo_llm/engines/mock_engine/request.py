"""Turns an `EngineRequest` into a `MockRequest`: its answer and its end are settled here, before it is scheduled."""

from array import array
from math import log

from msgspec import Struct
from xxhash import xxh3_64_intdigest

from dynamo_llm.engines.base import EngineInfo, EngineRequest, RequestError
from dynamo_llm.engines.checks import check_request
from dynamo_llm.engines.mock_engine.sequence import MockSequence
from dynamo_llm.engines.mock_engine.words import BEGINNINGS
from kvstore.hashing import block_hashes, root_seed
from kvstore.wire import FinishReason, TokenLogprob


class Answers(Struct, frozen=True):
    """What every answer of an engine is made from."""

    words: tuple[int, ...]
    tape: list[int]
    mean_output_tokens: int


class MockRequest(MockSequence):
    """A sequence with its tokens: token `i` of its output is `tape[start + i]`."""

    __slots__ = (
        "_block_size",
        "_origin",
        "_root",
        "_tail",
        "first_step_s",
        "logprobs",
        "priority",
        "prompt_logprobs",
        "reason",
        "shift",
        "start",
        "started",
        "submitted_s",
        "tape",
    )

    def __init__(self, request: EngineRequest, info: EngineInfo, answer: "_Answer", submitted_s: float) -> None:
        tokens, size = len(request.token_ids) // 4, info.block_size
        self._block_size = size
        self._root = root_seed(info.model, request.lora, request.cache_salt)
        super().__init__(
            request.key,
            tokens,
            tokens - request.generated + answer.tokens,
            block_hashes(request.token_ids, size, seed=self._root).tolist(),
            prompt_tokens=tokens - request.generated,
        )
        self._tail = request.token_ids[tokens // size * size * 4 :]
        """Tokens after the last whole block."""
        self.priority = request.priority
        self.logprobs = request.sampling.logprobs
        self.prompt_logprobs: list[TokenLogprob | None] | None = None
        self.tape, self.start = answer.tape, answer.start
        self._origin = answer.start - self.prompt_tokens
        """Where the sequence, prompt and output, would begin on the tape."""
        self.shift = 0
        """While it decodes: place on the tape of its newest token, less the scheduler's count of steps."""
        self.reason: FinishReason = answer.reason
        """Why it ends when it ends by itself."""
        self.submitted_s = submitted_s
        self.first_step_s: float | None = None
        self.started = False
        """Its first output has been made."""

    def name(self, index: int, parent: int | None) -> int:
        tail, self._tail = self._tail, b""  # of the first such block
        tokens = len(tail) // 4
        end = self._origin + (index + 1) * self._block_size
        filled = array("I", self.tape[end - self._block_size + tokens : end]).tobytes()
        return xxh3_64_intdigest(tail + filled, self._root if parent is None else parent)


class _Answer(Struct, frozen=True):
    """What a request is to get."""

    tape: list[int]
    start: int
    tokens: int
    """At the end, those of an earlier attempt included."""
    reason: FinishReason


def make_request(request: EngineRequest, info: EngineInfo, answers: Answers, submitted_s: float) -> MockRequest:
    """Raises `RequestError` for what can never be served."""
    check_request(request, info)
    sampling = request.sampling
    if request.kv_transfer_params is not None:
        raise RequestError(
            "invalid_request", "this engine does not take KV blocks from elsewhere; drop kv_transfer_params"
        )
    if sampling.extra:
        raise RequestError(
            "invalid_request",
            f"unknown sampling option {next(iter(sampling.extra))!r}; this engine has none of its own",
        )
    made = MockRequest(request, info, _answer(request, info, answers), submitted_s)
    if sampling.prompt_logprobs is not None:
        prompt = array("I", request.token_ids[: made.prompt_tokens * 4])
        count = sampling.prompt_logprobs
        made.prompt_logprobs = [None, *(make_logprob(token, count, answers.words) for token in prompt[1:])]
    return made


def _answer(request: EngineRequest, info: EngineInfo, answers: Answers) -> _Answer:
    sampling, generated = request.sampling, request.generated
    prompt = request.token_ids[: len(request.token_ids) - generated * 4]
    seed = sampling.seed if sampling.temperature else None
    place = xxh3_64_intdigest(prompt, root_seed("", request.lora, "" if seed is None else str(seed)))
    room = info.max_context - len(prompt) // 4
    tape, start = answers.tape, place % BEGINNINGS
    tokens = max(min(sampling.max_tokens or room, room), generated + 1)
    ends_itself = False
    if sampling.max_tokens is None and not sampling.ignore_eos and info.eos_token_ids:
        own = max(_own_length(answers.mean_output_tokens, place), sampling.min_tokens + 1, generated + 1)
        ends_itself, tokens = own <= room, min(own, room)
    stops = set(sampling.stop_token_ids).intersection(answers.words)
    if not stops and not ends_itself:
        return _Answer(tape, start, tokens, "length")
    script = tape[start : start + tokens]
    stopped = _stop(script, stops, generated, sampling.min_tokens, answers.words) if stops else None
    if stopped is not None:
        return _Answer(script, 0, stopped, "stop")
    if ends_itself:
        script[-1] = info.eos_token_ids[0]
    return _Answer(script, 0, tokens, "stop" if ends_itself else "length")


def _own_length(mean: int, place: int) -> int:
    """Of an answer that ends by itself: any length from half the mean to one and a half, each as likely."""
    spread = mean // 2
    return mean - spread + (place // BEGINNINGS) % (2 * spread + 1)


def _stop(script: list[int], stops: set[int], generated: int, min_tokens: int, words: tuple[int, ...]) -> int | None:
    """Tokens up to the first stop token that may come, that one included; None: none does.

    Those that come too early are replaced by other words, in place.
    """
    others = [word for word in words if word not in stops] or script
    for index in range(generated, len(script)):
        if script[index] in stops:
            if index >= min_tokens:
                return index + 1
            script[index] = others[index % len(others)]
    return None


def make_logprob(token: int, count: int, words: tuple[int, ...]) -> TokenLogprob:
    """Made up: the token has probability 1/2, and the `count` likeliest are it and some words of 1/4, 1/8, …"""
    top = [token, *[words[(token + i) % len(words)] for i in range(count)]]
    unique = list(dict.fromkeys(top))[:count]
    return TokenLogprob(token, -log(2), [(other, -log(2) * (i + 1)) for i, other in enumerate(unique)])
