"""The instance's figures in Triton's own `/metrics`, under three sets of names: ours, vllm_backend's, and
tensorrtllm_backend's (docs/metrics.md). `deployment.py` keeps them up.

Each change of a figure is a message to the server of some 30 us. So all are brought up to date twice a second, and
histograms get one observation for each request, when it has ended.
"""

import threading
from collections.abc import Iterator, Sequence
from typing import Any

from dynamo_llm.metrics import FinishedRequest, Metrics

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_LATENCY_SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0)
_TOKENS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10000.0, 100000.0)

_Labels = dict[str, str]
_Sample = tuple[str, str, _Labels, float]
"""Name, text, labels, value."""


class Figures:
    """See the module's docstring."""

    def __init__(self, triton: Any, metrics: Metrics, *, model: str, version: str) -> None:
        self._triton = triton
        self._metrics = metrics
        self._labels = {"model": model, "version": version}
        self._families: dict[str, Any] = {}
        self._lock = threading.Lock()
        """A stub must not end in the middle of a message: Triton aborts."""
        self._closed = False
        self._made: dict[tuple[str, str], Any] = {}
        self._values: dict[tuple[str, str], float] = {}
        metrics.keep_finished()

    def update(self) -> None:
        """Tell Triton what has changed. Blocks for a few milliseconds; threads may share it."""
        with self._lock:
            if not self._closed:
                self._update()

    def close(self) -> None:
        """Take them out of Triton's."""
        with self._lock:
            self._closed = True
            self._made.clear()
            self._families.clear()

    def _update(self) -> None:
        triton = self._triton
        for name, text, labels, value in _counters(self._metrics, self._labels):
            changed = value - self._values.get(_key(name, labels), 0.0)
            if changed > 0 or _key(name, labels) not in self._made:
                self._metric(name, text, triton.MetricFamily.COUNTER, labels).increment(changed)
            self._values[_key(name, labels)] = value
        for name, text, labels, value in _gauges(self._metrics, self._labels):
            if self._values.get(_key(name, labels)) != value:
                self._metric(name, text, triton.MetricFamily.GAUGE, labels).set(value)
            self._values[_key(name, labels)] = value
        for request in self._metrics.take_finished():
            for name, text, buckets, value in _observations(request):
                metric = self._metric(name, text, triton.MetricFamily.HISTOGRAM, self._labels, buckets=list(buckets))
                metric.observe(value)

    def _metric(self, name: str, text: str, kind: Any, labels: _Labels, **more: Any) -> Any:
        key = _key(name, labels)
        if key not in self._made:
            family = self._families.get(name)
            if family is None:
                family = self._families[name] = self._triton.MetricFamily(name=name, description=text, kind=kind)
            self._made[key] = family.Metric(labels=labels, **more)
        return self._made[key]


def _key(name: str, labels: _Labels) -> tuple[str, str]:
    return name, repr(labels)


def _counters(metrics: Metrics, labels: _Labels) -> Iterator[_Sample]:
    yield from _own(metrics, "counter", labels)
    yield "vllm:prompt_tokens_total", "Prompt tokens of requests that were started.", labels, metrics.prompt_tokens
    yield "vllm:generation_tokens_total", "Tokens generated.", labels, metrics.generated_tokens


def _gauges(metrics: Metrics, labels: _Labels) -> Iterator[_Sample]:
    yield from _own(metrics, "gauge", labels)
    load = metrics.load()
    total = max(load.kv_blocks_total, 1)
    for kind, value in (
        ("max", load.kv_blocks_total),
        ("used", load.kv_blocks_used),
        ("free", load.kv_blocks_total - load.kv_blocks_used),
        ("fraction", load.kv_blocks_used / total),
        ("tokens_per", metrics.block_size),
    ):
        text = "KV blocks by what they are used for."
        yield "nv_trt_llm_kv_cache_block_metrics", text, {**labels, "kv_cache_block_type": kind}, value
    for kind, value in (
        ("waiting", load.waiting),
        ("scheduled", load.running),
        ("active", load.waiting + load.running),
    ):
        text = "Requests by their state."
        yield "nv_trt_llm_request_metrics", text, {**labels, "request_type": kind}, value


def _own(metrics: Metrics, kind: str, labels: _Labels) -> Iterator[_Sample]:
    for family in metrics.collect():
        if family.type == kind:
            for sample in family.samples:
                yield sample.name, family.documentation, {**sample.labels, **labels}, sample.value


def _observations(request: FinishedRequest) -> Iterator[tuple[str, str, Sequence[float], float]]:
    yield "vllm:request_prompt_tokens", "Prompt tokens of a request.", _TOKENS, request.prompt_tokens
    yield "vllm:request_generation_tokens", "Tokens generated for a request.", _TOKENS, request.generated_tokens
    text = "From the arrival of a request to its final output."
    yield "vllm:e2e_request_latency_seconds", text, _LATENCY_SECONDS, request.e2e_s
    if request.generated_tokens:
        text = "From the arrival of a request to its first token."
        yield "vllm:time_to_first_token_seconds", text, _SECONDS, request.ttft_s
    if request.generated_tokens > 1:
        text = "Between two tokens of a request, its mean."
        yield "vllm:time_per_output_token_seconds", text, _TOKEN_SECONDS, request.token_s
