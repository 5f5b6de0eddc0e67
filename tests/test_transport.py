"""The contract of `worker.transport`, for Kafka and for the one in memory."""

import time
from collections.abc import Callable, Iterator, Sequence

import pytest
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.admin import MemberToRemove

from demo.servers import create_topics, kafka
from worker.settings import WorkerSettings
from worker.transport import Bounds, FatalTransportError, Fenced, Outgoing, Partition, Polled, Position, Records, Transport, TransportError
from worker.transport_kafka import KafkaTransport
from worker.transport_memory import MemoryBroker, MemoryTransport

Message = tuple[bytes | None, bytes | None]


class Log:
    """A broker, as the tests need it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.members: list[Transport] = []

    def topic(self, partitions: int = 2, max_bytes: int = 1_000_000) -> str:
        raise NotImplementedError

    def append(
        self, partition: Partition, messages: Sequence[Message], headers: Sequence[tuple[str, bytes]] = (), time_ms: int = 7
    ) -> None:
        raise NotImplementedError

    def read(self, topic: str) -> list[list[Message]]:
        """What a reader of committed messages finds, by partition."""
        raise NotImplementedError

    def join(self, *topics: str, guarantee: str = "exactly_once", worker_id: str | None = None) -> Transport:
        member = self._member(topics, guarantee, f"{self.name}-{worker_id or len(self.members)}")
        self.members.append(member)
        return member

    def _member(self, topics: tuple[str, ...], guarantee: str, worker_id: str) -> Transport:
        raise NotImplementedError

    def expire(self, member: Transport) -> None:
        """The group goes on without this member, which does not know."""
        raise NotImplementedError


class MemoryLog(Log):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.broker = MemoryBroker()

    def topic(self, partitions: int = 2, max_bytes: int = 1_000_000) -> str:
        name = f"t{len(self.broker.topics)}"
        self.broker.create_topic(name, partitions, max_bytes)
        return name

    def append(
        self, partition: Partition, messages: Sequence[Message], headers: Sequence[tuple[str, bytes]] = (), time_ms: int = 7
    ) -> None:
        for key, value in messages:
            self.broker.append(partition, value, key, headers, time_ms)

    def read(self, topic: str) -> list[list[Message]]:
        return [list(zip(r.keys, r.values, strict=True)) for r in self.broker.read(topic)]

    def _member(self, topics: tuple[str, ...], guarantee: str, worker_id: str) -> Transport:
        return MemoryTransport(self.broker, self.name, topics, guarantee, worker_id)  # type: ignore[arg-type]

    def expire(self, member: Transport) -> None:
        assert isinstance(member, MemoryTransport)
        self.broker.expire(member)


class KafkaLog(Log):
    def __init__(self, name: str, bootstrap: str, make_topic: Callable[..., str]) -> None:
        super().__init__(name)
        self.bootstrap, self.make_topic = bootstrap, make_topic
        self.producer = KafkaProducer(bootstrap_servers=bootstrap)

    def topic(self, partitions: int = 2, max_bytes: int = 1_000_000) -> str:
        return self.make_topic(partitions, max_message_bytes=max_bytes)

    def append(
        self, partition: Partition, messages: Sequence[Message], headers: Sequence[tuple[str, bytes]] = (), time_ms: int = 7
    ) -> None:
        for key, value in messages:
            self.producer.send(partition.topic, value, key, list(headers), partition.number, time_ms)
        self.producer.flush(10)

    def read(self, topic: str) -> list[list[Message]]:
        consumer = KafkaConsumer(bootstrap_servers=self.bootstrap, isolation_level="read_committed", auto_offset_reset="earliest")
        try:
            partitions = [TopicPartition(topic, n) for n in sorted(consumer.partitions_for_topic(topic))]
            consumer.assign(partitions)
            ends = consumer.end_offsets(partitions)
            found: dict[TopicPartition, list[Message]] = {p: [] for p in partitions}
            deadline = time.monotonic() + 10
            while any(consumer.position(p) < ends[p] for p in partitions) and time.monotonic() < deadline:
                for p, records in consumer.poll(100).items():
                    found[p] += [(r.key, r.value) for r in records]
            return list(found.values())
        finally:
            consumer.close()

    def settings(self, topics: Sequence[str], guarantee: str, worker_id: str) -> WorkerSettings:
        return WorkerSettings(
            kafka_bootstrap_servers=self.bootstrap,
            event_topics=tuple(topics),
            group=self.name,
            worker_id=worker_id,
            guarantee=guarantee,  # type: ignore[arg-type]
            heartbeat_interval_ms=100,
            session_timeout_ms=6000,
            transaction_timeout_ms=3000,
        )

    def _member(self, topics: tuple[str, ...], guarantee: str, worker_id: str) -> Transport:
        return KafkaTransport(self.settings(topics, guarantee, worker_id))

    def expire(self, member: Transport) -> None:
        """An administrator throws it out; it does not hear of it before its next heartbeat."""
        worker_id = f"{self.name}-{self.name}-{self.members.index(member)}"
        with KafkaAdminClient(bootstrap_servers=self.bootstrap) as admin:
            (group,) = admin.describe_groups([self.name]).values()
            (found,) = [m["member_id"] for m in group["members"] if m["client_id"] == worker_id]
            admin.remove_group_members(self.name, [MemberToRemove(found)])


@pytest.fixture(params=["memory", "kafka"])
def log(request: pytest.FixtureRequest, unique: str) -> Iterator[Log]:
    if request.param == "memory":
        made: Log = MemoryLog(unique)
    else:
        made = KafkaLog(unique, request.getfixturevalue("bootstrap"), request.getfixturevalue("make_topic"))
    yield made
    for member in made.members:
        member.close()
    if isinstance(made, KafkaLog):
        made.producer.close()


def until(done: Callable[[], object], *members: Transport, max_records: int = 100) -> list[Polled]:
    """Poll the members in turn until it is done; what the polls brought, without the empty ones."""
    found: list[Polled] = []
    deadline = time.monotonic() + 20
    while not done() if done.__code__.co_argcount == 0 else not done(found):  # type: ignore[attr-defined,call-arg]
        assert time.monotonic() < deadline, found
        found += [p for m in members if (p := m.poll(50, max_records)) != Polled()]
    return found


class Member:
    """A transport, and what its polls have brought."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.owned: set[Partition] = set()
        self.changes: list[tuple[list[Partition], list[Partition]]] = []
        self.records: list[Records] = []

    def poll(self, max_records: int = 100) -> None:
        polled = self.transport.poll(20, max_records)
        if polled.revoked or polled.assigned:
            assert self.owned >= set(polled.revoked)
            self.owned = self.owned - set(polled.revoked) | set(polled.assigned)
            self.changes.append((polled.revoked, polled.assigned))
        assert {r.partition for r in polled.records} <= self.owned - set(polled.assigned)
        self.records += polled.records

    def messages(self, partition: Partition) -> list[tuple[int, bytes | None]]:
        return [pair for r in self.records if r.partition == partition for pair in zip(r.offsets, r.values, strict=True)]


def drive(done: Callable[[], object], *members: Member) -> None:
    """Poll the members in turn until it is done."""
    deadline = time.monotonic() + 20
    while not done():
        assert time.monotonic() < deadline, [(m.owned, m.changes, m.records) for m in members]
        for member in members:
            member.poll()
