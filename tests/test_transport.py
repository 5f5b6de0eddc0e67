"""The contract of `worker.transport`, for Kafka and for the one in memory."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress

import pytest
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.admin import MemberToRemove
from kafka.partitioner.default import murmur2
from kafka.structs import OffsetAndMetadata

from demo.servers import create_topics, kafka
from worker.settings import WorkerSettings
from worker.transport import Bounds, FatalTransportError, Fenced, Outgoing, Partition, Polled, Position, Records, Transport, TransportError
from worker.transport_kafka import KafkaTransport
from worker.transport_memory import MemoryBroker, MemoryTransport

Message = tuple[bytes | None, bytes | None]


class Member:
    """A transport, and what its polls have brought. turn: held while it polls, where transports must not poll at the same time."""

    def __init__(self, transport: Transport, turn: AbstractContextManager[object]) -> None:
        self.transport = transport
        self.turn = turn
        self.owned: set[Partition] = set()
        self.changes: list[tuple[list[Partition], list[Partition]]] = []
        self.records: list[Records] = []

    def poll(self, max_records: int = 100) -> None:
        with self.turn:
            self._take(self.transport.poll(20, max_records), max_records)

    def _take(self, polled: Polled, max_records: int) -> None:
        if polled.revoked or polled.assigned:
            assert self.owned >= set(polled.revoked)
            self.owned = self.owned - set(polled.revoked) | set(polled.assigned)
            self.changes.append((polled.revoked, polled.assigned))
        assert {r.partition for r in polled.records} <= self.owned - set(polled.assigned)
        assert sum(map(len, polled.records)) <= max_records
        self.records += polled.records

    def publish(self, outgoing: Sequence[Outgoing], positions: Mapping[Partition, Position]) -> None:
        self.transport.publish(outgoing, positions)
        self.transport.settle()

    def read(self, partition: Partition) -> list[tuple[int, bytes | None]]:
        """Offsets and values that were delivered since the last call."""
        found = [pair for r in self.records if r.partition == partition for pair in zip(r.offsets, r.values, strict=True)]
        self.records = [r for r in self.records if r.partition != partition]
        return found


def drive(done: Callable[[], object], *members: Member, max_records: int = 100) -> None:
    """Poll until it is done: side by side, for a poll may wait for the other members of its group."""
    deadline = time.monotonic() + 20

    def follow(member: Member) -> None:
        while not done():
            assert time.monotonic() < deadline, [(m.owned, m.changes, m.records) for m in members]
            member.poll(max_records)

    with ThreadPoolExecutor(len(members)) as pool:
        for following in [pool.submit(follow, member) for member in members]:
            following.result()


class Log:
    """A broker, as the tests need it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.members: list[Member] = []
        self.turn: AbstractContextManager[object] = nullcontext()

    def topic(self, partitions: int = 2, max_bytes: int = 1_000_000) -> str:
        raise NotImplementedError

    def append(
        self, partition: Partition, messages: Sequence[Message], headers: Sequence[tuple[str, bytes]] = (), time_ms: int = 7
    ) -> None:
        raise NotImplementedError

    def read(self, topic: str) -> list[list[Message]]:
        """What a reader of committed messages finds, by partition."""
        raise NotImplementedError

    def join(self, *topics: str, guarantee: str = "exactly_once", worker_id: str | None = None) -> Member:
        member = Member(self._connect(topics, guarantee, worker_id or f"{self.name}-{len(self.members)}"), self.turn)
        self.members.append(member)
        return member

    def sole(self, *topics: str, guarantee: str = "exactly_once") -> Member:
        """The only member, with its partitions assigned."""
        member = self.join(*topics, guarantee=guarantee)
        drive(lambda: member.owned, member)
        return member

    def expire(self, member: Member) -> None:
        """The group goes on without this member, which has not noticed."""
        raise NotImplementedError

    def truncate(self, partition: Partition, first: int) -> None:
        raise NotImplementedError

    def _connect(self, topics: tuple[str, ...], guarantee: str, worker_id: str) -> Transport:
        raise NotImplementedError


class MemoryLog(Log):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.broker = MemoryBroker()
        self.turn = threading.Lock()  # it knows no threads

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

    def expire(self, member: Member) -> None:
        assert isinstance(member.transport, MemoryTransport)
        self.broker.expire(member.transport)

    def truncate(self, partition: Partition, first: int) -> None:
        self.broker.truncate(partition, first)

    def _connect(self, topics: tuple[str, ...], guarantee: str, worker_id: str) -> Transport:
        return MemoryTransport(self.broker, self.name, topics, guarantee, worker_id)  # type: ignore[arg-type]


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

    def expire(self, member: Member) -> None:
        client_id = f"{self.name}-{self.name}-{self.members.index(member)}"
        with KafkaAdminClient(bootstrap_servers=self.bootstrap) as admin:
            (group,) = admin.describe_groups([self.name]).values()
            (found,) = [m["member_id"] for m in group["members"] if m["client_id"] == client_id]
            admin.remove_group_members(self.name, [MemberToRemove(found)])

    def truncate(self, partition: Partition, first: int) -> None:
        with KafkaAdminClient(bootstrap_servers=self.bootstrap) as admin:
            admin.delete_records({TopicPartition(*partition): first})

    def _connect(self, topics: tuple[str, ...], guarantee: str, worker_id: str) -> Transport:
        return KafkaTransport(settings(self.bootstrap, self.name, topics, guarantee, worker_id))


def settings(bootstrap: str, group: str, topics: Sequence[str], guarantee: str = "exactly_once", worker_id: str = "w") -> WorkerSettings:
    return WorkerSettings(
        kafka_bootstrap_servers=bootstrap,
        event_topics=tuple(topics),
        group=group,
        worker_id=worker_id,
        guarantee=guarantee,  # type: ignore[arg-type]
        heartbeat_interval_ms=100,
        transaction_timeout_ms=3000,
    )


@pytest.fixture(params=["memory", "kafka"])
def log(request: pytest.FixtureRequest, unique: str) -> Iterator[Log]:
    if request.param == "memory":
        made: Log = MemoryLog(unique)
    else:
        made = KafkaLog(unique, request.getfixturevalue("bootstrap"), request.getfixturevalue("make_topic"))
    yield made
    for member in made.members:
        member.transport.close()
    if isinstance(made, KafkaLog):
        made.producer.close()


def offsets(member: Member, *partitions: Partition) -> dict[Partition, int]:
    return {p: at.offset for p, at in member.transport.committed(partitions).items()}


def test_columns(log: Log) -> None:
    topic = log.topic(1)
    p = Partition(topic, 0)
    log.append(p, [(b"k", b"v"), (None, b"w"), (b"l", None)], time_ms=5)
    log.append(p, [(b"m", b"x")], headers=[("a", b"1"), ("b", b"")], time_ms=3)
    member = log.sole(topic)
    member.transport.seek(p, 0)
    drive(lambda: sum(map(len, member.records)) == 4, member, max_records=3)
    assert len(member.records[0]) == 3
    got = [(r.offsets[i], r.times_ms[i], r.keys[i], r.values[i]) for r in member.records for i in range(len(r))]
    assert got == [(0, 5, b"k", b"v"), (1, 5, None, b"w"), (2, 5, b"l", None), (3, 3, b"m", b"x")]
    assert [list(h) for r in member.records for h in r.headers] == [[], [], [], [("a", b"1"), ("b", b"")]]


def test_nothing_is_delivered_before_the_first_seek(log: Log) -> None:
    topic = log.topic(2)
    p, q = Partition(topic, 0), Partition(topic, 1)
    log.append(p, [(b"k", b"%d" % i) for i in range(5)])
    log.append(q, [(b"k", b"q")])
    first = log.sole(topic)
    first.publish([], {p: Position(3), q: Position(0)})
    first.transport.close()
    member = log.sole(topic)  # the group has a committed position
    member.transport.seek(q, 0)
    drive(lambda: member.records, member)
    for _ in range(5):
        member.poll()
    assert member.read(q) == [(0, b"q")]
    assert not member.records
    member.transport.seek(p, 4)
    drive(lambda: member.records, member)
    assert member.read(p) == [(4, b"4")]


def test_seek_back_and_forward(log: Log) -> None:
    topic = log.topic(1)
    p = Partition(topic, 0)
    log.append(p, [(b"k", b"%d" % i) for i in range(300)])
    member = log.sole(topic)
    for start in (0, 200, 50, 50, 299, 100):
        member.transport.seek(p, start)
        member.poll(max_records=10)  # leaves records behind in the client, if they are there already
        drive(lambda: member.records, member, max_records=10)
        found = member.read(p)
        assert found == [(start + i, b"%d" % (start + i)) for i in range(len(found))]
    member.transport.seek(p, 300)
    member.poll()
    log.append(p, [(b"k", b"new")])
    drive(lambda: member.records, member)
    assert member.read(p) == [(300, b"new")]
    member.transport.seek(Partition(topic, 7), 0)  # not owned: ignored


def test_messages_and_positions_are_published_together(log: Log) -> None:
    events, scores = log.topic(2), log.topic(2)
    p, q = Partition(events, 0), Partition(events, 1)
    member = log.sole(events)
    assert member.transport.committed([p, q]) == {}
    out = [
        Outgoing(scores, 0, [b"a", b"b"], [b"1", None]),
        Outgoing(scores, 1, [None, None], [b"2", None], headers=[(), [("h", b"x")]]),
    ]
    member.publish(out, {p: Position(3, "clock=7 é")})
    assert member.transport.committed([p, q]) == {p: Position(3, "clock=7 é")}
    assert log.read(scores) == [[(b"a", b"1"), (b"b", None)], [(None, b"2"), (None, b"")]]
    member.publish([Outgoing(scores, 0, [b"c"], [b"3"])], {p: Position(4), q: Position(1, "m")})
    assert member.transport.committed([p, q]) == {p: Position(4), q: Position(1, "m")}
    assert log.read(scores)[0] == [(b"a", b"1"), (b"b", None), (b"c", b"3")]


def test_positions_alone_and_messages_alone(log: Log) -> None:
    events, scores = log.topic(1), log.topic(1)
    p = Partition(events, 0)
    member = log.sole(events)
    member.publish([], {p: Position(9, "x")})
    member.publish([Outgoing(scores, 0, [b"a"], [b"1"])], {})
    member.publish([], {})
    assert member.transport.committed([p]) == {p: Position(9, "x")}
    assert log.read(scores) == [[(b"a", b"1")]]


def test_without_a_partition_the_key_decides_as_in_kafka(log: Log) -> None:
    events, scores = log.topic(1), log.topic(4)
    keys: list[bytes | None] = [b"u%d" % i for i in range(20)]
    log.sole(events).publish([Outgoing(scores, None, keys, [b"v"] * 20)], {})
    expected = [[(k, b"v") for k in keys if k and (murmur2(k) & 0x7FFFFFFF) % 4 == n] for n in range(4)]
    assert log.read(scores) == expected


def test_what_cannot_be_published_leaves_nothing(log: Log) -> None:
    events, scores = log.topic(1), log.topic(1, max_bytes=2000)
    p = Partition(events, 0)
    member = log.sole(events)
    assert member.transport.message_bytes(scores) == 2000
    member.publish([], {p: Position(1)})
    with pytest.raises(FatalTransportError, match=f"5000 bytes|5001 bytes.*{scores}"):
        member.publish([Outgoing(scores, 0, [b"a", b"b", b"c"], [b"1", b"x" * 5000, b"2"])], {p: Position(2)})
    with pytest.raises(FatalTransportError, match="no topic nowhere"):
        member.publish([Outgoing("nowhere", 0, [b"a"], [b"1"])], {p: Position(2)})
    assert offsets(member, p) == {p: 1}
    member.publish([Outgoing(scores, 0, [b"d"], [b"4"])], {p: Position(3)})
    assert offsets(member, p) == {p: 3}
    assert log.read(scores) == [[(b"d", b"4")]]


def test_more_than_fits_a_batch_of_the_topic(log: Log) -> None:
    events, scores = log.topic(1), log.topic(1, max_bytes=2000)
    p = Partition(events, 0)
    values: list[bytes | None] = [b"%03d" % i + b"x" * 500 for i in range(40)]
    member = log.sole(events)
    member.publish([Outgoing(scores, 0, [b"k"] * 40, values)], {p: Position(1)})
    assert log.read(scores) == [[(b"k", v) for v in values]]
    assert offsets(member, p) == {p: 1}


def test_a_second_member_takes_half_and_gives_it_back(log: Log) -> None:
    events, clicks = log.topic(4), log.topic(4)
    everything = {Partition(t, n) for t in (events, clicks) for n in range(4)}
    first = log.sole(events, clicks)
    assert first.changes == [([], sorted(everything))]
    second = log.join(events, clicks)
    drive(lambda: second.owned and first.owned != everything and first.owned, first, second)
    assert first.owned | second.owned == everything
    assert not first.owned & second.owned
    assert {p.number for p in first.owned if p.topic == events} == {p.number for p in first.owned if p.topic == clicks}
    assert [p for revoked, _ in first.changes for p in revoked] == sorted(everything)
    assert second.changes == [([], sorted(second.owned))]
    second.transport.close()
    drive(lambda: first.owned == everything, first)


def test_what_was_just_revoked_can_still_be_committed(log: Log) -> None:
    events = log.topic(2)
    p, q = Partition(events, 0), Partition(events, 1)
    first = log.sole(events, guarantee="at_least_once")
    second = log.join(events, guarantee="at_least_once")
    with ThreadPoolExecutor(1) as pool:
        joining = pool.submit(drive, lambda: second.owned, second)
        drive(lambda: not first.owned, first)
        assert first.changes[1] == ([p, q], [])
        first.transport.commit({p: Position(4), q: Position(5)})
        drive(joining.done, first)
        joining.result()
    assert offsets(second, p, q) == {p: 4, q: 5}
    with pytest.raises(Fenced):
        first.transport.commit(dict.fromkeys(second.owned, Position(6)))


def test_a_member_that_was_given_up_commits_nothing(log: Log) -> None:
    events, scores = log.topic(2), log.topic(2)
    p, q = Partition(events, 0), Partition(events, 1)
    zombie = log.sole(events)
    heir = log.join(events)
    drive(lambda: zombie.owned and heir.owned, zombie, heir)
    (mine,) = zombie.owned
    log.expire(zombie)
    drive(lambda: heir.owned == {p, q}, heir)
    heir.publish([Outgoing(scores, 0, [b"a"], [b"heir"])], {mine: Position(5)})
    with pytest.raises(Fenced):
        zombie.publish([Outgoing(scores, 0, [b"a"], [b"zombie"])], {mine: Position(3)})
    assert offsets(heir, p, q) == {mine: 5}
    assert log.read(scores)[0] == [(b"a", b"heir")]
    changes = len(zombie.changes)
    drive(lambda: zombie.owned and len(zombie.owned) == 1 == len(heir.owned) and len(zombie.changes) > changes, zombie, heir)
    assert zombie.changes[changes][0] == [mine]
    (again,) = zombie.owned
    zombie.publish([Outgoing(scores, 1, [b"b"], [b"back"])], {again: Position(6)})
    assert log.read(scores)[1] == [(b"b", b"back")]


def test_positions_of_others_are_refused(log: Log) -> None:
    events, scores = log.topic(2), log.topic(1)
    member = log.join(events)
    with pytest.raises(Fenced, match=events):
        member.publish([Outgoing(scores, 0, [b"a"], [b"1"])], {Partition(events, 0): Position(1)})
    drive(lambda: member.owned, member)
    other = log.join(events)
    drive(lambda: other.owned, member, other)
    with pytest.raises(Fenced, match=events):
        member.publish([Outgoing(scores, 0, [b"a"], [b"1"])], dict.fromkeys(other.owned, Position(1)))
    assert log.read(scores) == [[]]


def test_a_second_producer_with_the_same_transactional_id_fences_the_first(log: Log) -> None:
    events, scores = log.topic(2), log.topic(1)
    first = log.join(events, worker_id="same")
    drive(lambda: first.owned, first)
    first.publish([Outgoing(scores, 0, [b"a"], [b"1"])], {})
    second = log.join(events, worker_id="same")
    drive(lambda: len(first.owned) == 1 == len(second.owned), first, second)
    second.publish([Outgoing(scores, 0, [b"a"], [b"2"])], {})
    with pytest.raises(Fenced, match="transactional id"):
        first.publish([Outgoing(scores, 0, [b"a"], [b"3"])], dict.fromkeys(first.owned, Position(1)))
    assert log.read(scores) == [[(b"a", b"1"), (b"a", b"2")]]
    assert second.transport.committed([Partition(events, 0), Partition(events, 1)]) == {}


def test_at_least_once(log: Log) -> None:
    events, scores = log.topic(2), log.topic(1)
    p, q = Partition(events, 0), Partition(events, 1)
    member = log.sole(events, guarantee="at_least_once")
    member.publish([Outgoing(scores, 0, [b"a"], [b"1"])], {p: Position(3)})
    assert log.read(scores) == [[(b"a", b"1")]]
    assert member.transport.committed([p, q]) == {}
    member.transport.commit({p: Position(3, "é"), q: Position(1)})
    assert member.transport.committed([p, q]) == {p: Position(3, "é"), q: Position(1)}
    other = log.join(events, guarantee="at_least_once")
    drive(lambda: member.owned and other.owned, member, other)
    with pytest.raises(Fenced, match=events):
        member.transport.commit(dict.fromkeys(other.owned, Position(8)))
    stale = dict.fromkeys(member.owned, Position(9))
    log.expire(member)
    drive(lambda: other.owned == {p, q}, other)
    with pytest.raises(Fenced):
        member.transport.commit(stale)
    assert member.transport.committed([p, q]) == {p: Position(3, "é"), q: Position(1)}


def test_a_position_that_is_no_longer_retained(log: Log) -> None:
    events = log.topic(2)
    p, q = Partition(events, 0), Partition(events, 1)
    for partition in (p, q):
        log.append(partition, [(b"k", b"%d" % i) for i in range(10)])
    member = log.sole(events)
    assert member.transport.bounds([p, q]) == {p: Bounds(0, 10), q: Bounds(0, 10)}
    assert member.transport.bounds([]) == {}
    log.truncate(p, 6)
    assert member.transport.bounds([p]) == {p: Bounds(6, 10)}
    member.transport.seek(p, 3)
    member.transport.seek(q, 8)
    drive(lambda: len(member.changes) == 2 and member.records, member)
    assert member.changes[1] == ([p], [p])
    assert member.read(q) == [(8, b"8"), (9, b"9")]
    member.publish([], {p: Position(6)})  # in the same generation
    member.transport.seek(p, 6)
    drive(lambda: member.records, member)
    assert member.read(p) == [(i, b"%d" % i) for i in range(6, 10)]


def test_counts_and_missing_topics(log: Log) -> None:
    events = log.topic(3)
    member = log.join(events)
    assert member.transport.partition_count(events) == 3
    for ask in (member.transport.partition_count, member.transport.message_bytes):
        with pytest.raises(FatalTransportError, match="no topic nowhere"):
            ask("nowhere")


def test_close_twice(log: Log) -> None:
    member = log.sole(log.topic(1))
    member.transport.close()
    member.transport.close()


def test_faults_in_memory() -> None:
    broker = MemoryBroker()
    broker.create_topic("events")
    broker.create_topic("scores")
    p = Partition("events", 0)
    transport = MemoryTransport(broker, "g", ["events"])
    assert transport.poll(0, 1).assigned == [p]

    def publish(n: int) -> None:
        transport.publish([Outgoing("scores", 0, [b"k"], [b"%d" % n])], {p: Position(n)})
        transport.settle()

    publish(1)
    for kind, offset in (("before_commit", 1), ("after_commit", 3), ("away", 3)):
        broker.fail_next(kind)  # type: ignore[arg-type]
        with pytest.raises(TransportError):
            publish({"before_commit": 2, "after_commit": 3, "away": 4}[kind])
        assert transport.committed([p]) == {p: Position(offset)}
    broker.away = True
    with pytest.raises(TransportError):
        transport.poll(0, 1)
    broker.away = False
    publish(5)
    assert broker.read("scores")[0].values == [b"1", b"3", b"5"]
    assert broker.read("scores")[0].offsets == [0, 2, 4]


def test_a_large_message_where_the_topic_takes_it(bootstrap: str, unique: str, make_topic: Callable[..., str]) -> None:
    log = KafkaLog(unique, bootstrap, make_topic)
    events, letters = log.topic(1), log.topic(1, max_bytes=6_000_000)
    p = Partition(events, 0)
    large = b"x" * 5_000_000
    member = log.sole(events)
    member.publish([Outgoing(letters, 0, [b"k", b"l"], [large, b"small"])], {p: Position(1)})
    member.transport.close()
    assert log.read(letters) == [[(b"k", large), (b"l", b"small")]]
    log.append(p, [(b"k", b"x" * 900_000)] * 9)  # more than one fetch
    other = log.sole(events)
    other.transport.seek(p, 0)
    drive(lambda: sum(map(len, other.records)) == 9, other)
    other.transport.close()


@pytest.mark.parametrize("whose", ["its own", "another's"])
def test_committed_waits_for_an_open_transaction(bootstrap: str, unique: str, make_topic: Callable[..., str], whose: str) -> None:
    """Its own transaction is ended at once, another's when Kafka gives it up."""
    log = KafkaLog(unique, bootstrap, make_topic)
    events = log.topic(1)
    p = Partition(events, 0)
    member = log.join(events, worker_id="w")
    own = whose == "its own"
    dead = KafkaProducer(
        bootstrap_servers=bootstrap,
        transactional_id=f"{unique}-w" if own else f"{unique}-dead",
        transaction_timeout_ms=60_000 if own else 1500,
    )
    dead.init_transactions()
    dead.begin_transaction()
    dead.send_offsets_to_transaction({TopicPartition(*p): OffsetAndMetadata(5, "", -1)}, unique)
    began = time.monotonic()
    assert member.transport.committed([p]) == {}
    assert time.monotonic() - began < 10
    dead.close(timeout=0)
    member.transport.close()


def test_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.transaction.ANSWER_MS", 300)
    threads = threading.active_count()
    began = time.monotonic()
    with pytest.raises(TransportError, match=r"127\.0\.0\.1:9 does not answer"):
        KafkaTransport(settings("127.0.0.1:9", "g", ["events"]))
    assert time.monotonic() - began < 3
    assert threading.active_count() == threads


def test_recovers_by_itself_when_kafka_is_back(unique: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.transaction.ANSWER_MS", 1500)
    threads = threading.active_count()
    with kafka() as server:
        create_topics(server.bootstrap, {"events": (1, {}), "scores": (1, {})})
        log = KafkaLog(unique, server.bootstrap, lambda *_, **__: "")
        p = Partition("events", 0)
        log.append(p, [(b"k", b"%d" % i) for i in range(6)])
        member = log.sole("events")
        member.transport.seek(p, 0)
        member.publish([Outgoing("scores", 0, [b"k"], [b"0"])], {p: Position(1)})
        server.kill()
        for _ in range(2):
            began = time.monotonic()
            with pytest.raises(TransportError):
                member.publish([Outgoing("scores", 0, [b"k"], [b"lost"])], {p: Position(2)})
            with suppress(TransportError):
                member.poll()
            assert time.monotonic() - began < 12
        server.restart()

        def published() -> bool:
            try:
                if not member.owned or offsets(member, p) != {p: 1}:
                    return False
                member.transport.seek(p, 2)
                member.publish([Outgoing("scores", 0, [b"k"], [b"1"])], {p: Position(2)})
            except TransportError:
                return False
            return True

        drive(published, member)
        member.records.clear()
        drive(lambda: member.records, member)
        assert member.read(p)[-1] == (5, b"5")
        assert log.read("scores") == [[(b"k", b"0"), (b"k", b"1")]]
        server.kill()
        began = time.monotonic()
        member.transport.close()
        assert time.monotonic() - began < 6
        log.producer.close()
    assert threading.active_count() <= threads + 1  # a commit that was never answered is left behind
