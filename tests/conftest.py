"""One real Kafka and one real Redis for the whole suite; names that no other test uses keep the tests apart."""

import itertools
import secrets
from collections.abc import Callable, Iterator

import pytest

from demo.servers import KafkaServer, RedisServer, create_topics, kafka, redis

counter = itertools.count()


@pytest.fixture(scope="session")
def kafka_server() -> Iterator[KafkaServer]:
    """Shared: a test that stops or kills a server starts its own."""
    with kafka(say=print) as server:
        yield server


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """Shared: a test that stops, kills or flushes a server starts its own."""
    with redis(say=print) as server:
        yield server


@pytest.fixture
def bootstrap(kafka_server: KafkaServer) -> str:
    return kafka_server.bootstrap


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    return redis_server.url


@pytest.fixture
def unique() -> str:
    """A short name for this test's groups, prefixes and transactional ids."""
    return f"t{next(counter)}-{secrets.token_hex(3)}"


@pytest.fixture
def make_topic(bootstrap: str, unique: str) -> Callable[..., str]:
    """``make_topic(4, cleanup_policy="compact")``: a new topic's name, ready for use; underscores stand for Kafka's dots."""

    def make(partitions: int = 2, **config: object) -> str:
        name = f"{unique}-{next(counter)}"
        create_topics(bootstrap, {name: (partitions, {key.replace("_", "."): str(value) for key, value in config.items()})})
        return name

    return make
