"""The worker's figures and their names."""

import json
import re
import urllib.error
import urllib.request
from pathlib import Path

from prometheus_client import generate_latest

from dynamo_llm.engines.base import StepResult
from dynamo_llm.metrics import PREFIX, Histogram, Metrics, MetricsServer
from dynamo_llm.service import InFlight
from dynamo_llm.transfer.metrics import TransferMetrics
from kvstore.wire import Load, Output, Started

DOCS = Path(__file__).parents[2] / "docs/metrics.md"


def request() -> InFlight:
    return InFlight(session=None, rid=1, prompt_tokens=40, received_s=10.0)  # type: ignore[arg-type]


def sample(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(PREFIX + name, {"model": "demo", **labels})


def test_a_request_counts_from_its_arrival_to_its_end() -> None:
    """TTFT once, a gap for each further token, the queue's time as the engine says, and the whole at the end."""
    metrics, inflight = Metrics("demo"), request()
    metrics.output(Output(1, [7], started=Started(16, 250.0)), inflight, 10.5)
    metrics.output(Output(1, [8, 9]), inflight, 10.7)
    metrics.output(Output(1, [], "stop"), inflight, 11.0)
    assert sample(metrics, "time_to_first_token_seconds_sum") == 0.5
    assert sample(metrics, "inter_token_latency_seconds_count") == 2
    assert round(sample(metrics, "inter_token_latency_seconds_sum") or 0, 6) == 0.2
    assert sample(metrics, "request_queue_seconds_sum") == 0.25
    assert sample(metrics, "request_seconds_sum") == 1.0
    assert sample(metrics, "generated_tokens_total") == 3
    assert sample(metrics, "prompt_tokens_total") == 40
    assert sample(metrics, "cached_prompt_tokens_total") == 16
    assert sample(metrics, "prefix_hit_ratio") == 0.4
    assert sample(metrics, "requests_total", finish_reason="stop") == 1


def test_gauges_are_read_when_somebody_asks() -> None:
    """The load, the sessions and the events are not copied on each step."""
    metrics = Metrics("demo")
    metrics.load = lambda: Load(running=3, waiting=2, kv_blocks_used=10, kv_blocks_cached=20, kv_blocks_total=64)
    metrics.sessions = lambda: 4
    metrics.events = lambda: (100, 1)
    assert sample(metrics, "requests_running") == 3
    assert sample(metrics, "requests_waiting") == 2
    assert sample(metrics, "kv_blocks_total") == 64
    assert sample(metrics, "sessions") == 4
    assert sample(metrics, "kv_event_batches_published_total") == 100
    assert sample(metrics, "kv_event_batches_dropped_total") == 1


def test_an_observation_lands_in_the_bucket_that_bounds_it() -> None:
    """Bounds are inclusive, buckets cumulative, and a value may count several times."""
    histogram = Histogram((0.1, 1.0))
    for value, times in ((0.1, 1), (0.5, 3), (7.0, 1)):
        histogram.observe(value, times)
    values = [s.value for s in histogram.family("x", "text", {"model": "demo"}).samples if s.name == "x_bucket"]
    assert values == [1, 4, 5]


def test_every_family_is_in_the_table_of_the_docs() -> None:
    """And the table has no name that does not exist."""
    metrics = Metrics("demo")
    metrics.parts.append(TransferMetrics("demo"))
    metrics.finished("stop")
    metrics.refused("overloaded")
    metrics.stepped(StepResult(outputs=[], ops=[], load=Load(), prefill_tokens=5, step_s=0.01))
    families = re.findall(r"^# TYPE (\S+)", generate_latest(metrics.registry).decode(), re.MULTILINE)
    section = DOCS.read_text().split("\n## Worker", 1)[1].split("\n## ", 1)[0]
    assert set(families) == set(re.findall(r"`(dynamo_llm_worker_\w+)`", section))


def test_the_server_shows_figures_and_health() -> None:
    """Health follows the reason it is given; other paths are not found."""
    reasons: list[str | None] = [None, "engine died"]
    server = MetricsServer("127.0.0.1", 0, Metrics("demo").registry, lambda: reasons.pop(0))
    answers = [_get(f"http://127.0.0.1:{server.port}/{path}") for path in ("metrics", "health", "health", "else")]
    server.close()
    assert [status for status, _ in answers] == [200, 200, 503, 404]
    assert "dynamo_llm_worker_sessions" in answers[0][1]
    assert json.loads(answers[2][1]) == {"status": "engine died"}


def _get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()
