"""Collecting: follow the event topics in a consumer group of the trainer's own, and keep every event in the log.

Partitions are assigned by hand and positions come from the log, so there is nothing to rebalance and nothing that Kafka could forget.
The offsets committed to the group are for people: they make the trainer's lag visible in Kafka's own tools.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from kafka import KafkaConsumer, TopicPartition
from kafka.errors import KafkaError, OffsetOutOfRangeError
from kafka.structs import OffsetAndMetadata

from model.events import EventDecoder, Limits
from trainer.arrivals import Arrivals
from trainer.log import EventLog, LogError
from trainer.metrics import Metrics
from trainer.settings import TrainerSettings

DAY_MS = 86_400_000
MAX_POLL = 20_000
CHECK_SECONDS = 10.0
"""How often a quiet Kafka is asked whether it is still there and whether topics have grown."""
METADATA_MS = 30_000
"""Age at which what the client knows of the topics is asked for again: as long as new partitions stay unnoticed, at most."""
ANSWER_MS = 3000

logger = logging.getLogger(__name__)


class Waiting(Exception):
    """Not an error: something that has to come first is not there yet. The message says what."""


class Collector:
    """Moves events from Kafka to the log, one `poll` at a time."""

    def __init__(self, settings: TrainerSettings, log: EventLog, metrics: Metrics, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._log = log
        self._metrics = metrics
        self._clock = clock
        limits = Limits(
            settings.max_event_bytes,
            settings.max_user_id_bytes,
            int(settings.max_future_seconds * 1000),
            int(settings.max_age_days * DAY_MS),
        )
        self._decoder = EventDecoder(limits, settings.event_fields)
        self._consumer: KafkaConsumer | None = None
        self._goal: dict[TopicPartition, int] = {}
        self._unflushed_since: float | None = None
        self._checked_at = 0.0

        self.brokers = settings.kafka_bootstrap_servers
        self.alive_at = clock()
        self.taken = 0
        self.arrivals = Arrivals()

    caught_up = False
    """Whether everything that was in Kafka when the collector connected is in the log."""

    def poll(self, timeout_seconds: float) -> int:
        """Take what comes within the timeout, and flush when it is time. Returns the number of records. Raises Waiting or KafkaError."""
        self.alive_at = self._clock()
        consumer = self._consumer or self._connect()
        try:
            polled = consumer.poll(timeout_ms=int(timeout_seconds * 1000), max_records=MAX_POLL)
        except OffsetOutOfRangeError:
            self.disconnect()  # connecting again finds out what is missing
            return 0
        for partition, records in polled.items():
            self._take(partition, records)
        count = sum(map(len, polled.values()))
        self.taken += count
        now = self._clock()
        if now - self._checked_at > CHECK_SECONDS:
            self._check(consumer)
            self._checked_at = now
        if self._log.dirty and self._unflushed_since is None:
            self._unflushed_since = now
        if not self.caught_up and all(self._position(consumer, p) >= offset for p, offset in self._goal.items()):
            self.flush()
            self.caught_up = True
        elif self._flush_due(now):
            self.flush()
        return count

    def flush(self) -> None:
        """Make the log durable, thin it out, and tell Kafka how far it is. Raises LogError where the disk does not take it."""
        log, settings, metrics = self._log, self._settings, self._metrics
        try:
            if log.flush():
                keep_ms = int((settings.window_days + settings.log_margin_days) * DAY_MS)
                log.retain((log.newest_ms or 0) - keep_ms)
                log.compact()
        except LogError:
            metrics.log_failures.inc()
            raise
        self._unflushed_since = None
        metrics.log_bytes.set(log.bytes)
        metrics.log_files.set(len(log.files))
        metrics.log_rows.set(log.rows)
        if self._consumer is not None:
            self._consumer.commit_async(self._offsets(self._consumer))

    def close(self) -> None:
        """Flush, tell Kafka, and leave."""
        try:
            self.flush()
            if self._consumer is not None:
                self._consumer.commit(self._offsets(self._consumer), timeout_ms=2000)
        finally:
            self.disconnect()

    def _offsets(self, consumer: KafkaConsumer) -> dict[TopicPartition, OffsetAndMetadata]:
        known = self._log.next_offsets.items()
        return {p: OffsetAndMetadata(o, "", -1) for (t, n), o in known if (p := TopicPartition(t, n)) in consumer.assignment()}

    def disconnect(self) -> None:
        """Forget the connection; the next poll makes a new one. What was read stays."""
        consumer, self._consumer = self._consumer, None
        self._metrics.connected.set(0)
        if consumer is not None:
            consumer.close(autocommit=False, timeout_ms=2000)

    def _flush_due(self, now: float) -> bool:
        if self._unflushed_since is None:
            return False
        settings = self._settings
        return self._log.waiting >= settings.log_flush_rows or now - self._unflushed_since >= settings.log_flush_seconds

    def _connect(self) -> KafkaConsumer:
        consumer = KafkaConsumer(
            **self._settings.kafka_client(),
            group_id=self._settings.group,
            enable_auto_commit=False,
            auto_offset_reset="none",  # a gap is to be noticed, not to be jumped over in silence
            isolation_level="read_committed",
            allow_auto_create_topics=False,
            max_poll_records=MAX_POLL,
            max_partition_fetch_bytes=4 << 20,
            metadata_max_age_ms=METADATA_MS,
            bootstrap_timeout_ms=ANSWER_MS,
        )
        try:
            partitions = self._partitions(consumer)
            consumer.assign(partitions)
            first = consumer.beginning_offsets(partitions, timeout_ms=ANSWER_MS)
            end = consumer.end_offsets(partitions, timeout_ms=ANSWER_MS)
            for partition in partitions:
                consumer.seek(partition, self._start(partition, first[partition], end[partition]))
        except BaseException:
            consumer.close(autocommit=False, timeout_ms=2000)
            raise
        self._consumer, self._goal, self._checked_at = consumer, end, self._clock()
        self._metrics.connected.set(1)
        behind = sum(end[p] - self._position(consumer, p) for p in partitions)
        logger.info(
            "following %s: %d partitions, %s records behind", ", ".join(self._settings.event_topics), len(partitions), f"{behind:,}"
        )
        return consumer

    def _partitions(self, consumer: KafkaConsumer) -> list[TopicPartition]:
        found = []
        for topic in self._settings.event_topics:
            numbers = consumer.partitions_for_topic(topic)
            if not numbers:
                raise Waiting(f"topic {topic} does not exist (yet) at {self._settings.kafka_bootstrap_servers}")
            found += [TopicPartition(topic, n) for n in sorted(numbers)]
        return found

    def _start(self, partition: TopicPartition, first: int, end: int) -> int:
        """Where to read on: after what the log has, or at the first record that is retained."""
        position = self._log.next_offsets.get((partition.topic, partition.partition))
        if position is None:
            return first
        where = f"topic {partition.topic}, partition {partition.partition}"
        if position < first:
            self._metrics.gaps.inc(first - position)
            logger.error(
                "%s: records %d to %d are no longer retained by Kafka and are missing from the log: "
                "keep the trainer running, or let the topic retain more",
                where,
                position,
                first - 1,
            )
            return first
        if position > end:
            logger.error(
                "%s ends at offset %d, but %d were read already: it was made anew, and is read from its start", where, end, position
            )
            return first
        return position

    def _take(self, partition: TopicPartition, records: Sequence[Any]) -> None:
        columns, bad = self._decoder.columns([r.value for r in records], [r.timestamp for r in records])
        times = columns.time_ms.tolist()
        one = self._decoder.one

        def rows() -> Iterator[tuple[Any, ...]]:
            for i, time_ms in zip(columns.index.tolist(), times, strict=True):
                r = records[i]
                e = one(r.value)
                attributes = bytes(e.attributes).decode() or None
                yield (
                    partition.topic,
                    partition.partition,
                    r.offset,
                    e.user_id,
                    e.type,
                    time_ms,
                    e.item_id,
                    e.category,
                    e.value,
                    e.session_id,
                    e.event_id,
                    attributes,
                )

        self._log.append(rows(), (partition.topic, partition.partition), records[-1].offset + 1)
        self._metrics.rows.inc(len(columns))
        if len(columns):
            newest = int(columns.time_ms.argmax())
            self.arrivals.note(times[newest], records[int(columns.index[newest])].timestamp)
        for record in bad:
            self._metrics.bad_rows.labels(record.reason).inc()

    def _check(self, consumer: KafkaConsumer) -> None:
        """Ask Kafka where its partitions end: says whether it is there, how far we are behind, and whether topics have grown."""
        partitions = self._partitions(consumer)
        if set(partitions) != consumer.assignment():
            logger.info("the topics have grown: %d partitions now", len(partitions))
            self.disconnect()
            return
        for partition, end in consumer.end_offsets(partitions, timeout_ms=ANSWER_MS).items():
            lag = max(end - self._position(consumer, partition), 0)
            self._metrics.lag.labels(partition.topic, partition.partition).set(lag)

    def _position(self, consumer: KafkaConsumer, partition: TopicPartition) -> int:
        return int(consumer.position(partition, timeout_ms=ANSWER_MS) or 0)


def follow(collector: Collector, stopping: Callable[[], bool], wait: Callable[[float], object]) -> None:
    """Collect until told to stop; say so where Kafka or the disk is away, and try again. `wait` is interruptible by stopping."""
    said, backoff, disk_failed = "", 0.5, False
    while not stopping():
        try:
            if disk_failed:
                collector.flush()  # what is in memory first: with a full disk it must not grow
            collector.poll(0.5)
            if said:
                logger.info("collecting goes on")
            said, backoff, disk_failed = "", 0.5, False
            continue
        except Waiting as reason:
            problem = f"waiting: {reason}"
        except LogError as error:
            problem, disk_failed = f"trying again: {error}", True
        except (KafkaError, OSError) as error:
            problem = f"Kafka at {collector.brokers} does not answer, trying again: {error}"
        if problem != said:
            logger.warning(problem)
        said = problem
        if not disk_failed:
            _quietly(collector.disconnect)
        wait(backoff)
        backoff = min(backoff * 2, 10.0)
    _quietly(collector.close)


def _quietly(action: Callable[[], None]) -> None:
    try:
        action()
    except (KafkaError, OSError) as error:
        logger.warning("while closing: %s", error)
