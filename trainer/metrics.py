"""Every Prometheus metric of the trainer, with its meaning."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)


class Metrics:
    """The trainer's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def counter(name: str, meaning: str, *labels: str) -> Counter:
            return Counter(f"streamscore_trainer_{name}", meaning, labels, registry=registry)

        def gauge(name: str, meaning: str, *labels: str) -> Gauge:
            return Gauge(f"streamscore_trainer_{name}", meaning, labels, registry=registry)

        self.rows = counter("rows", "Events taken into the log since the start")  # exported as ..._total, like every counter
        self.bad_rows = counter("bad_rows", "Records skipped because they are no events, by reason", "reason")
        self.gaps = counter("missing_records", "Records that Kafka no longer retained when they were to be read")
        self.lag = gauge("lag_records", "Records of a partition that are still to be read", "topic", "partition")
        self.log_bytes = gauge("log_bytes", "Size of the log on disk")
        self.log_files = gauge("log_files", "Files of the log")
        self.log_failures = counter("log_failures", "Times that the disk did not take what was to be written to the log")
        self.log_rows = gauge("log_rows", "Events in the log on disk")
        self.connected = gauge("kafka_connected", "1 while Kafka answers")

        self.window_users = gauge("window_users", "Users with an event in the last round's window; of a large window by a sample")
        self.window_events = gauge("window_events", "Events in the last round's window")
        self.window_end = gauge("window_end_timestamp_seconds", "Time of the newest event in the last round's window")
        self.rounds = counter(
            "rounds",
            "Rounds and refreshes by outcome: promoted, rejected, published, outdated (another champion came meanwhile), waiting, failed",
            "outcome",
            "rhythm",
        )
        self.round_seconds = Histogram(
            "streamscore_trainer_round_seconds",
            "Seconds of a round by stage: load, dataset, fit, evaluate, publish, report",
            ("stage",),
            registry=registry,
            buckets=_SECONDS,
        )
        self.training = gauge("training", "1 while a round is under way")
        self.validation_loss = gauge(
            "validation_loss", "Negative log-likelihood of a validation moment, of the last fitting's best weights"
        )

        self.auc = gauge("auc", "Area under the ROC curve on the last round's test window", "target", "model")
        self.log_loss = gauge("log_loss", "Log-loss on the last round's test window, nats", "target", "model")
        self.ece = gauge("ece", "Expected calibration error on the last round's test window", "target", "model")
        self.promotions = counter("promotions", "Models promoted")
        self.rejections = counter("rejections", "Models that the gate rejected")
        self.event_to_promotion = gauge(
            "event_to_promotion_seconds",
            "From the arrival of the newest event learnt from to the promotion, last time: of an encoder (round), of heads (refresh)",
            "rhythm",
        )
        self.last_promotion = gauge("last_promotion_timestamp_seconds", "When `current` was last moved by this trainer")

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Observe the seconds of a round's stage."""
        begin = time.monotonic()
        yield
        self.round_seconds.labels(stage).observe(time.monotonic() - begin)
