"""What can go wrong on the way of KV blocks.

TransferError
    its `reason` is one word out of `Reason`, the label of the failure in the metrics
"""

from typing import Literal

Reason = Literal[
    "params",  # what the request says of its blocks makes no sense
    "unknown_peer",  # nobody has told us how to reach that engine
    "layout",  # its blocks cannot be made into ours
    "expired",  # its lease was over, so that the blocks may hold something else
    "deadline",
    "cancelled",
    "peer_lost",
    "nixl",  # any other error of NIXL
    "full",  # too many pins
    "missing",  # the package is not there
    "closed",
]


class TransferError(Exception):
    """One clear line. Nothing of the pulled blocks may be used."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason: Reason = reason
