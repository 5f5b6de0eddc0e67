"""The limit: kafka-python, consume -> send, nothing between. One serial loop with the worker's client settings and poll size.

A program of its own (python -m bench.limit ...), so that its CPU time can be told from the benchmark's. Runs until it is killed.
"""

from __future__ import annotations

import argparse
import time

from kafka import KafkaConsumer, KafkaProducer
from kafka.coordinator.assignors.range import RangePartitionAssignor
from kafka.structs import OffsetAndMetadata

from worker.settings import WorkerSettings
from worker.transaction import ANSWER_MS, BATCH_BYTES, LARGEST_REQUEST, LINGER_MS

DEFAULTS = WorkerSettings()


def main() -> None:
    """Copy one topic to another."""
    parser = argparse.ArgumentParser()
    for name in ("bootstrap", "source", "target", "group", "guarantee"):
        parser.add_argument(f"--{name}", required=True)
    options = parser.parse_args()
    exactly_once = options.guarantee == "exactly_once"
    consumer = KafkaConsumer(
        options.source,
        bootstrap_servers=options.bootstrap,
        metrics_enabled=False,
        group_id=options.group,
        isolation_level="read_committed",
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        partition_assignment_strategy=[RangePartitionAssignor],
        session_timeout_ms=DEFAULTS.session_timeout_ms,
        heartbeat_interval_ms=DEFAULTS.heartbeat_interval_ms,
        request_timeout_ms=2 * ANSWER_MS,
        fetch_max_wait_ms=50,
        max_partition_fetch_bytes=4 * 1024 * 1024,
    )
    producer = KafkaProducer(
        bootstrap_servers=options.bootstrap,
        metrics_enabled=False,
        acks="all",
        enable_idempotence=True,
        linger_ms=LINGER_MS,
        batch_size=BATCH_BYTES,
        max_request_size=LARGEST_REQUEST,
        retry_backoff_ms=10,
        **({"transactional_id": options.group} if exactly_once else {}),
    )
    if exactly_once:
        producer.init_transactions()
    commit_at = 0.0
    offsets = {}
    while True:
        polled = consumer.poll(timeout_ms=100, max_records=DEFAULTS.max_batch_records)
        if polled and exactly_once:
            producer.begin_transaction()
        for partition, records in polled.items():
            number = partition.partition
            for record in records:
                producer.send(options.target, record.value, record.key, None, number)
            offsets[partition] = OffsetAndMetadata(records[-1].offset + 1, "", -1)
        if polled:
            producer.flush()
        if polled and exactly_once:
            producer.send_offsets_to_transaction(offsets, consumer.group_metadata())
            producer.commit_transaction()
            offsets = {}
        elif offsets and time.monotonic() >= commit_at:  # as often as the worker, which flushes before it commits
            consumer.commit(offsets)
            commit_at = time.monotonic() + DEFAULTS.flush_interval_ms / 1000
            offsets = {}


if __name__ == "__main__":
    main()
