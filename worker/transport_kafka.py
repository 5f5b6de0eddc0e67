"""Kafka through kafka-python. What this file knows of that library (3.0.12) beyond its manual, and what follows from it:

1. Joins and rebalance callbacks run inside `KafkaConsumer.poll` only, on the client's IO thread, while the caller waits. But the member's
   generation can change at any time (heartbeats), so the one that fences a transaction is taken in the callback that assigned the
   partitions. Never later: a member that has lost its generation would send -1, and Kafka does not fence that.
2. A join that ends while nobody polls is thrown away and begun again, and if this member leads the group, every other member with it, and
   so on. So once a join is under way, a poll waits for its end. Before it begins, the caller is told what it gives up: the callbacks
   raise `Changed`, which ends the poll; a callback that raised is called again by the next one.
3. A partition is paused, and given a position, in the callback itself. So nothing of it is fetched before `seek`, and the client neither
   looks up a committed offset nor resets one on its own. A fetch whose offset is not the position is dropped by the client, so `seek`
   needs no more than itself.
4. A `committed` that times out leaves its request behind, and a later call for the same partition is given that old answer. So the call
   after a timeout is made twice.
5. Its metadata requests let the broker create missing topics: no topic is subscribed to or sent to before it is known to exist.
6. A subscription made while a metadata request is under way is forgotten by it, and the member, if it leads the group, then assigns nothing
   to anybody for five minutes. So no group is joined before the partitions are known.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from operator import attrgetter
from typing import Any

from kafka import KafkaAdminClient, KafkaConsumer, TopicPartition
from kafka import errors as E
from kafka.admin import ConfigResource, ConfigResourceType
from kafka.consumer.subscription_state import ConsumerRebalanceListener
from kafka.coordinator.assignors.range import RangePartitionAssignor
from kafka.structs import OffsetAndMetadata

from worker.settings import WorkerSettings
from worker.transaction import ANSWER_MS, CLOSE_S, LARGEST_REQUEST, Publisher, Undelivered, bounded, connect, said
from worker.transport import Bounds, FatalTransportError, Fenced, Outgoing, Partition, Polled, Position, Records, TransportError

log = logging.getLogger(__name__)
logging.getLogger("kafka.coordinator.consumer").addFilter(lambda r: not (r.exc_info and isinstance(r.exc_info[1], Changed)))

JOIN_MS = 5_000
DEFAULT_MESSAGE_BYTES = 1_048_588  # of a topic
ABORT_SCAN_MS = 10_000  # Kafka looks this often for transactions that timed out (its default)

PRODUCER_FENCED = (E.ProducerFencedError, E.InvalidProducerEpochError)
MEMBER_FENCED = (
    E.IllegalGenerationError,
    E.UnknownMemberIdError,
    E.CommitFailedError,
    E.FencedInstanceIdError,
    E.RebalanceInProgressError,
)
AWAY = (E.KafkaTimeoutError, E.NodeNotReadyError, E.KafkaConnectionError, E.RequestTimedOutError)
FATAL = {
    E.MessageSizeTooLargeError: "raise max.message.bytes of that topic, or lower max_event_bytes",
    E.RecordListTooLargeError: "raise segment.bytes of that topic",
    E.OffsetMetadataTooLargeError: "raise offset.metadata.max.bytes of the brokers",
    E.SaslAuthenticationFailedError: "check kafka_sasl_mechanism, kafka_sasl_username and kafka_sasl_password",
    E.AuthorizationError: "let this user read the event topics and the group, and write the other topics and the transactional id",
    E.InvalidTransactionTimeoutError: "lower transaction_timeout_ms, or raise transaction.max.timeout.ms of the brokers",
    E.InvalidSessionTimeoutError: "keep session_timeout_ms between group.min. and group.max.session.timeout.ms of the brokers",
    E.InconsistentGroupProtocolError: "another kind of program is in this group, so give the worker its own",
    E.InvalidGroupIdError: "change group",
    E.GroupMaxSizeReachedError: "start fewer workers, or raise group.max.size of the brokers",
    E.InvalidTopicError: "correct the topic's name",
    E.UnsupportedVersionError: "use Kafka 2.5 or later",
    E.CorruptRecordError: "look at the broker's disk: a record's checksum is wrong",
}


class Changed(Exception):
    """Raised in a callback, so that the caller hears of the change at once."""


class Assignment(ConsumerRebalanceListener):  # type: ignore[misc]
    """Which partitions the caller has been told it owns, and what has happened to them since."""

    def __init__(self, consumer: Any) -> None:
        self._consumer = consumer
        self._lock = threading.Lock()
        self._told: set[Partition] = set()
        self._lost: set[Partition] = set()
        self._gained: set[Partition] = set()
        self._released: set[Partition] = set()
        self.member: Any = None  # the group's metadata as of when it assigned the partitions
        self.joining = True
        self.closing = False

    def on_partitions_revoked(self, revoked: Iterable[Any]) -> None:
        self._lose(revoked)
        if not self.joining and not self.closing:
            self.joining = True
            raise Changed

    def on_partitions_lost(self, lost: Iterable[Any]) -> None:
        self.member = None
        self.on_partitions_revoked(lost)

    def on_partitions_assigned(self, assigned: Collection[Any]) -> None:
        self.member = self._consumer.group_metadata()
        self.joining = False
        self._gain(assigned)
        raise Changed

    def assign_again(self, partitions: Collection[Any]) -> None:
        """Have the caller take these over anew."""
        self._lose(partitions)
        self._gain(partitions)

    def lose_all(self) -> None:
        self.member = None
        self.joining = True
        self._lose(self._told | self._gained)

    def changes(self) -> tuple[list[Partition], list[Partition]]:
        """Revoked and assigned since the last call; the caller knows them from now on."""
        with self._lock:
            revoked, assigned = sorted(self._lost), sorted(self._gained)
            self._told = (self._told - self._lost) | self._gained
            self._released = self._lost - self._gained
            self._lost, self._gained = set(), set()
            return revoked, assigned

    def owned(self) -> set[Partition]:
        with self._lock:
            return self._told - self._lost

    def committable(self) -> set[Partition]:
        """Also what was just revoked: the group waits for this member's next poll."""
        return self.owned() | self._released if self.member else set()

    def _lose(self, partitions: Iterable[Any]) -> None:
        with self._lock:
            self._lost |= {Partition(*p) for p in partitions} & self._told
            self._gained -= {Partition(*p) for p in partitions}

    def _gain(self, partitions: Collection[Any]) -> None:
        for partition in partitions:
            self._consumer.pause(partition)
            self._consumer.seek(partition, 0)
        with self._lock:
            self._gained |= {Partition(*p) for p in partitions}


class KafkaTransport:
    """`worker.transport.Transport` over Kafka.

    What a poll reports as revoked can still be committed before the next poll. After Fenced, this member has left the group: the next polls
    report its partitions as revoked, and then what it is given as it joins again. A partition whose position Kafka no longer holds
    (retention went past it) is reported as revoked and assigned again. While the group rebalances, a poll may take JOIN_MS.
    """

    def __init__(self, settings: WorkerSettings) -> None:
        """Raises TransportError, FatalTransportError."""
        self._settings = settings
        self._transactional_id = settings.transactional_id
        self._topics: set[str] = set()  # known to exist
        self._timed_out: set[Any] = set()  # in `committed`
        with self._speaking("connecting"):
            self._consumer = connect(
                KafkaConsumer,
                settings,
                client_id=self._transactional_id,
                metrics_enabled=False,
                group_id=settings.group,
                isolation_level="read_committed",  # in at_least_once too: an event that its producer took back is no event
                enable_auto_commit=False,
                auto_offset_reset="none",
                partition_assignment_strategy=[RangePartitionAssignor],  # the same numbers of all event topics to one member
                session_timeout_ms=settings.session_timeout_ms,
                heartbeat_interval_ms=settings.heartbeat_interval_ms,
                max_poll_interval_ms=max(60_000, settings.session_timeout_ms),  # a worker that hangs loses its partitions after this
                request_timeout_ms=2 * ANSWER_MS,
                fetch_max_wait_ms=50,  # while a broker waits for records of some partitions, it is not asked for others
                max_partition_fetch_bytes=4 * 1024 * 1024,
            )
        self._assignment = Assignment(self._consumer)
        self._publisher = Publisher(settings, self._transactional_id)

    def poll(self, timeout_ms: int, max_records: int) -> Polled:
        with self._speaking("polling"):
            if not self._consumer.subscription():
                self._subscribe()
            fetched = self._fetch(JOIN_MS if self._assignment.joining else timeout_ms, max_records)
            revoked, assigned = self._assignment.changes()
        mine = self._assignment.owned().difference(assigned)
        return Polled([_columns(Partition(*p), r) for p, r in fetched.items() if Partition(*p) in mine], revoked, assigned)

    def committed(self, partitions: Collection[Partition]) -> dict[Partition, Position]:
        with self._speaking("asking for committed positions"):
            if self._settings.guarantee == "exactly_once":
                self._publisher.prepare()  # or this waits for the timeout of a transaction that this worker itself left open
            deadline = time.monotonic() + (self._settings.transaction_timeout_ms + ABORT_SCAN_MS + ANSWER_MS) / 1000
            found = {p: self._committed(TopicPartition(*p), deadline) for p in partitions}
        return {p: Position(at.offset, at.metadata or "") for p, at in found.items() if at is not None}

    def bounds(self, partitions: Collection[Partition]) -> dict[Partition, Bounds]:
        if not partitions:
            return {}
        asked = [TopicPartition(*p) for p in partitions]
        with self._speaking("asking what is retained"):
            first = self._consumer.beginning_offsets(asked, timeout_ms=ANSWER_MS)
            end = self._consumer.end_offsets(asked, timeout_ms=ANSWER_MS)
        return {Partition(*p): Bounds(first[p], end[p]) for p in asked}

    def partition_count(self, topic: str) -> int:
        with self._administering(f"looking for topic {topic}") as admin:
            found = admin.describe_topics([topic])[0]
            error = E.for_code(found["error_code"])
            if error is E.UnknownTopicOrPartitionError:
                servers = self._settings.kafka_bootstrap_servers
                raise FatalTransportError(f"Kafka at {servers} has no topic {topic}: create it, or correct the setting that names it")
            if error is not E.NoError:
                raise error(topic)
        self._topics.add(topic)
        return len(found["partitions"])

    def message_bytes(self, topic: str) -> int:
        self._find([topic])
        with self._administering(f"asking for the limits of topic {topic}") as admin:
            limit = ConfigResource(ConfigResourceType.TOPIC, topic, {"max.message.bytes": None})
            found = admin.describe_configs([limit], config_filter="all")["topic"][topic]
        if not found:  # describing configs may not be allowed
            return DEFAULT_MESSAGE_BYTES
        return min(int(found["max.message.bytes"]["value"]), LARGEST_REQUEST)

    def seek(self, partition: Partition, offset: int) -> None:
        if partition in self._assignment.owned():
            self._consumer.seek(TopicPartition(*partition), offset)
            self._consumer.resume(TopicPartition(*partition))

    def publish(self, outgoing: Sequence[Outgoing], positions: Mapping[Partition, Position]) -> None:
        self._check_owned(positions)
        self._find({o.topic for o in outgoing})
        with self._publishing():
            self._publisher.begin(outgoing, _offsets(positions), self._assignment.member)

    def settle(self) -> None:
        with self._publishing():
            self._publisher.settle()

    def commit(self, positions: Mapping[Partition, Position]) -> None:
        self._check_owned(positions)
        with self._speaking("committing positions"):
            self._consumer.commit(_offsets(positions), timeout_ms=ANSWER_MS)

    def close(self) -> None:
        self._assignment.closing = True
        with suppress(Exception):
            bounded(lambda: self._consumer.close(autocommit=False, timeout_ms=CLOSE_S * 1000), CLOSE_S + 0.5)
        self._publisher.close()

    def _subscribe(self) -> None:
        topics = self._settings.event_topics
        self._find(topics)
        self._consumer.subscribe(list(topics), listener=self._assignment)
        try:
            for topic in topics:
                if not bounded(lambda t=topic: self._consumer.partitions_for_topic(t), ANSWER_MS / 1000):  # type: ignore[misc]
                    raise E.KafkaTimeoutError(f"nothing is known of the partitions of {topic}")
        except Exception:
            self._consumer.unsubscribe()
            raise

    def _find(self, topics: Collection[str]) -> None:
        for topic in set(topics) - self._topics:
            self.partition_count(topic)

    def _fetch(self, timeout_ms: int, max_records: int) -> dict[Any, list[Any]]:
        try:
            fetched: dict[Any, list[Any]] = self._consumer.poll(timeout_ms=timeout_ms, max_records=max_records)
            return fetched
        except E.OffsetOutOfRangeError as error:
            gone = error.args[0]
        except E.LogTruncationError as error:
            gone = error.divergent_offsets
        except E.KafkaError as error:
            if not isinstance(error.__cause__, Changed):
                raise
            return {}
        log.warning("Kafka does not hold the position that was to be read next (%s): taking the partition over anew", gone)
        self._assignment.assign_again([p for p in gone if Partition(*p) in self._assignment.owned()])
        return {}

    def _committed(self, partition: Any, deadline: float) -> Any:
        while True:
            try:
                if partition in self._timed_out:
                    self._consumer.committed(partition, timeout_ms=ANSWER_MS)
                    self._timed_out.discard(partition)
                return self._consumer.committed(partition, metadata=True, timeout_ms=1000)
            except E.KafkaTimeoutError:
                self._timed_out.add(partition)
                if time.monotonic() > deadline:
                    raise
                self._consumer.end_offsets([partition], timeout_ms=ANSWER_MS)  # it answers: a transaction is open. Or this raises

    def _check_owned(self, positions: Mapping[Partition, Position]) -> None:
        if gone := sorted(positions.keys() - self._assignment.committable()):
            names = ", ".join(f"{p.topic}-{p.number}" for p in gone)
            raise Fenced(f"{names} no longer belongs to this worker: nothing was committed")

    @contextmanager
    def _administering(self, doing: str) -> Iterator[Any]:
        with self._speaking(doing):
            admin = connect(KafkaAdminClient, self._settings, client_id=self._transactional_id, request_timeout_ms=ANSWER_MS)
            try:
                yield admin
            finally:
                admin.close()

    @contextmanager
    def _publishing(self) -> Iterator[None]:
        try:
            with self._speaking("publishing"):
                yield
        except Exception:
            self._topics.clear()  # a topic may have been deleted
            raise

    @contextmanager
    def _speaking(self, doing: str) -> Iterator[None]:
        """Whatever kafka-python raises, as an error of this interface."""
        try:
            yield
        except (TransportError, FatalTransportError):
            raise
        except Exception as error:
            explained = self._explained(f"{doing}, Kafka at {self._settings.kafka_bootstrap_servers}", error)
            if isinstance(explained, Fenced):  # leave the group, so that what this member owns is decided anew
                with suppress(Exception):
                    bounded(self._consumer.unsubscribe, ANSWER_MS / 1000)
                self._assignment.lose_all()
            raise explained from error

    def _explained(self, doing: str, error: Exception) -> Exception:
        cause: Exception = error.args[1] if isinstance(error, Undelivered) else error
        causes = [cause, *(a for a in cause.args if isinstance(a, Exception))]

        def is_any(kinds: Iterable[type[Exception]]) -> bool:  # some errors arrive as text within another
            return any(isinstance(c, k) or k.__name__ in str(c) for k in kinds for c in causes)

        for kind, advice in FATAL.items():
            if is_any([kind]):
                return FatalTransportError(f"{doing}: {error}. What to do: {advice}.")
        if is_any(PRODUCER_FENCED):
            return Fenced(
                f"{doing}: another worker has taken over transactional id {self._transactional_id}, or a transaction took longer than "
                f"transaction_timeout_ms. If this happens again and again, give each worker its own worker_id."
            )
        if is_any(MEMBER_FENCED):
            return Fenced(f"{doing}: the group has been rebalanced without this worker: {said(cause)}")
        if isinstance(cause, AWAY):
            return TransportError(f"{doing} does not answer: {said(cause)}")
        if isinstance(cause, E.KafkaError):
            return TransportError(f"{doing}: {error}")
        return FatalTransportError(f"{doing}: the client failed in a way that was not foreseen: {error!r}")


_FIELDS = attrgetter("offset", "timestamp", "key", "value", "headers")


def _columns(partition: Partition, records: list[Any]) -> Records:
    offsets, times, keys, values, headers = map(list, zip(*map(_FIELDS, records), strict=True))
    if any(headers):
        headers = [tuple((k, v or b"") for k, v in h) for h in headers]
    return Records(partition, offsets, times, keys, values, headers)


def _offsets(positions: Mapping[Partition, Position]) -> dict[Any, Any]:
    return {TopicPartition(*p): OffsetAndMetadata(at.offset, at.metadata, -1) for p, at in positions.items()}
