"""Figures of the transfers, in the manner of `dynamo_llm.metrics`. docs/metrics.md has the table of names."""

from collections import Counter
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from dynamo_llm.metrics import PREFIX, Histogram

_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class TransferMetrics(Collector):
    """Counted on the transfer's thread. GB/s are bytes over seconds, of any span that somebody asks for."""

    def __init__(self, model: str, **labels: str) -> None:
        self._label = {"model": model, **labels}
        self.bytes = 0
        """Of pulls that succeeded."""
        self.seconds = Histogram(_SECONDS)
        """The same pulls', from the call to the last byte."""
        self.failures: Counter[str] = Counter()
        self.expired = 0
        """The figures below are read when somebody scrapes; exporter and puller set them."""
        self.pinned: Callable[[], tuple[int, int]] = lambda: (0, 0)
        """Pins and their blocks."""
        self.pulls: Callable[[], tuple[int, int]] = lambda: (0, 0)
        """Pulls without an answer, and those that have failed while NIXL may still write to their blocks."""
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self)

    def collect(self) -> Iterator[Metric]:
        for name, value, text in (
            ("kv_transfer_bytes", self.bytes, "Bytes of KV blocks pulled from other workers."),
            ("kv_pins_expired", self.expired, "Pins whose lease ended before a reader released them."),
        ):
            counter = CounterMetricFamily(PREFIX + name, text, labels=list(self._label))
            counter.add_metric(list(self._label.values()), value)
            yield counter
        text = "Pulls that failed, by reason."
        failures = CounterMetricFamily(PREFIX + "kv_transfer_failures", text, labels=[*self._label, "reason"])
        for reason, count in list(self.failures.items()):
            failures.add_metric([*self._label.values(), reason], count)
        yield failures
        (pins, blocks), (running, unsettled) = self.pinned(), self.pulls()
        for name, number, text in (
            ("kv_pins", pins, "Requests whose blocks are held for a reader."),
            ("kv_blocks_pinned", blocks, "Their blocks."),
            ("kv_transfers_running", running, "Pulls that have not ended."),
            ("kv_transfers_unsettled", unsettled, "Pulls that failed while NIXL may still write to their blocks."),
        ):
            gauge = GaugeMetricFamily(PREFIX + name, text, labels=list(self._label))
            gauge.add_metric(list(self._label.values()), number)
            yield gauge
        yield self.seconds.family(PREFIX + "kv_transfer_seconds", "One pull.", self._label)
