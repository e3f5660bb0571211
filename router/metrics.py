"""The router's figures for Prometheus. The table of names is in docs/metrics.md.

What changes with every token is counted in plain attributes (an addition, not a lock and a label look-up) and turned
into metric families when somebody scrapes. `app.py` makes one `Metrics`; API layers and `generation.py` write into it.
"""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from router import disagg_metrics
from router.disagg_metrics import DisaggFigures
from router.histogram import LATENCY_S, TOKEN_S, Histogram

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class ModelMetrics:
    """The figures of one model. Attributes are written directly by whoever causes them."""

    def __init__(self) -> None:
        self.inflight = 0
        self.ttft_s = Histogram(LATENCY_S)
        self.itl_s = Histogram(TOKEN_S)
        self.e2e_s = Histogram(LATENCY_S)
        self.queue_s = Histogram(LATENCY_S)
        self.prompt_tokens = 0
        self.cached_prompt_tokens = 0
        self.generated_tokens = 0
        self.prompt_blocks = 0
        self.reused_blocks = 0
        self.placements: dict[tuple[str, str], int] = {}
        """By (instance, reason)."""
        self.migrations: dict[str, int] = {}
        """By reason: `lost`, or the wire's error code."""
        self.disagg = DisaggFigures()

    def placed(self, instance: str, reason: str) -> None:
        key = (instance, reason)
        self.placements[key] = self.placements.get(key, 0) + 1

    def migrated(self, reason: str) -> None:
        self.migrations[reason] = self.migrations.get(reason, 0) + 1

    def forget_instance(self, instance: str) -> None:
        """Drop the series of an instance that is gone, so that restarts do not add up."""
        self.placements = {key: n for key, n in self.placements.items() if key[0] != instance}


class IndexFigures:
    """State of one model's prefix index, read at scrape time (`Metrics.index_figures`)."""

    __slots__ = ("blocks", "gaps", "instances", "lag_s", "resyncs")

    def __init__(self, blocks: int, lag_s: float, gaps: int, resyncs: int, instances: int) -> None:
        self.blocks = blocks
        self.lag_s = lag_s
        self.gaps = gaps
        self.resyncs = resyncs
        self.instances = instances


class Metrics:
    """All figures of one router process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Collector(self))
        self.models: dict[str, ModelMetrics] = {}
        self.requests: dict[tuple[str, str, str], int] = {}
        self.redis_connected: Callable[[], bool] = lambda: False
        """Set by the application."""
        self.index_figures: Callable[[], dict[str, IndexFigures]] = dict
        """By model; set by the application."""
        self.prefill_queue_depths: Callable[[], dict[str, int]] = dict
        """By model; set by the application."""

    def model(self, name: str) -> ModelMetrics:
        """Figures of a model that exists: never call it with a name that a client made up."""
        found = self.models.get(name)
        if found is None:
            found = self.models[name] = ModelMetrics()
        return found

    def count_request(self, endpoint: str, model: str, status: int | str) -> None:
        """Count an answered request. `model` is empty when the client named none that exists; `status` is the HTTP
        status or the gRPC code's name, and a client that went away is 499."""
        key = (endpoint, model, str(status))
        self.requests[key] = self.requests.get(key, 0) + 1

    def render(self) -> bytes:
        """Prometheus' text format (`CONTENT_TYPE`)."""
        return generate_latest(self.registry)


class _Collector(Collector):
    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        yield from self._requests()
        yield from self._histograms()
        yield from self._counters()
        yield from disagg_metrics.families({name: model.disagg for name, model in self._metrics.models.items()})
        depths = GaugeMetricFamily(
            "dynamo_llm_router_prefill_queue_depth", "Requests of all routers in the prefill queue.", labels=("model",)
        )
        for name, depth in self._metrics.prefill_queue_depths().items():
            depths.add_metric((name,), depth)
        yield depths
        yield from self._index()

    def _requests(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "dynamo_llm_router_requests", "Requests answered.", labels=("endpoint", "model", "status")
        )
        for labels, count in self._metrics.requests.items():
            requests.add_metric(labels, count)
        yield requests
        inflight = GaugeMetricFamily(
            "dynamo_llm_router_inflight_requests", "Sequences being served.", labels=("model",)
        )
        for name, model in self._metrics.models.items():
            inflight.add_metric((name,), model.inflight)
        yield inflight

    def _histograms(self) -> Iterator[Metric]:
        for name, text, attribute in (
            ("time_to_first_token", "From the request's arrival to its first token.", "ttft_s"),
            ("inter_token_latency", "Between two tokens of one sequence.", "itl_s"),
            ("request", "From the request's arrival to its last token.", "e2e_s"),
            (
                "request_queue",
                "From submission to the worker's first step on the request, as the worker measured it.",
                "queue_s",
            ),
        ):
            family = HistogramMetricFamily(f"dynamo_llm_router_{name}_seconds", text, labels=("model",))
            for model, figures in self._metrics.models.items():
                histogram: Histogram = getattr(figures, attribute)
                family.add_metric((model,), histogram.buckets(), histogram.total)
            yield family

    def _counters(self) -> Iterator[Metric]:
        for name, text in (
            ("prompt_tokens", "Prompt tokens of accepted requests."),
            ("cached_prompt_tokens", "Prompt tokens whose KV a worker reused."),
            ("generated_tokens", "Tokens generated."),
            ("prompt_blocks", "Whole prompt blocks at placement."),
            ("reused_blocks", "Prompt blocks that the index said the chosen worker holds."),
        ):
            family = CounterMetricFamily(f"dynamo_llm_router_{name}", text, labels=("model",))
            for model, figures in self._metrics.models.items():
                family.add_metric((model,), getattr(figures, name))
            yield family
        ratio = GaugeMetricFamily(
            "dynamo_llm_router_prefix_hit_ratio", "Share of prompt tokens reused since start.", labels=("model",)
        )
        placements = CounterMetricFamily(
            "dynamo_llm_router_placements", "Placements.", labels=("model", "instance", "reason")
        )
        migrations = CounterMetricFamily(
            "dynamo_llm_router_migrations", "Requests moved to another worker.", labels=("model", "reason")
        )
        for model, figures in self._metrics.models.items():
            ratio.add_metric((model,), figures.cached_prompt_tokens / max(figures.prompt_tokens, 1))
            for (instance, reason), count in figures.placements.items():
                placements.add_metric((model, instance, reason), count)
            for reason, count in figures.migrations.items():
                migrations.add_metric((model, reason), count)
        yield from (ratio, placements, migrations)

    def _index(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(
            "dynamo_llm_router_redis_connected", "1 while Redis answers.", value=float(self._metrics.redis_connected())
        )
        figures = self._metrics.index_figures()
        for kind, name, text, attribute in (
            (GaugeMetricFamily, "instances", "Instances with an open session.", "instances"),
            (
                GaugeMetricFamily,
                "index_blocks",
                "Distinct blocks in the prefix index.",
                "blocks",
            ),
            (
                GaugeMetricFamily,
                "kv_event_lag_seconds",
                "How far the last KV event batch read is behind the newest one, sampled each second.",
                "lag_s",
            ),
            (CounterMetricFamily, "kv_event_gaps", "Gaps seen in the KV event stream.", "gaps"),
            (CounterMetricFamily, "index_resyncs", "Instances read anew from their own snapshot.", "resyncs"),
        ):
            family = kind(f"dynamo_llm_router_{name}", text, labels=("model",))
            for model, values in figures.items():
                family.add_metric((model,), getattr(values, attribute))
            yield family
