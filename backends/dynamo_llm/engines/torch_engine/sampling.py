"""Which token comes next, for a whole batch at once. A batch pays only for what some request in it asks for.

The order is: logit bias and penalties on the raw logits, then `min_tokens`; greedy requests take the maximum; the
others apply temperature, min_p, top_k, top_p (each on what the one before left, renormalised) and draw. A draw is the
inverse of the cumulative distribution at one uniform number that is a hash of (seed, position), so it depends neither
on the batch nor on preemption, and a sequence replayed elsewhere with the same seed goes on as it would have.
"""

from array import array
from collections.abc import Sequence as Seq

import numpy as np
import numpy.typing as npt
import torch

from dynamo_llm.engines.torch_engine.sequence import Sequence
from kvstore.wire import SamplingParams, TokenLogprob


def sample(logits: torch.Tensor, sequences: Seq[Sequence]) -> tuple[list[int], list[TokenLogprob | None]]:
    """The next token of each sequence, and its logprobs where asked for.

    `logits`: float32, shape [sequences, vocab]; it may be overwritten.
    """
    if all(is_plain_greedy(s) for s in sequences):
        return _maximum(logits, sequences).tolist(), [None] * len(sequences)
    wanted = [i for i, s in enumerate(sequences) if s.sampling.logprobs is not None]
    raw = logits[wanted].log_softmax(dim=-1) if wanted else None
    _edit(logits, sequences)
    tokens = _choose(logits, sequences)
    logprobs: list[TokenLogprob | None] = [None] * len(sequences)
    if raw is not None:
        counts = [sequences[i].sampling.logprobs or 0 for i in wanted]
        for i, entry in zip(wanted, token_logprobs(raw, [tokens[i] for i in wanted], counts), strict=True):
            logprobs[i] = entry
    return tokens, logprobs


def is_plain_greedy(sequence: Sequence) -> bool:
    """Nothing but the maximum of the logits is asked for."""
    p = sequence.sampling
    return p.temperature == 0 and p.logprobs is None and not _needs_edit(sequence)


def token_logprobs(logprobs: torch.Tensor, tokens: Seq[int], counts: Seq[int]) -> list[TokenLogprob]:
    """One entry a row of `logprobs` ([rows, vocab]): of its token, and of as many likeliest ones as `counts` says."""
    chosen = logprobs.gather(1, torch.tensor(tokens, device=logprobs.device)[:, None])[:, 0].tolist()
    most = min(max(counts), logprobs.shape[1])
    if not most:
        return [TokenLogprob(token, value) for token, value in zip(tokens, chosen, strict=True)]
    top = logprobs.topk(most, dim=-1)
    rows = zip(tokens, chosen, counts, top.indices.tolist(), top.values.tolist(), strict=True)
    return [
        TokenLogprob(token, value, list(zip(ids[:count], values[:count], strict=True)))
        for token, value, count, ids, values in rows
    ]


# --- edits of the logits ----------------------------------------------------------------------------------------------


def _needs_edit(sequence: Sequence) -> bool:
    p = sequence.sampling
    return bool(p.logit_bias) or _has_penalties(p) or sequence.output_tokens < p.min_tokens


def _has_penalties(p: SamplingParams) -> bool:
    return p.repetition_penalty != 1 or p.presence_penalty != 0 or p.frequency_penalty != 0


def _edit(logits: torch.Tensor, sequences: Seq[Sequence]) -> None:
    """In place, and only at the entries that somebody's parameters name."""
    edited = [(row, s) for row, s in enumerate(sequences) if _needs_edit(s)]
    if not edited:
        return
    bias = [(row, token, value) for row, s in edited for token, value in s.sampling.logit_bias.items()]
    if bias:
        rows, ids, values = zip(*bias, strict=True)
        at = _indices(logits, rows), _indices(logits, ids)
        logits.index_put_(at, torch.tensor(values, device=logits.device), accumulate=True)
    penalised = [(row, s) for row, s in edited if _has_penalties(s.sampling)]
    if penalised:
        _penalise(logits, penalised)
    barred = [(row, token) for row, s in edited if s.output_tokens < s.sampling.min_tokens for token in s.stop_ids]
    if barred:
        rows, ids = zip(*barred, strict=True)
        logits[_indices(logits, rows), _indices(logits, ids)] = -torch.inf


def _indices(like: torch.Tensor, values: Seq[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64, device=like.device)


def _penalise(logits: torch.Tensor, penalised: list[tuple[int, Sequence]]) -> None:
    seen = [_seen(sequence) for _, sequence in penalised]
    sizes = [len(tokens.ids) for tokens in seen]
    settings = [
        (s.sampling.repetition_penalty, s.sampling.frequency_penalty, s.sampling.presence_penalty) for _, s in penalised
    ]
    repetition, frequency, presence = np.repeat(np.array(settings, dtype=np.float32), sizes, axis=0).T
    counts = np.concatenate([np.array(tokens.counts, dtype=np.float32) for tokens in seen])
    device = logits.device
    rows = torch.from_numpy(np.repeat([row for row, _ in penalised], sizes)).to(device)
    ids = torch.from_numpy(np.concatenate([np.array(tokens.ids) for tokens in seen])).to(device)
    factor = torch.from_numpy(repetition).to(device)
    values = logits[rows, ids]
    values = torch.where(values > 0, values / factor, values * factor)
    logits[rows, ids] = values - torch.from_numpy(frequency * counts + presence * (counts > 0)).to(device)


class _SeenTokens:
    """Distinct tokens of a sequence and how often each was generated (0: it stands in the prompt only)."""

    def __init__(self) -> None:
        self.ids = array("q")
        self.counts = array("q")
        self.length = 0
        """Tokens taken into account."""
        self._index: dict[int, int] = {}

    def update(self, tokens: list[int], prompt_tokens: int) -> None:
        for position in range(self.length, len(tokens)):
            token = tokens[position]
            index = self._index.setdefault(token, len(self.ids))
            if index == len(self.ids):
                self.ids.append(token)
                self.counts.append(0)
            self.counts[index] += position >= prompt_tokens
        self.length = len(tokens)


def _seen(sequence: Sequence) -> _SeenTokens:
    if not isinstance(sequence.seen, _SeenTokens):
        sequence.seen = _SeenTokens()
    sequence.seen.update(sequence.tokens, sequence.prompt_tokens)
    return sequence.seen


# --- choice -----------------------------------------------------------------------------------------------------------

_GREEDY_BELOW = 1e-5
"""Temperatures at which the division would overflow and only the maximum has a chance anyway."""


def _choose(logits: torch.Tensor, sequences: Seq[Sequence]) -> list[int]:
    params = [s.sampling for s in sequences]
    greedy = [i for i, p in enumerate(params) if p.temperature < _GREEDY_BELOW]
    filtered = [i for i, p in enumerate(params) if p.temperature >= _GREEDY_BELOW and _has_filter(p)]
    plain = [i for i, p in enumerate(params) if p.temperature >= _GREEDY_BELOW and not _has_filter(p)]
    tokens = [0] * len(sequences)
    for rows, draw in ((greedy, _maximum), (plain, _draw), (filtered, _draw_filtered)):
        if rows:
            part = logits if len(rows) == len(sequences) else logits[rows]
            for row, token in zip(rows, draw(part, [sequences[i] for i in rows]).tolist(), strict=True):
                tokens[row] = token
    return tokens


def _has_filter(p: SamplingParams) -> bool:
    return p.top_k > 0 or p.top_p < 1 or p.min_p > 0


def _maximum(logits: torch.Tensor, sequences: Seq[Sequence]) -> torch.Tensor:
    if logits.device.type == "cpu":
        # torch's own does not vectorise on a CPU; numpy's is 20 times faster.
        return torch.from_numpy(logits.numpy().argmax(axis=1))
    return logits.argmax(dim=-1)


def _draw(logits: torch.Tensor, sequences: Seq[Sequence]) -> torch.Tensor:
    return _invert(_probabilities(logits, sequences), sequences)[:, 0]


def _draw_filtered(logits: torch.Tensor, sequences: Seq[Sequence]) -> torch.Tensor:
    """Sorted, likeliest first, each filter keeps a beginning of the row."""
    p, ids = _probabilities(logits, sequences).sort(dim=-1, descending=True, stable=True)
    vocab = p.shape[1]
    top_k = _column(p, [s.sampling.top_k or vocab for s in sequences])
    top_p = _column(p, [s.sampling.top_p for s in sequences])
    min_p = _column(p, [s.sampling.min_p for s in sequences])
    rank = torch.arange(vocab, device=p.device)
    p = p.where((p >= min_p * p[:, :1]) & (rank < top_k), 0.0)
    before = p.cumsum(dim=-1) - p
    p = p.where(before < top_p * p.sum(dim=-1, keepdim=True), 0.0)
    return ids.gather(1, _invert(p, sequences))[:, 0]


def _probabilities(logits: torch.Tensor, sequences: Seq[Sequence]) -> torch.Tensor:
    """float64: sums over large vocabularies stay exact enough for the inverse to be the same in every batch."""
    return (logits.double() / _column(logits, [s.sampling.temperature for s in sequences])).softmax(dim=-1)


def _column(like: torch.Tensor, values: Seq[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]


def _invert(p: torch.Tensor, sequences: Seq[Sequence]) -> torch.Tensor:
    """Index at which the cumulative distribution of each row passes the row's uniform number; shape [rows, 1]."""
    cumulative = p.cumsum(dim=-1)
    uniform = uniforms([s.seed for s in sequences], [len(s.tokens) for s in sequences])
    target = torch.from_numpy(uniform).to(p.device)[:, None] * cumulative[:, -1:]
    # A row without a distribution (NaN: every token barred, or logits that overflowed) finds no place; its token means
    # nothing, but it must be one, or this row would end the step of all.
    return torch.searchsorted(cumulative, target, right=True).clamp_(max=p.shape[1] - 1)


def uniforms(seeds: Seq[int], positions: Seq[int]) -> npt.NDArray[np.float64]:
    """Numbers in (0, 1), shape [n]: a function of seed (0 to 2**64 - 1) and position only.

    Two rounds of the SplitMix64 finaliser (Steele, Lea, Flood, 2014). 48 bits, so that a sum times it is below the sum.
    """
    x = np.array(seeds, dtype=np.uint64)
    with np.errstate(over="ignore"):
        x = _mix(_mix(x + _GOLDEN) ^ np.array(positions, dtype=np.uint64) * _GOLDEN)
    return ((x >> np.uint64(16)).astype(np.float64) + 0.5) * 2.0**-48


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
