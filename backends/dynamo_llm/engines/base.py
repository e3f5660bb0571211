"""The one interface of every engine. Implementations live beside this file; `service.Service` is the only caller.

An engine owns its thread (or loop, or process). The service hands it requests from other threads, and the engine calls
the service back after each step, from its own thread, with all that the step produced. It knows nothing of Triton,
Redis, sessions or routers.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from msgspec import Struct

from kvstore.cards import KvOp, Role
from kvstore.wire import ErrorCode, Load, Output, SamplingParams, WireError

if TYPE_CHECKING:
    from dynamo_llm.transfer import KvTransfer
    from dynamo_llm.transfer.metrics import TransferMetrics


class Duty(Struct, frozen=True, kw_only=True):
    """What an engine is to do among others. Engines that hand their KV blocks over themselves are made with it."""

    role: Role = "agg"
    host: str = "127.0.0.1"
    """Where other workers reach this machine."""

    @property
    def hands_over(self) -> bool:
        return self.role != "agg"


ALONE = Duty()
"""Whole requests only."""


class EngineInfo(Struct, frozen=True, kw_only=True):
    """Facts that do not change while the engine lives."""

    name: str
    """`torch`, `mock`, `vllm`, …"""
    version: str
    model: str
    block_size: int
    kv_blocks: int
    max_context: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    announces_blocks: bool = True
    """False: it reuses KV blocks and does not tell which, so that routers have to guess."""
    roles: tuple[Role, ...] = ("agg",)
    """Those that its worker can have: whether it computes prompts for others, and takes theirs."""


class EngineRequest(Struct, frozen=True, kw_only=True):
    """One sequence to generate."""

    key: int
    """The service's name for the request: `Output.rid` of its outputs, argument of `cancel`."""
    token_ids: bytes
    """The prompt: little-endian uint32, shape [tokens], not empty."""
    sampling: SamplingParams
    generated: int = 0
    """Tokens at the end of `token_ids` that are output of an earlier attempt; less than there are tokens."""
    lora: str = ""
    cache_salt: str = ""
    priority: int = 0
    kv_transfer_params: dict[str, Any] | None = None


class StepResult(Struct, frozen=True, kw_only=True):
    """What one engine step produced."""

    outputs: list[Output]
    ops: list[KvOp]
    """Blocks stored and removed, in the order in which it happened."""
    load: Load
    prefill_tokens: int = 0
    """Prompt tokens computed in this step (cached ones do not count)."""
    decode_tokens: int = 0
    step_s: float = 0.0


class RequestError(Exception):
    """A request that this engine does not take. `code` is one of the wire's error codes."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code: ErrorCode = code
        self.message = message

    def to_wire(self) -> WireError:
        return WireError(self.code, self.message)


class EngineError(Exception):
    """An engine that cannot start: wrong folder, option or package. The message is one line that says what to do."""


class Engine(Protocol):
    """See the module's docstring. All methods may be called from any thread; none of them blocks on a step."""

    info: EngineInfo

    def start(self, on_step: Callable[[StepResult], None], on_death: Callable[[str], None]) -> None:
        """Begin to step. `on_step` and `on_death` (reason; nothing more is called after it) run on its own thread."""

    def submit(self, request: EngineRequest) -> None:
        """Queue a request. Raises `RequestError` at once for what can never be served."""

    def cancel(self, key: int) -> None:
        """End a request within a step: last output `cancelled`, blocks freed.

        Of one that has ended with `kv_transfer_params`, nobody will fetch the blocks: they are let go of, where the
        engine can do that. Other keys are ignored.
        """

    def load(self) -> Load:
        """The load after the last step, with what was queued since."""

    def close(self) -> None:
        """Stop stepping, end all requests with `cancelled`, free all memory, join the thread. May be called twice."""


@runtime_checkable
class MovesBlocks(Protocol):
    """An engine whose KV blocks can be read by others, and that can read theirs."""

    def open_transfer(self, name: str, metrics: "TransferMetrics") -> "KvTransfer":
        """Let blocks come and go from now on, as the agent `name`. To be called once; closed with the engine.

        Raises `EngineError`.
        """
