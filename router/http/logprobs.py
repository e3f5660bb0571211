"""Log-probabilities in OpenAI's two forms."""

from collections.abc import Iterable, Sequence
from typing import Any

from kvstore.text import Tokenizer
from kvstore.wire import TokenLogprob

_LOWEST = -9999.0


def bounded(logprob: float) -> float:
    """JSON knows neither minus infinity nor NaN."""
    return max(_LOWEST, logprob)


def chat_logprobs(tokenizer: Tokenizer, logprobs: Iterable[TokenLogprob], top: int) -> dict[str, Any]:
    """`logprobs` of a chat choice: for each token its text, bytes and the `top` likeliest."""
    content = [
        {
            **_entry(tokenizer, item.token_id, item.logprob),
            "top_logprobs": [_entry(tokenizer, token, value) for token, value in item.top[:top]],
        }
        for item in logprobs
    ]
    return {"content": content, "refusal": None}


def _entry(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.token_bytes(token_id)
    return {"token": data.decode(errors="replace"), "logprob": bounded(logprob), "bytes": list(data)}


class CompletionLogprobs:
    """`logprobs` of a completion choice; keeps the text offset over the chunks of a stream."""

    def __init__(self, tokenizer: Tokenizer, top: int, offset: int = 0) -> None:
        self._tokenizer = tokenizer
        self._top = top
        self._offset = offset

    def __call__(self, logprobs: Sequence[TokenLogprob | None], token_ids: Sequence[int] = ()) -> dict[str, Any]:
        """`token_ids` name the tokens whose entry is None (a prompt's first has no probability)."""
        tokens, values, tops, offsets = [], [], [], []
        for position, item in enumerate(logprobs):
            token = self._text(item.token_id if item is not None else token_ids[position])
            tokens.append(token)
            offsets.append(self._offset)
            self._offset += len(token)
            values.append(None if item is None else bounded(item.logprob))
            tops.append(None if item is None else self._likeliest(item))
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}

    def _likeliest(self, item: TokenLogprob) -> dict[str, float]:
        found = {self._text(token): bounded(value) for token, value in item.top[: self._top]}
        found.setdefault(self._text(item.token_id), bounded(item.logprob))
        return found

    def _text(self, token_id: int) -> str:
        return self._tokenizer.token_bytes(token_id).decode(errors="replace")
