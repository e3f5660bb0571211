"""A worker's figures for Prometheus, and the small HTTP server that shows them. docs/metrics.md has the table of names.

The service counts in plain attributes, once per step and under its lock; families are built when somebody scrapes.
"""

import json
import threading
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from dynamo_llm.engines.base import StepResult
from kvstore.wire import Load, Output

PREFIX = "dynamo_llm_worker_"
_LATENCY_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_TOKEN_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0)


_MOST_FINISHED = 4096


class Timed(Protocol):
    """What `Metrics.output` needs to know of a request in flight (`service.InFlight`)."""

    prompt_tokens: int
    generated_tokens: int
    received_s: float
    first_s: float
    last_s: float


class FinishedRequest(NamedTuple):
    """The figures of one request that has ended. `token_s` is the mean between two tokens."""

    prompt_tokens: int
    generated_tokens: int
    ttft_s: float
    token_s: float
    e2e_s: float


class Histogram:
    """Counts by upper bound. One thread writes; a scrape may be one observation behind."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Take `value` as seen `times` times."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def family(self, name: str, text: str, label: dict[str, str]) -> HistogramMetricFamily:
        family = HistogramMetricFamily(name, text, labels=list(label))
        names = [*(repr(bound) for bound in self._bounds), "+Inf"]
        buckets = list(zip(names, accumulate(self._counts), strict=True))
        family.add_metric(list(label.values()), buckets=buckets, sum_value=self._sum)
        return family


class Metrics(Collector):
    """One instance's figures."""

    def __init__(self, model: str, **labels: str) -> None:
        self._label = {"model": model, **labels}
        self.finish_reasons: Counter[str] = Counter()
        self.refusals: Counter[str] = Counter()
        self.ttft_s = Histogram(_LATENCY_S)
        self.itl_s = Histogram(_TOKEN_S)
        self.e2e_s = Histogram(_LATENCY_S)
        self.queue_s = Histogram(_LATENCY_S)
        self.step_s = Histogram(_TOKEN_S)
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.computed_tokens = 0
        self.generated_tokens = 0
        self.frames = 0
        self.block_size = 0
        self._finished: deque[FinishedRequest] | None = None
        self.parts: list[Collector] = []
        """Figures of what only some workers have."""
        self.load: Callable[[], Load] = Load
        """The figures below are read when somebody scrapes; the worker sets them."""
        self.sessions: Callable[[], int] = lambda: 0
        self.events: Callable[[], tuple[int, int]] = lambda: (0, 0)
        """Batches of KV events (published, dropped)."""
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self)

    def refused(self, code: str) -> None:
        self.refusals[code] += 1

    def finished(self, reason: str) -> None:
        self.finish_reasons[reason] += 1

    def keep_finished(self) -> None:
        """From now on `take_finished` has something to tell: the requests that ended last, a few thousand at most."""
        self._finished = deque(maxlen=_MOST_FINISHED)

    def take_finished(self) -> Iterator[FinishedRequest]:
        while self._finished:
            yield self._finished.popleft()

    def output(self, output: Output, request: Timed, now_s: float) -> None:
        """What one request got in a step. Brings what is counted in `request` forward."""
        if output.started is not None:
            self.prompt_tokens += request.prompt_tokens
            self.cached_tokens += output.started.cached_tokens
            self.queue_s.observe(output.started.queue_ms / 1e3)
        if tokens := len(output.token_ids):
            self.generated_tokens += tokens
            request.generated_tokens += tokens
            if request.last_s:
                self.itl_s.observe((now_s - request.last_s) / tokens, tokens)
            else:
                self.ttft_s.observe(now_s - request.received_s)
                request.first_s = now_s
            request.last_s = now_s
        if output.finish_reason is not None:
            self.finished(output.finish_reason)
            self.e2e_s.observe(now_s - request.received_s)
            if self._finished is not None:
                self._finished.append(_figures_of(request, now_s))

    def stepped(self, step: StepResult) -> None:
        self.computed_tokens += step.prefill_tokens
        self.step_s.observe(step.step_s)

    def collect(self) -> Iterator[Metric]:
        yield from self._counters()
        yield from self._gauges()
        for name, histogram, text in (
            ("time_to_first_token_seconds", self.ttft_s, "From the arrival of a request to its first token."),
            ("inter_token_latency_seconds", self.itl_s, "Between two tokens of a request."),
            ("request_seconds", self.e2e_s, "From the arrival of a request to its final output."),
            ("request_queue_seconds", self.queue_s, "From the arrival of a request to its first engine step."),
            ("engine_step_seconds", self.step_s, "One engine step."),
        ):
            yield histogram.family(PREFIX + name, text, self._label)
        for part in self.parts:
            yield from part.collect()

    def _counters(self) -> Iterator[Metric]:
        published, dropped = self.events()
        for name, value, text in (
            ("prompt_tokens", self.prompt_tokens, "Prompt tokens of requests that were started."),
            ("cached_prompt_tokens", self.cached_tokens, "Prompt tokens whose KV was reused."),
            ("computed_prompt_tokens", self.computed_tokens, "Prompt tokens that were computed."),
            ("generated_tokens", self.generated_tokens, "Tokens generated."),
            ("frames", self.frames, "Frames sent to routers."),
            ("kv_event_batches_published", published, "Batches of KV events that reached Redis."),
            ("kv_event_batches_dropped", dropped, "Batches of KV events that did not."),
        ):
            counter = CounterMetricFamily(PREFIX + name, text, labels=list(self._label))
            counter.add_metric(list(self._label.values()), value)
            yield counter
        for name, by, counts, text in (
            ("requests", "finish_reason", self.finish_reasons, "Requests that ended, by finish reason."),
            ("requests_refused", "code", self.refusals, "Requests that were not accepted, by error code."),
        ):
            counter = CounterMetricFamily(PREFIX + name, text, labels=[*self._label, by])
            for key, value in list(counts.items()):
                counter.add_metric([*self._label.values(), key], value)
            yield counter

    def _gauges(self) -> Iterator[Metric]:
        load = self.load()
        prompt = max(self.prompt_tokens, 1)
        for name, value, text in (
            ("requests_running", load.running, "Sequences in the batch."),
            ("requests_waiting", load.waiting, "Sequences admitted and not yet in the batch."),
            ("waiting_prefill_tokens", load.waiting_prefill_tokens, "Prompt tokens still to be computed."),
            ("kv_blocks_used", load.kv_blocks_used, "KV blocks that running sequences hold."),
            ("kv_blocks_cached", load.kv_blocks_cached, "Free KV blocks that hold a reusable prefix."),
            ("kv_blocks_total", load.kv_blocks_total, "KV blocks of the engine."),
            ("prefix_hit_ratio", self.cached_tokens / prompt, "Share of prompt tokens reused, since the start."),
            ("sessions", self.sessions(), "Routers with an open session."),
        ):
            gauge = GaugeMetricFamily(PREFIX + name, text, labels=list(self._label))
            gauge.add_metric(list(self._label.values()), value)
            yield gauge


def _figures_of(request: Timed, now_s: float) -> FinishedRequest:
    return FinishedRequest(
        prompt_tokens=request.prompt_tokens,
        generated_tokens=request.generated_tokens,
        ttft_s=request.first_s - request.received_s,
        token_s=(request.last_s - request.first_s) / max(request.generated_tokens - 1, 1),
        e2e_s=now_s - request.received_s,
    )


class Joined(Collector):
    """The figures of several instances, each family once. They are told apart by a label of theirs."""

    def __init__(self, parts: Sequence[Metrics]) -> None:
        self._parts = parts
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self)

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for part in self._parts:
            for family in part.collect():
                known = families.setdefault(family.name, family)
                if known is not family:
                    known.samples += family.samples
        yield from families.values()


class MetricsServer:
    """Serves `/metrics`, and `/health`: 200 while `health` returns None, else 503 with the reason."""

    def __init__(self, host: str, port: int, registry: CollectorRegistry, health: Callable[[], str | None]) -> None:
        """Binds at once. Raises `OSError` where the port is taken."""

        class Handler(BaseHTTPRequestHandler):
            timeout = 10  # seconds for a client to send its request: a silent one holds no thread for ever

            def do_GET(self) -> None:
                if self.path == "/metrics":
                    self._answer(200, CONTENT_TYPE_LATEST, generate_latest(registry))
                elif self.path == "/health":
                    reason = health()
                    body = json.dumps({"status": "ok" if reason is None else reason}).encode()
                    self._answer(200 if reason is None else 503, "application/json", body)
                else:
                    self._answer(404, "text/plain", b"not found; there is /metrics and /health\n")

            def _answer(self, status: int, content_type: str, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Type", content_type)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                """Scrapes are not worth a line."""

        self._server = ThreadingHTTPServer((host, port), Handler)
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
