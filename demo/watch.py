"""What a downstream program sees of the worker: scores and dead letters as a read_committed consumer reads them, and how soon it does.

A thread does nothing but poll, and notes when each record came. Everything else happens in `update`, in the caller's thread.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
from kafka import KafkaConsumer, TopicPartition
from numpy.typing import NDArray

from demo.audit import Score, bounds, decode_score
from demo.quality import Quality
from demo.stream import Stream
from demo.topics import Topics

RECENT_S = 10
NONE = -1.0

Polled = tuple[float, dict[Any, list[Any]]]  # when it came (epoch ms), and what


class Tail:
    """Partitions followed by a thread, which hands over whatever comes with the moment it came."""

    def __init__(self, bootstrap: str, start: dict[TopicPartition, int], **config: Any) -> None:
        self.arrived: SimpleQueue[Polled] = SimpleQueue()
        self.failure: Exception | None = None
        self._consumer = KafkaConsumer(bootstrap_servers=bootstrap, max_poll_records=5000, **config)
        self._consumer.assign(list(start))
        for partition, offset in start.items():
            self._consumer.seek(partition, offset)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        try:
            while not self._stop.is_set():
                if polled := self._consumer.poll(timeout_ms=500):
                    self.arrived.put((time.time() * 1000, polled))
        except Exception as error:
            self.failure = error

    def take(self) -> list[Polled]:
        if self.failure:
            raise self.failure
        taken = []
        while True:
            try:
                taken.append(self.arrived.get_nowait())
            except Empty:
                return taken

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._consumer.close()


class Visible:
    """Milliseconds from an event's arrival in Kafka to its score being readable. Offsets of a partition are told in order."""

    def __init__(self, start: dict[int, int]) -> None:
        self._start = start
        self._arrived_ms: dict[int, list[float]] = {number: [] for number in start}
        self._waiting: deque[tuple[int, int, float]] = deque()
        self._all: list[float] = []
        self._recent: deque[tuple[float, float]] = deque()  # when seen, how long it took

    def event(self, partition: int, arrived_ms: float) -> None:
        """The next record of an event partition."""
        self._arrived_ms[partition].append(arrived_ms)

    def score(self, partition: int, offset: int, seen_ms: float) -> None:
        if offset >= self._start[partition]:
            self._waiting.append((partition, offset - self._start[partition], seen_ms))

    def settle(self, now_ms: float) -> None:
        """Put the two together. A score whose event was not told yet goes on waiting."""
        for _ in range(len(self._waiting)):
            partition, place, seen_ms = self._waiting.popleft()
            if place < len(arrived := self._arrived_ms[partition]):
                self._all.append(seen_ms - arrived[place])
                self._recent.append((seen_ms, seen_ms - arrived[place]))
            else:
                self._waiting.append((partition, place, seen_ms))
        while self._recent and self._recent[0][0] < now_ms - RECENT_S * 1000:
            self._recent.popleft()

    def overall(self) -> tuple[float, float] | None:
        """(p50, p99) of all live events."""
        return _median_and_p99(self._all)

    def recent(self) -> tuple[float, float] | None:
        """(p50, p99) of the last seconds."""
        return _median_and_p99([took for _, took in self._recent])


@dataclass
class People:
    """The newest scores of each user (U,), by the stream's user index. NONE: no score yet."""

    first: NDArray[np.float64]
    """the first target's score"""
    second: NDArray[np.float64]
    """the second target's"""
    before: NDArray[np.float64]
    """the second target's when the user was last active"""
    at_ms: NDArray[np.int64]
    active_ms: NDArray[np.int64]

    @classmethod
    def of(cls, count: int) -> People:
        return cls(*(np.full(count, NONE) for _ in range(3)), *(np.zeros(count, np.int64) for _ in range(2)))

    def keenest(self, count: int) -> NDArray[np.int64]:
        """Users with the highest score of the first target."""
        return np.argsort(-self.first)[:count]

    def falling_silent(self, count: int, since_ms: int) -> NDArray[np.int64]:
        """Users whose second target's score has risen most by silence alone, as said since `since_ms`."""
        rise = np.where((self.before > NONE) & (self.at_ms > self.active_ms) & (self.at_ms >= since_ms), self.second - self.before, 0)
        order = np.argsort(-rise)[:count]
        return order[rise[order] > 0]


class Watch:
    """Begins where the live part begins; what is older was read back before."""

    def __init__(self, bootstrap: str, topics: Topics, stream: Stream, quality: Quality, clock: Callable[[], float] = time.time) -> None:
        self.quality = quality
        self.people = People.of(len(stream.history.users))
        self.reasons: Counter[str] = Counter()
        self.last_dead_letter = ""
        self.event_scores = self.silence_scores = 0
        self.now_ms = stream.live_ms
        self._clock = clock
        self._index = {user: i for i, user in enumerate(stream.history.users)}
        self._names = list(quality.targets)
        self._answered: dict[int, int] = {}  # next offset of each event partition that is still to be answered
        with KafkaConsumer(bootstrap_servers=bootstrap) as consumer:
            ends = {number: end for number, (_, end) in bounds(consumer, topics.events).items()}
            out = {
                TopicPartition(topic, number): first
                for topic in (topics.scores, topics.dead_letters)
                for number, (first, _) in bounds(consumer, topic).items()
            }
        self.visible = Visible(ends)
        self._dead_letters = topics.dead_letters
        self._out = Tail(bootstrap, out, isolation_level="read_committed")
        # Arrival times are not urgent: a few large fetches cost less than many small ones.
        start = {TopicPartition(topics.events, number): end for number, end in ends.items()}
        self._in = Tail(bootstrap, start, fetch_min_bytes=1024 * 1024, fetch_max_wait_ms=500)

    def close(self) -> None:
        self._out.close()
        self._in.close()

    def update(self) -> None:
        """Take in what has come since the last time."""
        for _, polled in self._in.take():
            for partition, records in polled.items():
                for record in records:
                    self.visible.event(partition.partition, record.timestamp)
        for seen_ms, polled in self._out.take():
            for partition, records in polled.items():
                take = self._dead_letter if partition.topic == self._dead_letters else self._score
                for record in records:
                    take(record, seen_ms)
        self.visible.settle(self._clock() * 1000)

    def answered(self, ends: dict[int, int]) -> bool:
        """Whether the last record of each event partition has its answer."""
        return all(self._answered.get(number, 0) >= end for number, end in ends.items())

    def _score(self, record: Any, seen_ms: float) -> None:
        score = decode_score(record.value)
        if score.source is not None:
            self.event_scores += 1
            self._answer(score.source.partition, score.source.offset)
            self.visible.score(score.source.partition, score.source.offset, seen_ms)
        else:
            self.silence_scores += 1
        self.now_ms = max(self.now_ms, score.timestamp)
        self._remember(score)

    def _remember(self, score: Score) -> None:
        user = self._index.get(score.user_id)
        if user is None:
            return
        people = self.people
        first, second = (score.scores.get(name, np.nan) for name in self._names)
        people.first[user], people.second[user], people.at_ms[user] = first, second, score.timestamp
        if score.source is not None:
            people.before[user], people.active_ms[user] = second, score.timestamp
        self.quality.add(user, score.timestamp, score.scores)

    def _dead_letter(self, record: Any, _: float) -> None:
        about = dict(record.headers)
        reason = about.get("streamscore-reason", b"none given").decode()
        self.reasons[reason] += 1
        self.last_dead_letter = about.get("streamscore-detail", b"").decode(errors="replace")
        self._answer(int(about["streamscore-partition"]), int(about["streamscore-offset"]))

    def _answer(self, partition: int, offset: int) -> None:
        self._answered[partition] = max(self._answered.get(partition, 0), offset + 1)


def _median_and_p99(milliseconds: list[float]) -> tuple[float, float] | None:
    if not milliseconds:
        return None
    p50, p99 = np.percentile(milliseconds, (50, 99))
    return float(p50), float(p99)
