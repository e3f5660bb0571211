"""The network: a decoder of the Llama family over a paged KV pool. The same code for every device and operator set."""

import torch

from dynamo_llm.engines.torch_engine.batch import Batch
from dynamo_llm.engines.torch_engine.operators import Operators
from dynamo_llm.engines.torch_engine.weights import Weights


class Model:
    """Weights and operators put together. Not thread-safe: the engine's thread runs it."""

    def __init__(self, weights: Weights, operators: Operators) -> None:
        self._weights, self._operators = weights, operators

    def hidden(self, batch: Batch) -> torch.Tensor:
        """Last hidden states, shape [tokens, hidden]; the batch's keys and values are in the pool afterwards."""
        operators = self._operators
        x = self._weights.embedding[batch.token_ids]
        for index, layer in enumerate(self._weights.layers):
            qkv = layer.qkv(operators.norm(x, layer.input_norm))
            layer.output.add_to(x, operators.attend(index, layer, qkv, batch))
            gate_up = layer.gate_up(operators.norm(x, layer.mlp_norm))
            layer.down.add_to(x, operators.silu_gate(gate_up))
        return x

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32, shape [rows, vocab]."""
        return torch.mm(self._operators.norm(hidden, self._weights.norm), self._weights.head).float()
