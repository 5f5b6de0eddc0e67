"""Exactly once, proved: reads the score and dead-letter topics back from their beginning, as any read_committed consumer sees them.

Every record of the event topic must have been answered exactly once, by a score or by a dead letter; a user and a due time must have one
silence score. What was answered twice or more is doubled, once for each time too many; what was not is lost.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from kafka import KafkaConsumer, TopicPartition
from numpy.typing import NDArray

from demo.topics import Topics

PATIENCE_MS = 15_000


class Source(msgspec.Struct, gc=False):
    topic: str
    partition: int
    offset: int


class Score(msgspec.Struct, gc=False):
    """A message of the score topic."""

    user_id: str
    trigger: str
    scores: dict[str, float]
    timestamp: int
    source: Source | None
    model: str


decode_score = msgspec.json.Decoder(Score).decode


@dataclass
class Audit:
    """inputs: records by partition of the event topic, as (first offset, end offset). Tell it of every answer, then ask."""

    inputs: Mapping[int, tuple[int, int]]
    event_scores: int = 0
    silence_scores: int = 0
    dead_letters: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    foreign: int = 0
    """answers to records that are not in the event topic"""

    def __post_init__(self) -> None:
        self._answers: dict[int, NDArray[np.int64]] = {p: np.zeros(end - first, np.int64) for p, (first, end) in self.inputs.items()}
        self._silences: Counter[tuple[str, int]] = Counter()
        self._began_ms: dict[str, int] = {}

    def score(self, score: Score, written_ms: int) -> None:
        if written_ms < self._began_ms.get(score.model, written_ms + 1):
            self._began_ms[score.model] = written_ms
        if score.source is None:
            self.silence_scores += 1
            self._silences[score.user_id, score.timestamp] += 1
        else:
            self.event_scores += 1
            self._answered(score.source.partition, score.source.offset)

    def dead_letter(self, partition: int, offset: int, reason: str) -> None:
        self.dead_letters += 1
        self.reasons[reason] += 1
        self._answered(partition, offset)

    def _answered(self, partition: int, offset: int) -> None:
        first, end = self.inputs.get(partition, (0, 0))
        if first <= offset < end:
            self._answers[partition][offset - first] += 1
        else:
            self.foreign += 1

    @property
    def models(self) -> list[str]:
        """Versions, in the order of their first score."""
        return sorted(self._began_ms, key=self._began_ms.__getitem__)

    @property
    def events(self) -> int:
        return sum(map(len, self._answers.values()))

    @property
    def lost(self) -> int:
        return sum(int((answers == 0).sum()) for answers in self._answers.values())

    @property
    def doubled(self) -> int:
        events = sum(int(np.maximum(answers - 1, 0).sum()) for answers in self._answers.values())
        return events + self._silences.total() - len(self._silences)


@dataclass(frozen=True)
class ReadBack:
    """catch_up: scores a second while the history was caught up with, by the score topic's own timestamps."""

    audit: Audit
    events_per_second: float


def read_back(bootstrap: str, topics: Topics, history: Mapping[int, int]) -> ReadBack:
    """The audit of the topics as they are now. `history`: how many records of each event partition are history."""
    with KafkaConsumer(bootstrap_servers=bootstrap) as consumer:
        audit = Audit(bounds(consumer, topics.events))
    caught_up = CatchUp(history)
    for record in records(bootstrap, topics.scores):
        score = decode_score(record.value)
        audit.score(score, record.timestamp)
        caught_up.score(score, record.timestamp)
    for record in records(bootstrap, topics.dead_letters):
        about = dict(record.headers)
        audit.dead_letter(
            int(about["streamscore-partition"]), int(about["streamscore-offset"]), about.get("streamscore-reason", b"none given").decode()
        )
    return ReadBack(audit, caught_up.events_per_second)


@dataclass
class CatchUp:
    """How fast the history was worked off."""

    history: Mapping[int, int]
    count: int = 0
    first_ms: float = float("inf")
    last_ms: float = 0

    def score(self, score: Score, written_ms: int) -> None:
        if score.source and score.source.offset < self.history.get(score.source.partition, 0):
            self.count += 1
            self.first_ms, self.last_ms = min(self.first_ms, written_ms), max(self.last_ms, written_ms)

    @property
    def events_per_second(self) -> float:
        return self.count / ((self.last_ms - self.first_ms) / 1000) if self.last_ms > self.first_ms else 0.0


def bounds(consumer: KafkaConsumer, topic: str) -> dict[int, tuple[int, int]]:
    """(first, end) offset of every partition."""
    partitions = [TopicPartition(topic, number) for number in sorted(consumer.partitions_for_topic(topic) or ())]
    first, end = consumer.beginning_offsets(partitions), consumer.end_offsets(partitions)
    return {p.partition: (first[p], end[p]) for p in partitions}


def records(bootstrap: str, topic: str) -> Iterable[Any]:
    """All committed records of a topic, up to where it ends now."""
    consumer = KafkaConsumer(
        bootstrap_servers=bootstrap,
        isolation_level="read_committed",
        auto_offset_reset="earliest",
        max_poll_records=5000,
        max_partition_fetch_bytes=4 * 1024 * 1024,
    )
    try:
        yield from _until_end(consumer, bounds(consumer, topic), topic)
    finally:
        consumer.close()


def _until_end(consumer: KafkaConsumer, extent: Mapping[int, tuple[int, int]], topic: str) -> Iterator[Any]:
    ends = {TopicPartition(topic, number): end for number, (_, end) in extent.items()}
    consumer.assign(list(ends))
    consumer.seek_to_beginning()
    while any(consumer.position(p) < end for p, end in ends.items()):
        polled = consumer.poll(timeout_ms=PATIENCE_MS)
        if not polled and any(consumer.position(p) < end for p, end in ends.items()):
            raise RuntimeError(f"Topic {topic} could not be read to its end within {PATIENCE_MS / 1000:.0f} s of waiting")
        for found in polled.values():
            yield from found
