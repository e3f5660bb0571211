"""What the engine needs to know of a model, read from `config.json` and `generation_config.json` in its folder."""

from pathlib import Path
from typing import Any

from msgspec import Struct

from dynamo_llm.engines.base import EngineError
from dynamo_llm.engines.model_files import read_eos_token_ids, read_json

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


class ModelConfig(Struct, frozen=True, kw_only=True):
    """A decoder of the Llama family: RMSNorm, RoPE, grouped-query attention, gated SiLU MLP."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    max_context: int
    tied_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    dtype: str
    """Of the stored weights, as the config names it: `bfloat16`, …"""
    rope: dict[str, Any]
    """Rope parameters in today's form: `rope_type`, `rope_theta` and the scaling's own."""
    eos_token_ids: tuple[int, ...]


def read_model_config(folder: Path) -> ModelConfig:
    """Raises `EngineError` for a folder that holds no model, or one that this engine cannot run."""
    raw = read_json(folder / "config.json")
    architecture = (raw.get("architectures") or ["none"])[0]
    _refuse_unsupported(raw, architecture)
    try:
        return _model_config(raw, architecture, read_eos_token_ids(folder, raw))
    except KeyError as error:
        raise EngineError(f"{folder / 'config.json'} lacks {error}") from None


def _model_config(raw: dict[str, Any], architecture: str, eos: tuple[int, ...]) -> ModelConfig:
    heads = raw["num_attention_heads"]
    attention_bias = bool(raw.get("attention_bias", False))
    return ModelConfig(
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        layers=raw["num_hidden_layers"],
        heads=heads,
        kv_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
        norm_eps=raw.get("rms_norm_eps", 1e-6),
        max_context=raw["max_position_embeddings"],
        tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=attention_bias or architecture == "Qwen2ForCausalLM",
        output_bias=attention_bias,
        mlp_bias=bool(raw.get("mlp_bias", False)),
        qk_norm=architecture == "Qwen3ForCausalLM",
        dtype=raw.get("dtype") or raw.get("torch_dtype") or "float32",
        rope=_rope_parameters(raw),
        eos_token_ids=eos,
    )


def _refuse_unsupported(raw: dict[str, Any], architecture: str) -> None:
    if architecture not in ARCHITECTURES:
        raise EngineError(f"the torch engine cannot run {architecture}; it runs {', '.join(ARCHITECTURES)}")
    if raw.get("quantization_config"):
        raise EngineError("the torch engine runs no quantised weights; use the unquantised model")
    if raw.get("hidden_act", "silu") != "silu":
        raise EngineError(f"the torch engine knows the activation silu only, not {raw['hidden_act']!r}")
    window = raw.get("sliding_window")
    if window and raw.get("use_sliding_window", True) and window < raw.get("max_position_embeddings", 0):
        raise EngineError("the torch engine has no sliding-window attention")


def _rope_parameters(raw: dict[str, Any]) -> dict[str, Any]:
    """One form for configs of all ages: `rope_parameters`, or `rope_scaling` beside `rope_theta` and with `type`."""
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    rope["rope_type"] = rope.get("rope_type") or rope.pop("type", None) or "default"
    rope.setdefault("rope_theta", raw.get("rope_theta", 10000.0))
    rope.setdefault(
        "original_max_position_embeddings",
        raw.get("original_max_position_embeddings") or raw["max_position_embeddings"],
    )
    if rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0)) != 1.0:
        raise EngineError("the torch engine rotates whole heads only; partial_rotary_factor is not 1")
    return rope
