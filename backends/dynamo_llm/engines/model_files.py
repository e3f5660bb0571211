"""What engines read alike from a Hugging Face folder, and how much of its context they serve.

The torch and the mock engine call it.
"""

import json
import logging
from pathlib import Path
from typing import Any

from dynamo_llm.engines.base import EngineError

logger = logging.getLogger(__name__)


def read_json(path: Path) -> dict[str, Any]:
    """Raises `EngineError` for a file that is missing, unreadable or no JSON object."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise EngineError(f"{path} does not exist: the model must be a Hugging Face folder") from None
    except (OSError, ValueError) as error:
        raise EngineError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise EngineError(f"{path} is no JSON object")
    return value


def read_eos_token_ids(folder: Path, config: dict[str, Any]) -> tuple[int, ...]:
    """`generation_config.json` decides where it says something, else `config`, the content of `config.json`."""
    path = folder / "generation_config.json"
    generation = read_json(path) if path.exists() else {}
    eos = generation.get("eos_token_id")
    if eos is None:
        eos = config.get("eos_token_id")
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list) else (eos,)


def fit_context(asked: int | None, own: int, kv_blocks: int, block_size: int) -> int:
    """Most tokens of a sequence: a context that was asked for is served or refused (`EngineError`), the model's `own`
    is cut to the pool."""
    if asked is not None and asked > own:
        raise EngineError(f"max_context {asked} is more than the model's own {own}")
    fits = kv_blocks * block_size
    if asked is not None and asked > fits:
        raise EngineError(
            f"max_context {asked} does not fit the {fits} tokens of {kv_blocks} KV blocks; "
            f"raise kv_blocks to {-(-asked // block_size)}"
        )
    if asked is None and fits < own:
        logger.warning(
            "the model's context of %d tokens is cut to the %d that fit %d KV blocks; raise kv_blocks for more",
            own,
            fits,
            kv_blocks,
        )
    return min(asked or own, fits)
