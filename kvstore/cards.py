"""What the registry stores of an instance, and the event stream of its KV blocks (design contracts 2 and 3)."""

from typing import Literal

from msgspec import Struct

Role = Literal["agg", "prefill", "decode"]
Tier = Literal["device", "host", "disk", "remote"]
TIERS: tuple[Tier, ...] = ("device", "host", "disk", "remote")
"""Best first."""


class InstanceCard(Struct, frozen=True, kw_only=True):
    """One engine on one Triton server, as routers see it."""

    instance: str
    """16 hex digits, drawn at the start of the process."""
    namespace: str = "default"
    component: str = "worker"
    endpoint: str = "generate"
    model: str
    role: Role = "agg"
    host: Literal["pytriton", "triton"] = "pytriton"
    triton_model: str = ""
    """Name on the Triton server whose `.control` and `.session` are the instance's; empty: `model`."""
    grpc_address: str
    """host:port of the Triton server."""
    http_address: str = ""
    metrics_url: str = ""
    engine: str
    engine_version: str = ""
    block_size: int
    """Tokens in a KV block."""
    kv_blocks: int
    max_context: int
    """Most tokens, prompt and output together."""
    model_files: str
    """Content hash under which tokenizer, chat template and configs are stored (`Registry.get_blob`)."""
    epoch: int
    """Grows at each start of the engine; milliseconds since 1970."""
    nixl: str | None = None
    """Name of the blob with what others need to read its KV blocks."""
    kv_events: bool = True
    """False: its engine reuses KV blocks and announces none; routers guess what it holds."""
    prefill_queue: bool = False
    """Calls for requests of the prefill queue when it has room (`kvstore.prefill_caller`)."""
    pid: int = 0
    started_s: float = 0.0
    """Seconds since 1970."""


class Stored(Struct, frozen=True, tag="s", array_like=True):
    """Blocks became resident: `hashes` follow each other, the first follows `parent` (None: it begins a sequence)."""

    parent: int | None
    hashes: list[int]
    tier: Tier = "device"


class Removed(Struct, frozen=True, tag="r", array_like=True):
    """Blocks left one tier."""

    hashes: list[int]
    tier: Tier = "device"


class Cleared(Struct, frozen=True, tag="c", array_like=True):
    """The instance holds no block in any tier any more."""


KvOp = Stored | Removed | Cleared


class Digest(Struct, frozen=True, array_like=True):
    """Count and xor of the resident hashes, a block counted once for each tier that holds it."""

    count: int = 0
    xor: int = 0


class EventBatch(Struct, frozen=True, array_like=True):
    """One entry of the stream. Without ops it is a heartbeat: `seq` repeats the last batch's and `digest` is set."""

    instance: str
    epoch: int
    seq: int
    """Dense from 1 within an epoch."""
    ops: list[KvOp] = []
    digest: Digest | None = None
    """Resident blocks after `seq`."""
