"""Every metric of the worker, with its meaning. Series of a partition disappear when the partition is revoked."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import HistogramMetricFamily

Stage = Literal["poll", "decode", "load", "step", "publish", "commit", "flush"]
STAGES: tuple[Stage, ...] = ("poll", "decode", "load", "step", "publish", "commit", "flush")


class BulkHistogram:
    """A histogram that takes a whole batch at once: prometheus_client's own takes a microsecond a value. One label."""

    def __init__(self, name: str, documentation: str, label: str, edges: Iterable[float], registry: CollectorRegistry) -> None:
        self._name, self._documentation, self._label = name, documentation, label
        self._edges = np.array(list(edges))
        self._counts: dict[str, NDArray[np.int64]] = {}
        self._sums: dict[str, float] = {}
        registry.register(self)

    def observe(self, label: str, values: NDArray[np.float64] | NDArray[np.float32]) -> None:
        counts = np.bincount(np.searchsorted(self._edges, values), minlength=len(self._edges) + 1)
        self._counts[label] = self._counts.get(label, 0) + counts
        self._sums[label] = self._sums.get(label, 0.0) + float(values.sum())

    def collect(self) -> Iterator[HistogramMetricFamily]:
        family = HistogramMetricFamily(self._name, self._documentation, labels=[self._label])
        for label, counts in list(self._counts.items()):
            upto = np.cumsum(counts)
            buckets = [(f"{edge:g}", float(n)) for edge, n in zip(self._edges, upto, strict=False)]
            family.add_metric([label], [*buckets, ("+Inf", float(upto[-1]))], self._sums[label])
        yield family


class Metrics:
    """One worker's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def counter(name: str, documentation: str, *labels: str) -> Counter:
            return Counter(f"streamscore_{name}", documentation, labels, registry=registry)

        def gauge(name: str, documentation: str, *labels: str) -> Gauge:
            return Gauge(f"streamscore_{name}", documentation, labels, registry=registry)

        self.lag = gauge("consumer_lag_records", "Records of a partition that are not processed yet.", "topic", "partition")
        self.events = counter("events_total", "Events taken into states, replayed ones not counted.")
        self.scores = counter("scores_total", "Scores published, by trigger (event, silence).", "trigger")
        self.dead_letters = counter("dead_letters_total", "Records published to the dead-letter topic, by reason.", "reason")
        self.batch_records = BulkHistogram(
            "streamscore_batch_records", "Records in a micro-batch.", "kind", (1, 3, 10, 30, 100, 300, 1000, 3000, 10_000), registry
        )
        self.stage_seconds = counter("stage_seconds_total", f"Seconds spent, by stage ({', '.join(STAGES)}).", "stage")
        self.arrival_seconds = BulkHistogram(
            "streamscore_arrival_to_published_seconds",
            "Seconds from a record's Kafka timestamp to its score being published, by trigger.",
            "trigger",
            (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 3, 10, 60, 600),
            registry,
        )
        self.cache_lookups = counter("cache_lookups_total", "Look-ups of a user's state, by result (hit, miss).", "result")
        self.cache_users = gauge("cache_users", "Users whose state is in memory.")
        self.redis_bytes = gauge("redis_used_memory_bytes", "Memory that Redis says it uses, all its clients together.")
        self.redis_users = gauge("redis_users", "Users whose state is in Redis, by partition.", "partition")
        self.flushed_users = counter("flushed_users_total", "User states written to Redis.")
        self.timers_due = gauge("timers_due", "Users of a partition whose due time has passed and who are not fired yet.", "partition")
        self.clock_seconds = gauge("stream_clock_timestamp_seconds", "The partition's stream clock.", "partition")
        self.replayed = counter(
            "replayed_events_total", "Events replayed into states, without publishing, after a crash, a rebalance or a loss in Redis."
        )
        self.lost = counter("replay_lost_records_total", "Records that a replay needed and the topic no longer retained.")
        self.reacquired = counter(
            "partitions_reacquired_total", "Times a partition's states were dropped and read anew, by reason.", "reason"
        )
        self.rebuilt = counter("states_rebuilt_total", "States rebuilt from their last events after a change of encoder.")
        self.model_info = gauge("model_info", "1 for the version that is running.", "version")
        self.model_created = gauge("model_created_timestamp_seconds", "When the running model was made; its age is time() minus this.")
        self.swaps = counter("model_swaps_total", "Models taken over while running.")
        self.rejected = counter("artifacts_rejected_total", "Artifacts that the registry offered and the worker refused.")
        self.retries = counter("retries_total", "Attempts repeated because something was away, by what (kafka, redis, registry).", "what")
        self.score = BulkHistogram(
            "streamscore_score", "Published probabilities, by target.", "target", [i / 20 for i in range(1, 20)] + [1.0], registry
        )
        for stage in STAGES:
            self.stage_seconds.labels(stage)
        for trigger in ("event", "silence"):
            self.scores.labels(trigger)
        self._running: str | None = None

    @contextmanager
    def stage(self, name: Stage) -> Iterator[None]:
        """Time a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.stage_seconds.labels(name).inc(time.perf_counter() - start)

    def running(self, version: str, created_at: float) -> None:
        """A model has been taken over."""
        if self._running:
            self.model_info.remove(self._running)
            self.swaps.inc()
        self.model_info.labels(version).set(1)
        self.model_created.set(created_at)
        self._running = version

    def revoked(self, number: int, topics: Iterable[str]) -> None:
        """A partition is no longer ours: its series disappear."""
        for family in (self.redis_users, self.timers_due, self.clock_seconds):
            _remove(family, str(number))
        for topic in topics:
            _remove(self.lag, topic, str(number))


def _remove(family: Gauge, *labels: str) -> None:
    try:
        family.remove(*labels)
    except KeyError:
        return
