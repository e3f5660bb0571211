"""Rotary position embedding: the table of cosines and sines for each kind of scaling."""

import math
from collections.abc import Callable
from typing import Any

import torch

from dynamo_llm.engines.base import EngineError

Rope = dict[str, Any]


def rope_table(rope: Rope, head_dim: int, max_context: int, device: torch.device) -> torch.Tensor:
    """Cosines, then sines, of each position: float32, shape [max_context, head_dim].

    Angles follow arXiv:2104.09864, in the layout of the Hugging Face models: element i is rotated with i + head_dim/2.
    """
    kind = rope["rope_type"]
    if kind not in _SCALINGS:
        raise EngineError(f"the torch engine has no rope scaling {kind!r}; it has {', '.join(_SCALINGS)}")
    try:
        frequencies, magnitude = _SCALINGS[kind](rope, head_dim)
    except KeyError as error:
        raise EngineError(f"rope scaling {kind!r} lacks {error} in config.json") from None
    angles = torch.outer(torch.arange(max_context, dtype=torch.float32), frequencies)
    return (torch.cat([angles.cos(), angles.sin()], dim=1) * magnitude).to(device)


def _frequencies(rope: Rope, head_dim: int) -> torch.Tensor:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    return 1.0 / (rope["rope_theta"] ** exponents)


def _default(rope: Rope, head_dim: int) -> tuple[torch.Tensor, float]:
    """Also `dynamic` (NTK): it differs only beyond the trained context, which this engine does not serve."""
    return _frequencies(rope, head_dim), 1.0


def _linear(rope: Rope, head_dim: int) -> tuple[torch.Tensor, float]:
    return _frequencies(rope, head_dim) / rope["factor"], 1.0


def _llama3(rope: Rope, head_dim: int) -> tuple[torch.Tensor, float]:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between interpolated."""
    frequencies = _frequencies(rope, head_dim)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies * (keep + (1.0 - keep) / rope["factor"]), 1.0


def _yarn(rope: Rope, head_dim: int) -> tuple[torch.Tensor, float]:
    """YaRN (arXiv:2309.00071): a ramp over the dimensions between interpolated and kept frequencies."""
    frequencies, factor = _frequencies(rope, head_dim), rope["factor"]

    def dimension(turns: float) -> float:
        ratio = rope["original_max_position_embeddings"] / (turns * 2 * math.pi)
        return head_dim * math.log(ratio) / (2 * math.log(rope["rope_theta"]))

    low, high = dimension(rope.get("beta_fast") or 32), dimension(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 0.001
    stretch = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0.0, 1.0)
    return frequencies * (stretch / factor + (1.0 - stretch)), _yarn_magnitude(rope)


def _yarn_magnitude(rope: Rope) -> float:
    """Factor on cosines and sines that makes up for the wider spread of the attention."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])

    def scale(mscale: float) -> float:
        return 1.0 if rope["factor"] <= 1 else 0.1 * mscale * math.log(rope["factor"]) + 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return scale(rope["mscale"]) / scale(rope["mscale_all_dim"])
    return scale(1.0)


_SCALINGS: dict[str, Callable[[Rope, int], tuple[torch.Tensor, float]]] = {
    "default": _default,
    "dynamic": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
