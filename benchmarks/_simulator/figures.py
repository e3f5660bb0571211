"""What became of the requests of a simulation. `routing.py` fills it in."""

from collections import Counter
from collections.abc import Sequence
from math import inf, isnan, nan
from typing import Any

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from dynamo_llm.engines.mock_engine.simulation import Ended


class Record(Struct):
    """One request. Times are in milliseconds of the simulation."""

    arrival_ms: float
    prompt_tokens: int
    output_tokens: int
    first_ms: float = nan
    end_ms: float = nan
    paused_ms: float = nan
    """Its last token before it was preempted, until it has got the next one."""
    tokens: int = 0
    """That are no part of a run of decode steps: first ones, and those after a preemption."""
    instance: str = ""
    prefill_instance: str = ""
    """Empty: the prompt was computed where the request was decoded."""
    reason: str = "agg"
    """The policy's for that."""
    cached_tokens: int = 0
    """Prompt tokens that were reused where the prompt was computed."""
    waited_ms: float = nan
    """In the prefill queue."""
    transferred_tokens: int = 0
    transfer_ms: float = nan


class Journal:
    """All records, and every gap between two tokens of a request within a window of time.

    A run of decode steps is one entry however long it is, so gaps are kept with how often they occurred.
    """

    def __init__(self, records: list[Record], warm_up: float) -> None:
        """The window is from the arrival after the share `warm_up` of all to the last one."""
        self.records = records
        self.begin_ms = records[int(warm_up * len(records))].arrival_ms
        self.end_ms = records[-1].arrival_ms
        self.tokens = 0
        """All that were generated for clients, whenever."""
        self.window_tokens = 0
        self._gaps_ms: list[float] = []
        self._counts: list[int] = []

    def give(self, tokens: int, now_ms: float) -> None:
        """Tokens reach their clients."""
        self.tokens += tokens
        if self.begin_ms <= now_ms <= self.end_ms:
            self.window_tokens += tokens

    def decoded(self, ended: Ended) -> None:
        """A run's decode tokens. The first gap of those that joined is not a step, and is noted by itself (`gap`)."""
        run = ended.run
        if run.decoding:
            self.give(run.steps * run.decoding, ended.end_ms)
            self.gap(run.step_ms, ended.end_ms, run.steps * run.decoding - len(ended.joined))

    def gap(self, gap_ms: float, now_ms: float, count: int = 1) -> None:
        if count and self.begin_ms <= now_ms <= self.end_ms:
            self._gaps_ms.append(gap_ms)
            self._counts.append(count)

    def itl_ms(self, *shares: float) -> list[float]:
        """Quantiles of all gaps."""
        return _quantiles(np.array(self._gaps_ms), np.array(self._counts), shares)

    def measured(self) -> list[Record]:
        """Records of what arrived in the window."""
        return [record for record in self.records if record.arrival_ms >= self.begin_ms]


def _quantiles(values: npt.NDArray[Any], counts: npt.NDArray[Any], shares: Sequence[float]) -> list[float]:
    if not len(values):
        return [0.0 for _ in shares]
    order = np.argsort(values)
    ends = np.cumsum(counts[order])
    places = np.searchsorted(ends, np.array(shares) * ends[-1])
    return [float(values[order[min(place, len(order) - 1)]]) for place in places]


def summary(journal: Journal, workers: int) -> dict[str, Any]:
    """The figures of one simulation, for JSON."""
    records = journal.measured()
    ttft = np.array([record.first_ms - record.arrival_ms for record in records])
    itl_p50, itl_p99 = journal.itl_ms(0.5, 0.99)
    span_s = max(journal.end_ms - journal.begin_ms, 1e-9) / 1e3
    prompt_tokens = sum(record.prompt_tokens for record in records)
    reasons = Counter(("remote " if r.prefill_instance else "local ") + r.reason for r in records)
    transfers = [r.transfer_ms for r in records if not isnan(r.transfer_ms)]
    return {
        "itl_p50_ms": round(itl_p50, 1),
        "itl_p99_ms": round(itl_p99, 1),
        "ttft_p50_ms": round(float(np.quantile(ttft, 0.5)), 1),
        "ttft_p99_ms": round(float(np.quantile(ttft, 0.99)), 1),
        "tokens_per_s_per_worker": round(journal.window_tokens / span_s / workers, 1),
        "reused": round(sum(record.cached_tokens for record in records) / prompt_tokens, 3),
        "prefills": {reason: round(count / len(records), 3) for reason, count in sorted(reasons.items())},
        "queued": round(sum(not isnan(record.waited_ms) for record in records) / len(records), 3),
        "transfer_p50_ms": round(float(np.quantile(transfers, 0.5)), 1) if transfers else None,
        "transfer_p99_ms": round(float(np.quantile(transfers, 0.99)), 1) if transfers else None,
    }


class Limits(Struct, frozen=True, kw_only=True):
    """What operators promise."""

    itl_p99_ms: float = inf
    ttft_p99_ms: float = inf

    def hold(self, figures: dict[str, Any]) -> bool:
        return bool(figures["itl_p99_ms"] <= self.itl_p99_ms and figures["ttft_p99_ms"] <= self.ttft_p99_ms)
