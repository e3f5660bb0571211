"""The wire between router and worker: commands, replies and frames (design contract 5).

Both sides import this module and nothing of each other. Everything is msgpack. Commands travel in batches to the unary
model `M.control`; what an engine step produced travels back in frames on the decoupled model `M.session`. A request is
known on the wire by `rid`, an integer that its router chose and that is unique within that router's session.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from kvstore.cards import Role

PAYLOAD = "payload"
"""Name of the one tensor (UINT8, shape [n]) of `M.control` and `M.session`, in and out: a msgpack document."""

CONTROL_SUFFIX = ".control"
SESSION_SUFFIX = ".session"

FinishReason = Literal["stop", "length", "cancelled", "error"]
ErrorCode = Literal[
    "invalid_request",  # the request can never be served: wrong values, unknown option of the engine
    "context_length_exceeded",  # prompt longer than the model's context or the KV cache
    "overloaded",  # the waiting queue is full; try another worker or later
    "draining",  # the worker takes no new requests; try another worker
    "engine_failure",  # the engine died or lost the request; it can be replayed elsewhere
    "no_session",  # the session of the command is not (or no longer) open on this worker
]
RETRYABLE: frozenset[str] = frozenset({"overloaded", "draining", "engine_failure", "no_session"})
"""Error codes after which another worker may well serve the same request."""

_NonNegative = Annotated[int, Meta(ge=0)]
_Positive = Annotated[int, Meta(ge=1)]


class SamplingParams(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """How tokens are chosen and when a sequence ends. Decoding checks the bounds (`msgspec.ValidationError`)."""

    max_tokens: _Positive | None = None
    """Most tokens to generate; None: until the context is full."""
    min_tokens: _NonNegative = 0
    """No end-of-sequence or stop token is sampled before this many tokens."""
    temperature: Annotated[float, Meta(ge=0.0, le=100.0)] = 1.0
    """0 is greedy."""
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0
    top_k: _NonNegative = 0
    """0: all tokens."""
    min_p: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.0
    seed: int | None = None
    """The same seed, prompt and parameters give the same tokens whatever else is in the batch."""
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100.0)] = 1.0
    """Over prompt and output, as in CTRL (arXiv:1909.05858)."""
    presence_penalty: Annotated[float, Meta(ge=-2.0, le=2.0)] = 0.0
    """Over the output only, as OpenAI defines it."""
    frequency_penalty: Annotated[float, Meta(ge=-2.0, le=2.0)] = 0.0
    logit_bias: dict[int, float] = {}
    stop_token_ids: tuple[int, ...] = ()
    """Ends the sequence as end-of-sequence does; the token itself is the last one reported."""
    ignore_eos: bool = False
    logprobs: Annotated[int, Meta(ge=0, le=100)] | None = None
    """None: none. n: the chosen token's, and the n most likely tokens'."""
    prompt_logprobs: Annotated[int, Meta(ge=0, le=100)] | None = None
    extra: dict[str, Any] = {}
    """Options of one engine, passed to it untouched."""


class TokenLogprob(Struct, frozen=True, array_like=True, gc=False):
    """Natural log-probability of one token under the model, before temperature and filters, and of the likeliest."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]] = []
    """(token id, logprob), likeliest first."""


# --- commands: router -> worker, in batches -------------------------------------------------------------------------


class Submit(Struct, frozen=True, kw_only=True, omit_defaults=True, tag="submit"):
    """Start a request. Its outputs come in the frames of the session the batch names."""

    rid: int
    token_ids: bytes
    """The prompt: little-endian uint32, shape [tokens]."""
    sampling: SamplingParams = SamplingParams()
    generated: _NonNegative = 0
    """How many of the last `token_ids` are this request's own output, from a worker that was lost: to penalties, limits
    and `min_tokens` they count as output."""
    request_id: str = ""
    """The client's request id, for logs and traces only."""
    lora: str = ""
    cache_salt: str = ""
    priority: int = 0
    """Lower is sooner, as in vLLM."""
    kv_transfer_params: dict[str, Any] | None = None
    trace: dict[str, str] = {}
    """W3C trace context."""


class Cancel(Struct, frozen=True, tag="cancel"):
    """End a request within a step; its last output has finish reason `cancelled`. Unknown rids are ignored."""

    rid: int


class Snapshot(Struct, frozen=True, tag="snapshot"):
    """Ask for all resident block hashes (answered by `SnapshotReply`)."""


class Drain(Struct, frozen=True, tag="drain"):
    """Take no new requests, finish those in flight, then end every session."""


class Stats(Struct, frozen=True, tag="stats"):
    """Ask for the load (answered by `StatsReply`)."""


class Close(Struct, frozen=True, tag="close"):
    """End the session that the batch names: what is in flight is cancelled and the last frame says `closed`.

    A router that leaves sends it, because resetting the stream instead could hurt the server."""


class SetRole(Struct, frozen=True, tag="role"):
    """Be a worker of another role. What is in flight goes on; the role is taken when the instance's card says so."""

    role: Role


Command = Submit | Cancel | Snapshot | Drain | Stats | Close | SetRole


SESSION_WINDOW = 256
"""Frames that a worker sends ahead of what the router says it has read (`ControlBatch.frames_read`)."""


class ControlBatch(Struct, frozen=True, omit_defaults=True):
    """One call of `M.control`. It also says that the session's router is alive: an empty one each second is enough."""

    session: str
    commands: list[Command]
    frames_read: int | None = None
    """Frames of the session that the router has read so far, the first (empty) one included. Optional; once given, the
    worker stays at most `SESSION_WINDOW` frames ahead and merges outputs beyond, so that nothing between engine and
    reader grows. A router that gives it sends a batch at the latest after every `SESSION_WINDOW // 4` frames."""


class WireError(Struct, frozen=True, array_like=True):
    """Why a command was refused or a request failed. `message` is one line that says what to do."""

    code: ErrorCode
    message: str


class Done(Struct, frozen=True, tag="done"):
    """The command was carried out (a submit: accepted)."""


class Refused(Struct, frozen=True, tag="refused"):
    """The command was not carried out; a submit has no further output."""

    error: WireError


class TierHashes(Struct, frozen=True):
    """All resident block hashes of one tier: little-endian uint64, shape [blocks]."""

    tier: str
    hashes: bytes


class SnapshotReply(Struct, frozen=True, tag="snapshot"):
    """Resident blocks after the batch `seq` of `epoch`."""

    instance: str
    epoch: int
    seq: int
    tiers: list[TierHashes]


class Load(Struct, frozen=True, array_like=True, gc=False):
    """What a worker has to do and how fast it is, after a step."""

    running: int = 0
    """Sequences in the batch."""
    waiting: int = 0
    """Sequences admitted and not yet in the batch."""
    waiting_prefill_tokens: int = 0
    """Prompt tokens still to be computed, waiting and running."""
    kv_blocks_used: int = 0
    """Blocks that running sequences reference (cached but free ones do not count)."""
    kv_blocks_cached: int = 0
    """Free blocks that still hold a reusable prefix."""
    kv_blocks_total: int = 0
    prefill_tokens_per_s: float = 0.0
    """Measured, moving average; 0: not known yet."""
    decode_step_ms: float = 0.0
    """Measured, moving average; 0: not known yet."""
    steps: int = 0
    """Engine steps of this epoch that the report covers. Frames and replies can overtake each other: the report with
    fewer steps is the older one."""


class StatsReply(Struct, frozen=True, tag="stats"):
    instance: str
    epoch: int
    load: Load
    draining: bool


Reply = Done | Refused | SnapshotReply | StatsReply


class ControlReply(Struct, frozen=True):
    """Answers of one `ControlBatch`, in its order."""

    replies: list[Reply]


# --- frames: worker -> router ----------------------------------------------------------------------------------------


class OpenSession(Struct, frozen=True):
    """First and only request on `M.session`. A second session of the same name replaces the first."""

    session: str


class Started(Struct, frozen=True, array_like=True):
    """Comes with a request's first output."""

    cached_tokens: int
    """Prompt tokens whose KV was reused."""
    queue_ms: float
    """From submission to the first step that worked on it."""
    prompt_logprobs: list[TokenLogprob | None] | None = None


class Output(Struct, array_like=True):
    """What one request got in a step (or in several, where the reader is slow). Mutable: the sender merges into it."""

    rid: int
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    """Set on the last output of a request, exactly once."""
    logprobs: list[TokenLogprob] | None = None
    started: Started | None = None
    kv_transfer_params: dict[str, Any] | None = None
    error: WireError | None = None
    """Set with finish reason `error`."""


class Frame(Struct, array_like=True):
    """One response of `M.session`. The first has no outputs: it says that the session is open."""

    epoch: int
    outputs: list[Output]
    load: Load
    end: str | None = None
    """Set on the last frame, why the worker ends the session: `drained`, `replaced`, `closed`, `expired` (no sign of
    life of the router) or `engine_failure`."""


encode = msgspec.msgpack.Encoder().encode
decode_batch = msgspec.msgpack.Decoder(ControlBatch).decode
decode_reply = msgspec.msgpack.Decoder(ControlReply).decode
decode_open = msgspec.msgpack.Decoder(OpenSession).decode
decode_frame = msgspec.msgpack.Decoder(Frame).decode
