"""Asks a router over HTTP, with the standard library: for `status`, and for `up` to see when requests can be served."""

import json
import urllib.error
import urllib.request
from typing import Any

from dynamo_llm.cli.errors import CommandError

# A proxy of the environment is for the world outside, not for a router at hand.
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


def fetch_status(url: str, timeout_s: float = 5.0) -> dict[str, Any]:
    """The router's `/status`. Raises `CommandError` with one line where none answers. Blocks."""
    try:
        with _open(f"{url.rstrip('/')}/status", timeout=timeout_s) as response:
            status = json.load(response)
    except urllib.error.HTTPError as error:
        error.close()
        raise CommandError(f"{url} is no router: /status answers HTTP {error.code}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise CommandError(f"no router answers at {url}: {getattr(reason, 'strerror', None) or reason}") from None
    if not isinstance(status, dict) or "instances" not in status:
        raise CommandError(f"{url} is no router: its /status has no instances")
    return status
