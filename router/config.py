"""What a router process is told at start. `cli.py` fills it from flags; nothing reads it from anywhere else."""

from typing import Literal

from msgspec import Struct

Policy = Literal["kv", "round-robin", "random"]


class PlacementSettings(Struct, frozen=True, kw_only=True):
    """How a worker is chosen (`placement.py`)."""

    policy: Policy = "kv"
    prefill_load_scale: float = 1.0
    """Weight of the blocks to be prefilled against the blocks of running sequences."""
    device_credit: float = 1.0
    host_credit: float = 0.75
    disk_credit: float = 0.25
    """What a cached block of each tier saves, in blocks."""
    temperature: float = 0.0
    """0: the lowest cost wins. Else a softmax over the costs, scaled to [0, 1]."""


class RouterConfig(Struct, frozen=True, kw_only=True):
    """Everything a router needs to know."""

    redis_url: str
    namespace: str = "default"
    host: str = "127.0.0.1"
    http_port: int = 8000
    """0: any free one."""
    grpc_port: int = 8001
    placement: PlacementSettings = PlacementSettings()

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
