"""Visible latency at a paced load: from an event's Kafka timestamp to its score being in the hands of a read_committed consumer.

Two programs besides the worker: python -m bench.latency feed ... writes events at a fixed rate, each with its record's timestamp as its
own; python -m bench.latency read ... reads scores and takes their age. Whole milliseconds: a latency is read up to 1 ms too long.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time

import msgspec
import numpy as np
from kafka import KafkaConsumer, KafkaProducer, TopicPartition

from bench.stream import PARTITIONS, event, partition_of

TICK_S = 0.002
GIVE_UP_S = 30


class Score(msgspec.Struct):
    """What is read of a score."""

    timestamp: int


def feed(bootstrap: str, topic: str, users: int, rate: float, seconds: float) -> None:
    """Events at a steady rate. Says on stdout how far it fell behind at worst."""
    rng = random.Random(1)
    producer = KafkaProducer(bootstrap_servers=bootstrap, linger_ms=0, acks=1, enable_idempotence=False)
    started = time.perf_counter()
    sent, behind = 0, 0.0
    while sent < rate * seconds:
        behind = max(behind, time.perf_counter() - started - sent / rate)
        due = min(int((time.perf_counter() - started) * rate), int(rate * seconds))
        for number in range(sent, due):
            now_ms = int(time.time() * 1000)
            user, value = event(rng, number, users, now_ms)
            producer.send(topic, value, user.encode(), None, partition_of(user), now_ms)
        sent = max(sent, due)
        time.sleep(TICK_S)
    producer.flush()
    producer.close()
    print(json.dumps({"behind_ms": round(behind * 1000, 1)}), flush=True)


def read(bootstrap: str, topic: str, count: int, skip: int) -> None:
    """Ages of `count` scores after the first `skip`, as quantiles on stdout."""
    consumer = KafkaConsumer(bootstrap_servers=bootstrap, isolation_level="read_committed", enable_auto_commit=False, max_poll_records=2000)
    partitions = [TopicPartition(topic, p) for p in range(PARTITIONS)]
    consumer.assign(partitions)
    consumer.seek_to_beginning(*partitions)
    consumer.poll(timeout_ms=1000)
    print("reading", flush=True)
    decode = msgspec.json.Decoder(Score).decode
    ages: list[float] = []
    heard = time.monotonic()
    while len(ages) < count + skip and time.monotonic() < heard + GIVE_UP_S:
        polled = consumer.poll(timeout_ms=500)
        now_ms = time.time() * 1000
        for records in polled.values():
            ages += [now_ms - decode(r.value).timestamp for r in records]
            heard = time.monotonic()
    consumer.close()
    if len(ages) < count + skip:
        sys.exit(f"only {len(ages):,} of {count + skip:,} scores came")
    print(json.dumps(quantiles(ages[skip:])), flush=True)


def quantiles(ages_ms: list[float]) -> dict[str, float]:
    """p50, p99 and the worst."""
    return {name: round(float(np.quantile(ages_ms, q)), 1) for name, q in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))}


def main() -> None:
    """feed or read."""
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=["feed", "read"])
    parser.add_argument("--bootstrap", required=True)
    parser.add_argument("--topic", required=True)
    for name in ("users", "rate", "count", "skip"):
        parser.add_argument(f"--{name}", type=int, default=0)
    options = parser.parse_args()
    if options.role == "feed":
        seconds = (options.count + options.skip) / options.rate
        feed(options.bootstrap, options.topic, options.users, options.rate, seconds)
    else:
        read(options.bootstrap, options.topic, options.count, options.skip)


if __name__ == "__main__":
    main()
