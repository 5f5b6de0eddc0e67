"""The events of a benchmark: JSON of 190 bytes, users drawn uniformly (the worst case for a cache of users), produced by several processes.

Every program here uses the same rule for a user's partition, so that a user stays in one.
"""

from __future__ import annotations

import multiprocessing
import random
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor

from kafka import KafkaProducer

PARTITIONS = 4
TYPES = ("page_view", "search", "product_view", "add_to_cart", "purchase")
WRITERS = 2


def user_name(number: int) -> str:
    """The user_id of the n-th user."""
    return f"user-{number:06}"


def partition_of(user: str) -> int:
    """Where the events of a user are."""
    return zlib.crc32(user.encode()) % PARTITIONS


def event(rng: random.Random, number: int, users: int, time_ms: int) -> tuple[str, bytes]:
    """(user_id, JSON) of the n-th event."""
    user = user_name(rng.randrange(users))
    item = rng.randrange(2000)
    value = (
        f'{{"user_id": "{user}", "type": "{TYPES[rng.randrange(5)]}", "timestamp": {time_ms}, "event_id": "e{number:07}", '
        f'"item_id": "i{item:04}", "category": "c{item % 40:02}", "value": {rng.randrange(100, 9999) / 100:.2f}, '
        f'"session_id": "s{number % 9973:04}"}}'
    )
    return user, value.encode()


def events(count: int, users: int, start_ms: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """A stream, a millisecond between two events."""
    rng = random.Random(seed)
    return (event(rng, n, users, start_ms + n) for n in range(count))


def write(bootstrap: str, topic: str, count: int, users: int, start_ms: int, seed: int, partitions: Sequence[int]) -> None:
    """Produce what of a stream belongs to some partitions."""
    producer = KafkaProducer(bootstrap_servers=bootstrap, linger_ms=20, batch_size=512 * 1024)
    for user, value in events(count, users, start_ms, seed):
        if (partition := partition_of(user)) in partitions:
            producer.send(topic, value, user.encode(), partition=partition)
    producer.flush()
    producer.close()


def write_all(bootstrap: str, topic: str, count: int, users: int, start_ms: int, seed: int) -> None:
    """Produce a whole stream, each partition's part of it in order."""
    with ProcessPoolExecutor(WRITERS, multiprocessing.get_context("spawn")) as pool:
        parts = [range(w, PARTITIONS, WRITERS) for w in range(WRITERS)]
        for done in [pool.submit(write, bootstrap, topic, count, users, start_ms, seed, part) for part in parts]:
            done.result()
