"""The demo's topics and groups. On a Kafka or Redis that was running before, their names are new ones, and they go when the demo does."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from kafka import KafkaAdminClient
from kafka.errors import KafkaError
from redis import Redis
from redis.exceptions import RedisError

from demo.feed import LARGEST_RECORD
from demo.servers import KafkaServer, RedisServer, create_topics

PARTITIONS = 2


@dataclass(frozen=True)
class Topics:
    events: str = "events"
    scores: str = "scores"
    dead_letters: str = "dead-letters"
    worker_group: str = "streamscore"
    trainer_group: str = "streamscore-trainer"

    @classmethod
    def with_prefix(cls, prefix: str) -> Topics:
        return cls(*(f"{prefix}-{name}" for name in ("events", "scores", "dead-letters", "worker", "trainer")))


@contextmanager
def topics(kafka: KafkaServer, redis: RedisServer) -> Iterator[Topics]:
    """Created, with two partitions each, so that two cores have something to share."""
    ours = Topics() if kafka.embedded else Topics.with_prefix(f"streamscore-demo-{secrets.token_hex(3)}")
    # The broker stamps each event as it arrives: what `visible` is measured from.
    arrival = {"message.timestamp.type": "LogAppendTime"}
    large = {"max.message.bytes": str(LARGEST_RECORD)}
    forever = {"retention.ms": "-1"}
    create_topics(
        kafka.bootstrap,
        {
            ours.events: (PARTITIONS, {**arrival, **large, **forever}),
            ours.scores: (PARTITIONS, forever),
            ours.dead_letters: (1, {**large, **forever}),
        },
    )
    try:
        yield ours
    finally:
        if not kafka.embedded:
            forget_in_kafka(kafka.bootstrap, ours)
        if not redis.embedded:
            forget_in_redis(redis.url, ours)


def forget_in_kafka(bootstrap: str, ours: Topics) -> None:
    with suppress(KafkaError), KafkaAdminClient(bootstrap_servers=bootstrap) as admin:
        admin.delete_topics([ours.events, ours.scores, ours.dead_letters])
        admin.delete_groups([ours.worker_group, ours.trainer_group])


def forget_in_redis(url: str, ours: Topics) -> None:
    with suppress(RedisError), Redis.from_url(url) as client:
        for key in client.scan_iter(f"{{{ours.worker_group}:*", count=1000):
            client.unlink(key)
