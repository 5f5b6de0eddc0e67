"""A whole broker in memory, and the transport over it: for deterministic simulation of the worker. No threads, no clock, no chance but
what is handed in.

As in Kafka: a rebalance ends when every member has polled again after it was told what it gives up (or was expired), and until then the
old generation may commit; a transaction leaves a marker, so offsets have gaps; a second producer with a transactional id fences the first.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from kafka.partitioner.default import murmur2

from worker.transport import Bounds, FatalTransportError, Fenced, Headers, Outgoing, Partition, Polled, Position, Records, TransportError

Fault = Literal["before_commit", "after_commit", "away"]


class Record(NamedTuple):
    offset: int
    time_ms: int
    key: bytes | None
    value: bytes | None
    headers: Headers


@dataclass(slots=True)
class Log:
    """One partition."""

    max_bytes: int
    records: list[Record] = field(default_factory=list)
    first: int = 0
    end: int = 0

    def append(self, time_ms: int, key: bytes | None, value: bytes | None, headers: Headers) -> int:
        self.records.append(Record(self.end, time_ms, key, value, tuple(headers)))
        self.end += 1
        return self.end - 1

    def read(self, offset: int, limit: int) -> list[Record]:
        at = bisect_left(self.records, offset, key=lambda r: r.offset)
        return self.records[at : at + limit]


@dataclass(slots=True)
class Group:
    positions: dict[Partition, Position] = field(default_factory=dict)
    generation: int = 0
    members: list[MemoryTransport] = field(default_factory=list)
    joined: list[MemoryTransport] = field(default_factory=list)  # for the next generation
    rebalancing: bool = False

    def rebalance(self) -> None:
        self.rebalancing, self.joined = True, []

    def leave(self, member: MemoryTransport) -> None:
        if member in self.members:
            self.members.remove(member)
            self.rebalance()
            self.settle()

    def settle(self) -> None:
        if self.rebalancing and len(self.joined) == len(self.members):
            self.rebalancing = False
            self.generation += 1


class MemoryBroker:
    """Faults: `fail_next`; `away = True` until it is False again."""

    def __init__(self) -> None:
        self.topics: dict[str, list[Log]] = {}
        self.groups: dict[str, Group] = {}
        self.epochs: dict[str, int] = {}  # of each transactional id
        self.time_ms = 0  # of messages that are published: the newest time that was appended
        self.away = False
        self._faults: list[Fault] = []

    def create_topic(self, topic: str, partitions: int = 1, max_bytes: int = 1_000_000) -> None:
        self.topics[topic] = [Log(max_bytes) for _ in range(partitions)]

    def append(
        self, partition: Partition, value: bytes | None, key: bytes | None = None, headers: Headers = (), time_ms: int | None = None
    ) -> int:
        self.time_ms = max(self.time_ms, time_ms or 0)
        return self.log(partition).append(self.time_ms if time_ms is None else time_ms, key, value, headers)

    def read(self, topic: str) -> list[Records]:
        """Everything, by partition."""
        return [columns(Partition(topic, n), log.records) for n, log in enumerate(self.topics[topic])]

    def truncate(self, partition: Partition, first: int) -> None:
        """Retention: forget what is before `first`."""
        log = self.log(partition)
        log.first, log.records = first, log.read(first, len(log.records))
        log.end = max(log.end, first)

    def expire(self, member: MemoryTransport) -> None:
        """The member has not been heard of for too long."""
        self.groups[member.group].leave(member)

    def fail_next(self, kind: Fault) -> None:
        """before_commit: a transaction is aborted. after_commit: it is committed, but its publisher sees an error. away: any call fails."""
        self._faults.append(kind)

    def fails(self, kind: Fault) -> bool:
        if kind in self._faults:
            self._faults.remove(kind)
            return True
        return False

    def log(self, partition: Partition) -> Log:
        logs = self.topics.get(partition.topic)
        if logs is None:
            raise FatalTransportError(f"there is no topic {partition.topic}: create it, or correct the setting that names it")
        if not 0 <= partition.number < len(logs):
            raise FatalTransportError(f"topic {partition.topic} has no partition {partition.number}")
        return logs[partition.number]


class MemoryTransport:
    """`worker.transport.Transport` over a MemoryBroker, with what `KafkaTransport` does after Fenced and to a position out of range."""

    def __init__(
        self,
        broker: MemoryBroker,
        group: str,
        topics: Collection[str],
        guarantee: Literal["exactly_once", "at_least_once"] = "exactly_once",
        transactional_id: str = "worker",
        later: Callable[[], bool] = lambda: False,
    ) -> None:
        """later: whether what a `publish` begins happens only when it is settled."""
        self.group = group
        self._broker, self._topics, self._id = broker, sorted(topics), transactional_id
        self._exactly_once = guarantee == "exactly_once"
        self._group = broker.groups.setdefault(group, Group())
        self._generation = -1
        self._owned: dict[Partition, int | None] = {}  # the next offset; None before the first seek
        self._released: set[Partition] = set()  # just revoked: can still be committed
        self._epoch: int | None = None
        self._later = later
        self._ending: Callable[[], None] | None = None

    def poll(self, timeout_ms: int, max_records: int) -> Polled:
        self._reach()
        polled = Polled()
        group = self._group
        if self not in group.members:
            group.members.append(self)
            group.rebalance()
            self._generation = -1
        if group.rebalancing and self._owned:
            polled.revoked, self._released, self._owned = sorted(self._owned), set(self._owned), {}
            return polled
        self._released = set()
        if group.rebalancing and self not in group.joined:
            group.joined.append(self)
            group.settle()
        if not group.rebalancing and self._generation != group.generation:
            self._generation = group.generation
            polled.assigned = self._share()
            self._owned = dict.fromkeys(polled.assigned)
        for partition, position in list(self._owned.items()):
            log = self._broker.log(partition)
            if position is not None and not log.first <= position <= log.end:
                polled.revoked.append(partition)
                polled.assigned.append(partition)
                self._owned[partition] = None
            elif position is not None and max_records and (found := log.read(position, max_records)):
                max_records -= len(found)
                polled.records.append(columns(partition, found))
                del self._owned[partition]  # to the end of the line
                self._owned[partition] = found[-1].offset + 1
        return polled

    def committed(self, partitions: Collection[Partition]) -> dict[Partition, Position]:
        self._reach()
        if self._exactly_once:
            self._prepare()
        return {p: self._group.positions[p] for p in partitions if p in self._group.positions}

    def bounds(self, partitions: Collection[Partition]) -> dict[Partition, Bounds]:
        self._reach()
        return {p: Bounds(self._broker.log(p).first, self._broker.log(p).end) for p in partitions}

    def partition_count(self, topic: str) -> int:
        self._reach()
        self._broker.log(Partition(topic, 0))
        return len(self._broker.topics[topic])

    def message_bytes(self, topic: str) -> int:
        self._reach()
        return self._broker.log(Partition(topic, 0)).max_bytes

    def seek(self, partition: Partition, offset: int) -> None:
        if partition in self._owned:
            self._owned[partition] = offset

    def publish(self, outgoing: Sequence[Outgoing], positions: Mapping[Partition, Position]) -> None:
        assert self._ending is None
        self._reach()
        self._check_owned(positions)
        sending = [(self._log_for(o, i), o, i) for o in outgoing for i in range(len(o.values))]
        if self._later():
            self._ending = lambda: self._publish(sending, positions)
        else:
            self._publish(sending, positions)

    def settle(self) -> None:
        ending, self._ending = self._ending, None
        if ending is not None:
            self._reach()
            ending()

    def _publish(self, sending: Sequence[tuple[Log, Outgoing, int]], positions: Mapping[Partition, Position]) -> None:
        if self._exactly_once:
            self._prepare()
            if self._broker.epochs[self._id] != self._epoch:
                raise self._fenced(f"another worker has taken over transactional id {self._id}")
            if positions:
                self._check_member()
        if self._broker.fails("before_commit"):
            self._epoch = None
            raise TransportError("the transaction was aborted")
        for log, o, i in sending:
            value = b"" if o.keys[i] is None and o.values[i] is None else o.values[i]
            log.append(self._broker.time_ms, o.keys[i], value, o.headers[i] if o.headers else ())
        if self._exactly_once:
            for log in {id(log): log for log, _, _ in sending}.values():
                log.end += 1  # the marker
            self._group.positions.update(positions)
        if self._broker.fails("after_commit"):
            self._epoch = None
            raise TransportError("no answer: committed or not, who knows")

    def commit(self, positions: Mapping[Partition, Position]) -> None:
        self._reach()
        self._check_owned(positions)
        self._check_member()
        self._group.positions.update(positions)

    def close(self) -> None:
        self._group.leave(self)
        self._owned = {}

    def _share(self) -> list[Partition]:
        """Range assignment: the same numbers of every topic."""
        share = []
        members = self._group.members
        for topic in self._topics:
            count = len(self._broker.topics[topic])
            each, more = divmod(count, len(members))
            me = members.index(self)
            first = each * me + min(me, more)
            share += [Partition(topic, n) for n in range(first, first + each + (me < more))]
        return share

    def _log_for(self, outgoing: Outgoing, i: int) -> Log:
        topic, number, key, value = outgoing.topic, outgoing.partition, outgoing.keys[i], outgoing.values[i]
        if number is None:
            number = (murmur2(key) & 0x7FFFFFFF) % self.partition_count(topic) if key is not None else 0
        log = self._broker.log(Partition(topic, number))
        if len(value or b"") > log.max_bytes:
            raise FatalTransportError(f"a message of {len(value or b'')} bytes is too large for topic {topic}: raise its limit")
        return log

    def _prepare(self) -> None:
        if self._epoch is None:
            self._epoch = self._broker.epochs[self._id] = self._broker.epochs.get(self._id, 0) + 1

    def _check_owned(self, positions: Mapping[Partition, Position]) -> None:
        if gone := sorted(positions.keys() - self._owned.keys() - self._released):
            raise Fenced(f"{gone} no longer belongs to this worker")

    def _check_member(self) -> None:
        if self not in self._group.members or self._generation != self._group.generation:
            raise self._fenced("the group has been rebalanced without this worker")

    def _fenced(self, why: str) -> Fenced:
        self._epoch = None
        self._group.leave(self)
        return Fenced(why)

    def _reach(self) -> None:
        if self._broker.away or self._broker.fails("away"):
            raise TransportError("the broker does not answer")


def columns(partition: Partition, records: Sequence[Record]) -> Records:
    offsets, times, keys, values, headers = (list(c) for c in zip(*records, strict=True)) if records else ([], [], [], [], [])
    return Records(partition, offsets, times, keys, values, headers)
