"""What vLLM is told so that its `NixlConnector` moves KV blocks from worker to worker, and what it hands over.

`parse_options` asks for the configuration, `VllmEngine` for the environment: vLLM reads part of it from there alone.
"""

import contextlib
import os
import socket
from collections.abc import Iterator
from typing import Any

from vllm.distributed.nixl_utils import is_nixl_available
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform
from vllm.utils.cpu_resource_utils import get_allowed_cpu_list

from dynamo_llm.engines.async_types import one_line
from dynamo_llm.engines.base import Duty, EngineError

_HOST, _PORT = "VLLM_NIXL_SIDE_CHANNEL_HOST", "VLLM_NIXL_SIDE_CHANNEL_PORT"
_ON_CPU = "dynamo_llm.engines.vllm_engine.nixl_connector"
_LEASE_S = 30.0
"""vLLM's own default of `kv_lease_duration`."""


def connector(duty: Duty) -> dict[str, Any] | None:
    """`kv_transfer_config` where the options bring none. Raises `EngineError` where NIXL is not installed."""
    if not duty.hands_over:
        return None
    if not is_nixl_available():
        raise EngineError(
            f"the vllm engine needs the package nixl for the role {duty.role}: "
            "pip install 'dynamo-llm[nixl]' in its environment"
        )
    config = {
        "kv_connector": "NixlConnector",  # its `kv_buffer_device` is the engine's own device
        "kv_role": "kv_both",  # roles may change while a worker runs; the requests decide
        "kv_load_failure_policy": "recompute",  # vLLM's own would fail the request
    }
    return {**config, "kv_connector_module_path": _ON_CPU} if current_platform.is_cpu() else config


def lease_s(args: AsyncEngineArgs) -> float:
    """How long the blocks of a prefill stand for a reader that does not report."""
    config = args.kv_transfer_config
    return float(config.get_from_extra_config("kv_lease_duration", _LEASE_S)) if config is not None else 0.0


@contextlib.contextmanager
def environment(args: AsyncEngineArgs, duty: Duty) -> Iterator[None]:
    """For as long as vLLM starts its processes: an address of its own for the connector's handshakes, and threads that
    do not get in the connector's way. What the user has set stays. Raises `EngineError`."""
    if args.kv_transfer_config is None:
        yield
        return
    with contextlib.ExitStack() as undo:
        # Its model processes do not end by themselves any more; vLLM would wait 5 seconds before it ends them.
        values = {_HOST: duty.host, "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS": "2", **_threads(args)}
        if _PORT not in os.environ:
            values[_PORT] = str(_reserve(undo, os.environ.get(_HOST, duty.host)))
        for name, value in values.items():
            if name not in os.environ:
                os.environ[name] = value
                undo.callback(os.environ.pop, name, None)
        yield


def _reserve(undo: contextlib.ExitStack, host: str) -> int:
    """A free port, kept from others until `undo`. vLLM binds it meanwhile; where it cannot, it waits for ever."""
    probe = undo.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as ZMQ does, so that both may bind it
    try:
        probe.bind((host, 0))
    except OSError as error:
        raise EngineError(
            f"vLLM's NixlConnector cannot listen on {host}: {one_line(error)}; {_HOST} names another address"
        ) from None
    return int(probe.getsockname()[1])


def _threads(args: AsyncEngineArgs) -> dict[str, str]:
    """On a CPU vLLM binds each computing thread to a core, and its connector pins one of them to the last core. Where
    there are too few cores to keep that one free, two threads compute on it and wait for each other, spinning: decode
    steps took 20 times as long. Then one thread computes, bound to none."""
    if (
        not current_platform.is_cpu()
        or {"VLLM_CPU_OMP_THREADS_BIND", "VLLM_CPU_NUM_OF_RESERVED_CPU"} & os.environ.keys()
    ):
        return {}
    cores = {(cpu.numa_node, cpu.physical_core) for cpu in get_allowed_cpu_list()}
    if len(cores) > 2 * args.tensor_parallel_size * args.pipeline_parallel_size:
        return {}
    return {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
