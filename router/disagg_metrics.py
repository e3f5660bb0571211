"""Figures of disaggregation: where prompts were computed, what failed, and what the transfers took.

One `DisaggFigures` per model, in its `metrics.ModelMetrics`. `prefill_stage.py` and `sequence.py` write into it, and
the policy takes the measured transfer rate from it. The table of names is in docs/metrics.md.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric

from router.disaggregation import Verdict
from router.histogram import LATENCY_S, Histogram

_TRANSFER_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_KEEP = 0.8
"""Weight of what was measured before, in the moving average of the transfer rate."""


class DisaggFigures:
    """See the module's docstring. Written and read on the event loop."""

    def __init__(self) -> None:
        self.prefills: dict[tuple[str, str], int] = {}
        """By where (`remote`, `local`) and the policy's reason."""
        self.failures: dict[str, int] = {}
        """Remote prefills that came to nothing, by reason; see docs/metrics.md."""
        self.queued = 0
        """Requests that waited in the prefill queue."""
        self.queue_s = Histogram(LATENCY_S)
        self.prefill_s = Histogram(LATENCY_S)
        self.transfer_s = Histogram(_TRANSFER_S)
        self.transferred_tokens = 0
        self.transfer_tokens_per_s = 0.0
        """Moving average over the transfers that decode workers told of; 0: none yet."""

    def decided(self, verdict: Verdict) -> None:
        key = ("remote" if verdict.remote else "local", verdict.reason)
        self.prefills[key] = self.prefills.get(key, 0) + 1

    def failed(self, reason: str) -> None:
        self.failures[reason] = self.failures.get(reason, 0) + 1

    def transferred(self, told: Mapping[str, Any]) -> None:
        """A decode worker says what its pull took: `transfer_ms` and `transferred_tokens`. Anything else is ignored."""
        took_ms, tokens = told.get("transfer_ms"), told.get("transferred_tokens")
        if not isinstance(took_ms, int | float) or not 0 < took_ms < 1e9:
            return
        self.transfer_s.observe(took_ms / 1000.0)
        if isinstance(tokens, int) and 0 < tokens < 1e9:
            self.transferred_tokens += tokens
            rate, before = 1000.0 * tokens / took_ms, self.transfer_tokens_per_s
            self.transfer_tokens_per_s = _KEEP * before + (1.0 - _KEEP) * rate if before else rate


def families(models: Mapping[str, DisaggFigures]) -> Iterator[Metric]:
    """For Prometheus, by model."""
    prefills = CounterMetricFamily(
        "dynamo_llm_router_prefills",
        "Decisions where a prompt is computed, of models with decode workers.",
        labels=("model", "where", "reason"),
    )
    failures = CounterMetricFamily(
        "dynamo_llm_router_remote_prefill_failures",
        "Remote prefills that came to nothing.",
        labels=("model", "reason"),
    )
    tokens = CounterMetricFamily(
        "dynamo_llm_router_kv_transferred_tokens", "Prompt tokens whose KV blocks were pulled.", labels=("model",)
    )
    queued = CounterMetricFamily(
        "dynamo_llm_router_prefills_queued", "Requests that waited in the prefill queue.", labels=("model",)
    )
    for name, figures in models.items():
        queued.add_metric((name,), figures.queued)
        for (where, reason), count in figures.prefills.items():
            prefills.add_metric((name, where, reason), count)
        for reason, count in figures.failures.items():
            failures.add_metric((name, reason), count)
        tokens.add_metric((name,), figures.transferred_tokens)
    yield from (prefills, failures, tokens, queued)
    for family, text, attribute in (
        ("remote_prefill_queue", "From a prefill's submission to its worker's first step on it.", "queue_s"),
        ("remote_prefill", "From a prefill's submission to its handover.", "prefill_s"),
        ("kv_transfer", "One pull of KV blocks, as the decode worker measured it.", "transfer_s"),
    ):
        metric = HistogramMetricFamily(f"dynamo_llm_router_{family}_seconds", text, labels=("model",))
        for name, figures in models.items():
            histogram: Histogram = getattr(figures, attribute)
            metric.add_metric((name,), histogram.buckets(), histogram.total)
        yield metric
