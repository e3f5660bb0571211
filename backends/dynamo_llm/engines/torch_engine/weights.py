"""Reads a model's safetensors, sharded or not, into the fused matrices that `model.py` multiplies with."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from dynamo_llm.engines.base import EngineError
from dynamo_llm.engines.torch_engine.model_config import ModelConfig


@dataclass(frozen=True)
class Linear:
    """`x @ weight + bias`."""

    weight: torch.Tensor
    """[inputs, outputs]"""
    bias: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.mm(x, self.weight) if self.bias is None else torch.addmm(self.bias, x, self.weight)

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> None:
        """`residual += self(x)`, in the product itself."""
        residual.addmm_(x, self.weight)
        if self.bias is not None:
            residual.add_(self.bias)


@dataclass(frozen=True)
class Layer:
    """One decoder layer. Shapes: norms [hidden] or [head_dim], `qkv` to [(heads + 2 kv_heads) * head_dim]."""

    input_norm: torch.Tensor
    qkv: Linear
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    output: Linear
    mlp_norm: torch.Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True)
class Weights:
    """Everything that is read from the model's files."""

    embedding: torch.Tensor
    """[vocab, hidden]"""
    layers: list[Layer]
    norm: torch.Tensor
    head: torch.Tensor
    """[hidden, vocab]"""


def load_weights(folder: Path, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Weights:
    """All weights on the device in `dtype`. Raises `EngineError` for missing files or tensors and for wrong shapes."""
    reader = _Reader(folder, device, dtype)
    embedding = reader.tensor("model.embed_tokens.weight", (config.vocab_size, config.hidden_size))
    if config.tied_embeddings:
        head = reader.fuse([embedding])
    else:
        head = reader.linear(["lm_head"], [config.vocab_size], config.hidden_size).weight
    return Weights(
        embedding=embedding,
        layers=[_load_layer(reader, config, index) for index in range(config.layers)],
        norm=reader.tensor("model.norm.weight", (config.hidden_size,)),
        head=head,
    )


def _load_layer(reader: "_Reader", config: ModelConfig, index: int) -> Layer:
    prefix = f"model.layers.{index}."
    attention, mlp = prefix + "self_attn.", prefix + "mlp."
    hidden, inner = config.hidden_size, config.intermediate_size
    query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
    heads = [attention + name for name in ("q_proj", "k_proj", "v_proj")]

    def norm(name: str, size: int) -> torch.Tensor:
        return reader.tensor(f"{name}.weight", (size,))

    return Layer(
        input_norm=norm(prefix + "input_layernorm", hidden),
        qkv=reader.linear(heads, [query, key, key], hidden, bias=config.qkv_bias),
        query_norm=norm(attention + "q_norm", config.head_dim) if config.qk_norm else None,
        key_norm=norm(attention + "k_norm", config.head_dim) if config.qk_norm else None,
        output=reader.linear([attention + "o_proj"], [hidden], query, bias=config.output_bias),
        mlp_norm=norm(prefix + "post_attention_layernorm", hidden),
        gate_up=reader.linear([mlp + "gate_proj", mlp + "up_proj"], [inner, inner], hidden, bias=config.mlp_bias),
        down=reader.linear([mlp + "down_proj"], [hidden], inner, bias=config.mlp_bias),
    )


class _Reader:
    """Tensors of a folder by name, whichever file holds them."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        self._folder, self._device, self._dtype = folder, device, dtype
        self._files = {}
        self._file_of = {}
        for name in _file_names(folder):
            try:
                file = self._files[name] = safe_open(folder / name, framework="pt")
            except (OSError, SafetensorError) as error:
                raise EngineError(f"{folder / name} cannot be read: {error}") from None
            self._file_of.update(dict.fromkeys(file.keys(), name))

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name not in self._file_of:
            raise EngineError(
                f"{self._folder} holds no tensor {name}: its files and config.json do not belong together"
            )
        tensor = self._files[self._file_of[name]].get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise EngineError(f"tensor {name} has shape {list(tensor.shape)}, config.json says {list(shape)}")
        return tensor.to(self._device, self._dtype)

    def linear(self, names: list[str], sizes: list[int], inputs: int, *, bias: bool = False) -> Linear:
        """Several projections of the same input as one matrix: one large product is faster than several small ones."""
        parts = [self.tensor(f"{name}.weight", (size, inputs)) for name, size in zip(names, sizes, strict=True)]
        biases = [self.tensor(f"{name}.bias", (size,)) for name, size in zip(names, sizes, strict=True)] if bias else []
        return Linear(self.fuse(parts), torch.cat(biases) if bias else None)

    def fuse(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """[inputs, outputs]; contiguous on a CPU, where that is faster for a few rows, and a view elsewhere."""
        fused = (torch.cat(parts) if len(parts) > 1 else parts[0]).t()
        return fused.contiguous() if self._device.type == "cpu" else fused


def _file_names(folder: Path) -> list[str]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            return sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError) as error:
            raise EngineError(f"{index} cannot be read: {error}") from None
    if not (folder / "model.safetensors").exists():
        raise EngineError(f"{folder} holds no model.safetensors (nor its index): convert the weights to safetensors")
    return ["model.safetensors"]
