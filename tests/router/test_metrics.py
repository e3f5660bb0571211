"""The router's own histogram and families, against what Prometheus' parser reads."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from router.disagg_metrics import DisaggFigures
from router.disaggregation import Verdict
from router.metrics import Histogram, IndexFigures, Metrics

TABLE = Path(__file__).parents[2] / "docs" / "metrics.md"


@given(values=st.lists(st.tuples(st.floats(0, 20), st.integers(1, 3))))
def test_histogram(values: list[tuple[float, int]]) -> None:
    """Each bucket holds the observations up to its bound, and the last one all."""
    bounds = (0.1, 1.0, 10.0)
    histogram = Histogram(bounds)
    for value, times in values:
        histogram.observe(value, times)
    wanted = [float(sum(times for value, times in values if value <= bound)) for bound in (*bounds, float("inf"))]
    assert [count for _, count in histogram.buckets()] == wanted


def filled() -> Metrics:
    metrics = Metrics()
    metrics.count_request("chat_completions", "m", 200)
    metrics.index_figures = lambda: {"m": IndexFigures(5, 0.1, 1, 2, 3)}
    model = metrics.model("m")
    model.ttft_s.observe(0.2)
    model.placed("i1", "kv")
    model.placed("i2", "load")
    model.migrated("lost")
    model.disagg.decided(Verdict(remote=True, reason="cheaper"))
    model.disagg.decided(Verdict(remote=True, reason="cheaper"))
    model.disagg.failed("late")
    model.disagg.transferred({"transfer_ms": 20.0, "transferred_tokens": 400})
    return metrics


def test_every_family_is_documented() -> None:
    """What is served is what the table in the docs lists, and the other way round."""
    families = text_string_to_metric_families(filled().render().decode())
    served = {f.name + ("_total" if f.type == "counter" else "") for f in families}
    listed = {line.split("`")[1] for line in TABLE.read_text().splitlines() if line.startswith("| `dynamo_llm_router_")}
    assert served == listed


def test_figures_of_disaggregation() -> None:
    """Decisions by where and why, failures by reason, and transfers as decode workers tell of them."""
    lines = filled().render().decode().splitlines()
    assert 'dynamo_llm_router_prefills_total{model="m",reason="cheaper",where="remote"} 2.0' in lines
    assert 'dynamo_llm_router_remote_prefill_failures_total{model="m",reason="late"} 1.0' in lines
    assert 'dynamo_llm_router_kv_transferred_tokens_total{model="m"} 400.0' in lines
    assert 'dynamo_llm_router_kv_transfer_seconds_sum{model="m"} 0.02' in lines


@given(told=st.lists(st.tuples(st.floats(0.001, 1e6), st.integers(1, 10**6)), min_size=1, max_size=20))
def test_the_transfer_rate_stays_among_those_measured(told: list[tuple[float, int]]) -> None:
    """A moving average is never faster than the fastest transfer nor slower than the slowest."""
    figures = DisaggFigures()
    for took_ms, tokens in told:
        figures.transferred({"transfer_ms": took_ms, "transferred_tokens": tokens})
    rates = [1000.0 * tokens / took_ms for took_ms, tokens in told]
    assert min(rates) * 0.999 <= figures.transfer_tokens_per_s <= max(rates) * 1.001


def test_a_gone_instance_leaves_no_series() -> None:
    """Restarts of workers do not add up to ever more series."""
    metrics = filled()
    metrics.model("m").forget_instance("i1")
    text = metrics.render().decode()
    assert 'instance="i1"' not in text
    assert 'instance="i2"' in text
