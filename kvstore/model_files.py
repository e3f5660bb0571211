"""The files of a model that travel through Redis: what a router needs to turn text into tokens and back.

A worker packs them into one blob (`Registry.put_blob`) and names it in its card (`InstanceCard.model_files`); a router
unpacks it, so it needs no access to the workers' disks.
"""

from collections.abc import Mapping
from pathlib import Path

import msgspec

NAMES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json", "generation_config.json")

_decode = msgspec.msgpack.Decoder(dict[str, bytes]).decode


def read(folder: Path) -> dict[str, bytes]:
    """Those of `NAMES` that a model's folder holds. Raises `OSError`."""
    return {name: (folder / name).read_bytes() for name in NAMES if (folder / name).is_file()}


def pack(files: Mapping[str, bytes]) -> bytes:
    """One blob; equal files give equal bytes."""
    return msgspec.msgpack.encode(dict(sorted(files.items())))


def unpack(blob: bytes) -> dict[str, bytes]:
    """Raises `ValueError` for what `pack` did not make."""
    try:
        return _decode(blob)
    except msgspec.MsgspecError as error:
        raise ValueError(f"not a blob of model files: {error}") from error
