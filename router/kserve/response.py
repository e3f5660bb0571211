"""From what the routing layer generates to the responses of one request. Knows no transport and does no I/O."""

import json
from typing import Any, NamedTuple

from kvstore.text import Tokenizer
from kvstore.wire import FinishReason, TokenLogprob
from router.http.logprobs import bounded
from router.kserve.request import Job
from router.kserve.tensors import Tensor
from router.types import Delta, Placed, Result

Parameters = dict[str, str | int | float | bool]


class Response(NamedTuple):
    """One response: its outputs and its `parameters`."""

    outputs: list[Tensor]
    parameters: Parameters
    final: bool


class Responder:
    """Makes the responses of one job, in order."""

    def __init__(self, job: Job, tokenizer: Tokenizer) -> None:
        self._job = job
        self._tokenizer = tokenizer
        self._cumulative_logprob = 0.0
        self._placed: Placed | None = None

    def placed(self, placed: Placed) -> None:
        """Told on the next response."""
        self._placed = placed

    def delta(self, deltas: list[Delta]) -> Response:
        """One response of a stream for all that came since the one before it."""
        logprobs = [entry for delta in deltas for entry in delta.logprobs or ()]
        outputs = self._outputs(
            "".join([delta.text for delta in deltas]),
            [token for delta in deltas for token in delta.token_ids],
            logprobs,
            deltas[-1].finish_reason,
        )
        placed, self._placed = self._placed, None
        return Response(outputs, {} if placed is None else placed_parameters(placed), False)

    def whole(self, result: Result) -> Response:
        """The only response of a request that is not streamed."""
        text = self._job.prepend + result.text
        outputs = self._outputs(text, result.token_ids, result.logprobs or [], result.finish_reason)
        return Response(outputs, result_parameters(result), True)

    def _outputs(
        self, text: str, token_ids: list[int], logprobs: list[TokenLogprob], finish_reason: FinishReason | None
    ) -> list[Tensor]:
        wanted = self._job.outputs
        if len(wanted) == 1 and "text_output" in wanted:
            return [Tensor("text_output", "BYTES", [text.encode("utf-8", "replace")])]
        self._cumulative_logprob += sum(bounded(entry.logprob) for entry in logprobs)
        values: dict[str, tuple[str, list[Any]]] = {
            "text_output": ("BYTES", [text.encode("utf-8", "replace")]),
            "output_ids": ("INT32", token_ids),
            "finish_reason": ("BYTES", [str(finish_reason).encode()]),
            "cumulative_logprob": ("FP32", [self._cumulative_logprob]),
            "num_input_tokens": ("UINT32", [self._job.prompt_tokens]),
            "num_output_tokens": ("UINT32", [len(token_ids)]),
        }
        if "logprobs" in wanted:
            values["logprobs"] = ("BYTES", [self._logprobs(logprobs)])
        return [Tensor(name, *value) for name, value in values.items() if name in wanted]

    def _logprobs(self, logprobs: list[TokenLogprob]) -> bytes:
        """As vllm_backend: for each token an object of the likeliest ones and itself by token id."""
        return json.dumps([self._position(entry) for entry in logprobs]).encode()

    def _position(self, entry: TokenLogprob) -> dict[int, dict[str, Any]]:
        position = {
            token_id: {"logprob": bounded(logprob), "rank": rank, "decoded_token": self._decode(token_id)}
            for rank, (token_id, logprob) in enumerate(entry.top, 1)
        }
        if entry.token_id not in position:
            position[entry.token_id] = {
                "logprob": bounded(entry.logprob),
                "rank": None,
                "decoded_token": self._decode(entry.token_id),
            }
        return position

    def _decode(self, token_id: int) -> str:
        return self._tokenizer.decode([token_id], skip_special_tokens=False)


def placed_parameters(placed: Placed) -> Parameters:
    """Known as soon as a worker was chosen."""
    return {
        "instance": placed.instance,
        **({"prefill_instance": placed.prefill_instance} if placed.prefill_instance else {}),
        "prompt_blocks": placed.prompt_blocks,
        "reused_blocks": placed.reused_blocks,
    }


def result_parameters(result: Result) -> Parameters:
    """Known at the end."""
    return {
        **placed_parameters(result.placed),
        "cached_tokens": result.cached_tokens,
        "ttft_ms": round(result.ttft_ms, 3),
    }
