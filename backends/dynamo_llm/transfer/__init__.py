"""KV blocks from one worker's pool to another's, over NIXL (design contract 6). docs/transfer.md tells how and why.

`KvTransfer` is the way in. What decides (`layout`, `params`, `pins`) is pure; one thread (`loop`) owns the NIXL agent,
and `agent` alone imports NIXL, when an agent is made.
"""

from dynamo_llm.transfer.errors import TransferError
from dynamo_llm.transfer.layout import Layout
from dynamo_llm.transfer.transfer import KvTransfer

__all__ = ["KvTransfer", "Layout", "TransferError"]
