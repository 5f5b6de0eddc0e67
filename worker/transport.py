"""What the worker needs of a log with consumer groups: poll, committed, seek, publish, commit. Kafka stands behind this interface.

Implementations: `worker.transport_kafka` (kafka-python) and `worker.transport_memory` (a whole broker in memory, for deterministic tests
of the whole worker). One set of contract tests runs against both.

The interface is synchronous and used from one thread. The assignment changes only inside `poll`, which reports the change.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

Headers = Sequence[tuple[str, bytes]]


class Partition(NamedTuple):
    """A topic partition."""

    topic: str
    number: int


class Position(NamedTuple):
    """A committed position: the offset of the next record to consume, and the metadata string that travels with it."""

    offset: int
    metadata: str = ""


class Bounds(NamedTuple):
    """Offsets that a partition retains: records in [first, end). In exactly_once, `end` is the last stable offset."""

    first: int
    end: int


@dataclass(slots=True)
class Records:
    """Records of one partition, in log order, in columns of equal length. times_ms: the records' Kafka timestamps."""

    partition: Partition
    offsets: list[int]
    times_ms: list[int]
    keys: list[bytes | None]
    values: list[bytes | None]
    headers: list[Headers]

    def __len__(self) -> int:
        return len(self.offsets)

    def first(self, count: int) -> Records:
        """The first `count` of them."""
        columns = (self.offsets, self.times_ms, self.keys, self.values, self.headers)
        return Records(self.partition, *(column[:count] for column in columns))  # type: ignore[arg-type]


@dataclass(slots=True)
class Polled:
    """One poll. First give up `revoked`, then take over `assigned`, then process `records` (never of a partition not owned).

    What is reported as revoked may still be committed until the next poll, which is when the member joins the rebalance. A partition whose
    position is no longer retained is reported as revoked and assigned again: nothing jumps in silence. A partition that was taken away and
    given back between two polls is in both lists. An assigned partition is paused where it stands: nothing of it is delivered before the
    first `seek`.
    """

    records: list[Records] = field(default_factory=list)
    revoked: list[Partition] = field(default_factory=list)
    assigned: list[Partition] = field(default_factory=list)


@dataclass(slots=True)
class Outgoing:
    """Messages for one partition of an output topic, in order. partition None: by the key's hash (Kafka's default partitioner).

    headers: None, or one sequence a message.
    """

    topic: str
    partition: int | None
    keys: list[bytes | None]
    values: list[bytes | None]
    headers: list[Headers] | None = None


class TransportError(Exception):
    """The log cannot be reached or refused for now. Nothing is known to have been committed: ask `committed` before going on."""


class Fenced(TransportError):
    """This member no longer owns what it tried to commit (a newer generation or a newer producer exists). It has left the group: the next
    poll reports its partitions as revoked, later ones what it is given as it joins again."""


class FatalTransportError(Exception):
    """Trying again cannot help (a topic is missing, authorisation, a message that no broker would take). The message says what to do."""


class Transport(Protocol):
    """One member of a consumer group that publishes too."""

    def poll(self, timeout_ms: int, max_records: int) -> Polled:
        """Records that are there, waiting up to timeout_ms for the first, and some seconds more while a rebalance is under way. Raises
        TransportError, FatalTransportError."""

    def committed(self, partitions: Collection[Partition]) -> dict[Partition, Position]:
        """Positions last committed by the group; a partition without one is absent. Waits for transactions of a dead member that are
        still open to end. Raises TransportError."""

    def bounds(self, partitions: Collection[Partition]) -> dict[Partition, Bounds]:
        """What is retained of each partition. Raises TransportError."""

    def partition_count(self, topic: str) -> int:
        """Number of partitions. Raises FatalTransportError where the topic does not exist, TransportError where that cannot be known."""

    def message_bytes(self, topic: str) -> int:
        """The largest message that a topic takes. Raises FatalTransportError where the topic does not exist, TransportError."""

    def seek(self, partition: Partition, offset: int) -> None:
        """Deliver from `offset` on. Records fetched before the seek are not delivered. A partition not owned is ignored."""

    def publish(self, outgoing: Sequence[Outgoing], positions: Mapping[Partition, Position]) -> None:
        """Begin to publish; `settle` says what came of it, and is called before the next one is begun.

        exactly_once: one transaction of the messages and the positions. at_least_once: messages alone; the positions wait for `commit`.
        Raises what `settle` raises, where that is known at once; there is nothing to settle then.
        """

    def settle(self) -> None:
        """Wait for what was begun, if anything was. When it returns, everything is committed (at_least_once: acknowledged); when it
        raises, ask `committed`. A poll may come between, and what that reports as revoked can still be settled before the next poll.

        Raises Fenced, TransportError (the transaction was aborted as far as possible and the producer rebuilt), FatalTransportError.
        """

    def commit(self, positions: Mapping[Partition, Position]) -> None:
        """at_least_once: commit positions. Raises Fenced, TransportError."""

    def close(self) -> None:
        """Leave the group at once and release everything. Never raises."""
