"""vLLM's `NixlConnector` for machines that compute on their CPUs. vLLM imports it, in processes of its own, by the
`kv_connector_module_path` that `transfer.py` gives.

Two things are otherwise, both about cores. NIXL's progress thread looks for news without a pause, most of it in the
kernel: half a core for each worker that has nothing to do. And the connector pins the thread that makes it, which is
the one that computes, to the last core of the node: those of all workers of a machine to the same one.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1 import nixl as vendor
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.nixl_utils import NixlWrapper

_PAUSE_US = 100
"""At most, between two looks of the progress thread; it wakes up when something comes."""


class NixlConnector(vendor.NixlConnector):
    """See the module's docstring."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        cores = os.sched_getaffinity(0)
        with _pausing(sys.modules[NixlWrapper.__module__]) if NixlWrapper else contextlib.nullcontext():
            super().__init__(vllm_config, role, kv_cache_config)
        os.sched_setaffinity(0, cores)


@contextlib.contextmanager
def _pausing(nixl: Any) -> Iterator[None]:
    """Agents made meanwhile have a progress thread that pauses: NIXL can do it, and its Python API sets it to 0."""
    bindings, made = nixl.nixlBind, nixl.nixlBind.nixlAgentConfig

    class Config(made):  # type: ignore[misc, valid-type]  # of the bindings
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, _PAUSE_US if name == "pthrDelay" else value)

    bindings.nixlAgentConfig = Config
    try:
        yield
    finally:
        bindings.nixlAgentConfig = made
