"""What a router process is told at start. `cli.py` fills it from flags; nothing reads it from anywhere else.

Only `DisaggSettings` can be changed while it runs, by settings in the registry of the same names (`live_settings.py`).
"""

from typing import Annotated, Literal

from msgspec import Meta, Struct

Policy = Literal["kv", "round-robin", "random"]
RemotePrefill = Literal["auto", "always", "never"]

_NonNegative = Annotated[int, Meta(ge=0)]
_Positive = Annotated[int, Meta(ge=1)]
_Amount = Annotated[float, Meta(ge=0.0, le=1e9)]


class PlacementSettings(Struct, frozen=True, kw_only=True):
    """How a worker is chosen (`placement.py`)."""

    policy: Policy = "kv"
    prefill_load_scale: float = 1.0
    """Weight of the blocks to be prefilled against the blocks of running sequences."""
    device_credit: float = 1.0
    host_credit: float = 0.75
    disk_credit: float = 0.25
    """What a cached block of each tier saves, in blocks."""
    predicted_ttl_s: float = 120.0
    """How long a block is taken to be on a worker that announces none, after its last use (`predicted_cache.py`)."""
    temperature: float = 0.0
    """0: the lowest cost wins. Else a softmax over the costs, scaled to [0, 1]."""


class DisaggSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When a prompt is prefilled on a prefill worker (`disaggregation.py`), where a model has such workers.

    Decoding checks the bounds, as for whatever an operator writes into the registry.
    """

    remote_prefill: RemotePrefill = "auto"
    """`auto`: by what is predicted to cost less. `always`: every prompt over `max_local_prefill_tokens`, while a
    prefill worker is there."""
    max_local_prefill_tokens: _NonNegative = 256
    """A prompt of which the decode worker has to compute at most this is prefilled there."""
    itl_weight: _Amount = 1.0
    """Of the time that a local prefill takes from each running sequence of the decode worker (from one at least),
    against the request's own wait. 0: only the time to the first token counts."""
    max_itl_ms: _Amount = 0.0
    """A busy decode worker computes no prompt, where a prefill worker could, that with a step of its own would take
    longer; 0: no limit."""
    transfer_tokens_per_s: Annotated[float, Meta(gt=0.0, le=1e9)] = 50_000.0
    """Prompt tokens whose KV blocks pass in a second, until transfers of the model were measured."""
    transfer_overhead_ms: _Amount = 5.0
    """What a remote prefill costs whatever its size: a request, an answer, an agreement."""
    prefill_timeout_s: Annotated[float, Meta(gt=0.0, le=3600.0)] = 30.0
    """A prefill worker that has not handed over by then is given up for this request."""
    busy_prefill_tokens: _NonNegative = 8192
    """A prefill worker with so many prompt tokens to compute is busy. When all are, a request waits in the prefill
    queue for the first one that has room; 0: never."""
    prefill_attempts: _Positive = 2
    """Prefill workers that a request is tried on before its decode worker computes the prompt itself."""


class RouterConfig(Struct, frozen=True, kw_only=True):
    """Everything a router needs to know."""

    redis_url: str
    namespace: str = "default"
    host: str = "127.0.0.1"
    http_port: int = 8000
    """0: any free one."""
    grpc_port: int = 8001
    placement: PlacementSettings = PlacementSettings()
    disagg: DisaggSettings = DisaggSettings()
    """At start, and again where a live setting is deleted."""

    max_inflight: int = 4096
    """Sequences in flight before new ones are told to come back later."""
    max_body_bytes: int = 32 * 2**20
    max_choices: int = 128
    """Most sequences that one HTTP request may ask for (prompts times `n`)."""
    max_pending_bytes: int = 2**20
    """Text kept for one client that reads too slowly; a client further behind is cut off."""
    write_buffer_bytes: int = 64 * 2**10
    """Socket buffer of one connection, beyond which further text is merged instead of written."""
    request_timeout_s: float = 600.0
    """From arrival to the last token; 0: none."""
    max_attempts: int = 4
    """Workers that a request is tried on before it fails; 1 switches migration off."""
    worker_wait_s: float = 15.0
    """How long a request that lost its worker waits for another one."""
    drain_timeout_s: float = 30.0
    """How long requests in flight may go on after SIGTERM."""
    connect_timeout_s: float = 5.0
    control_timeout_s: float = 10.0
    """A worker that does not answer a control call for so long is taken as lost."""
