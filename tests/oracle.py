"""The oracle: the same records, the same artifact, one event at a time, in memory. What the worker ought to publish and store.

It shares `model` with the worker (features, statistics, network, head), and nothing of the worker: no batches, no cache, no rounds, no
store, no recovery, no vectorised timers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from model import statistics
from model.artifact import Model
from model.events import EventDecoder
from model.features import Previous, step_features

STEP = 32767.0
NEVER_MS = -(1 << 62)

Event = tuple[int, int, int, int, int, float]
"""A user's raw event: time (never before the user's last), hashes of type, item, category and session, value."""


@dataclass
class User:
    hidden: np.ndarray
    stats: np.ndarray
    history: list[Event] = field(default_factory=list)
    fired: set[int] = field(default_factory=set)


@dataclass
class Expected:
    """events: by (topic, partition, offset); silences: by (user, due time); bad: (topic, partition, offset) -> reason; users: by partition
    and name; clocks: by partition."""

    events: dict[tuple[str, int, int], tuple[str, np.ndarray]] = field(default_factory=dict)
    silences: dict[tuple[str, int], np.ndarray] = field(default_factory=dict)
    bad: dict[tuple[str, int, int], str] = field(default_factory=dict)
    users: dict[int, dict[str, User]] = field(default_factory=dict)
    clocks: dict[int, int] = field(default_factory=dict)


class Oracle:
    """One pass a partition. history_events: how many of a user's last events a new encoder gets to see."""

    def __init__(
        self, model: Model, ages_ms: Sequence[int], retention_ms: int, lateness_ms: int = 0, history_events: int = 50, **decoder: object
    ) -> None:
        self.ages_ms = list(ages_ms)
        self.retention_ms = retention_ms
        self.lateness_ms = lateness_ms
        self.history_events = history_events
        self.decoder = EventDecoder(**decoder)  # type: ignore[arg-type]
        self.use(model)

    def run(self, topic: str, partition: int, records: Iterable[tuple[int, int, bytes | None]], into: Expected | None = None) -> Expected:
        """records: (offset, Kafka timestamp, value). Goes on where `into` is."""
        out = into or Expected()
        asked: list[tuple[str, object, np.ndarray, np.ndarray, int]] = []  # of the head, all at once at the end
        users = out.users.setdefault(partition, {})
        clock = out.clocks.get(partition, NEVER_MS)
        for offset, at, value in records:
            columns, bad = self.decoder.columns([value], [at])
            if bad:
                out.bad[topic, partition, offset] = bad[0].reason
                continue
            name = columns.user[0]
            self._fire_user(asked, users, name, clock)
            user = users.get(name)
            if user is None:
                user = users[name] = User(np.zeros((1, self.model.network.state_size), np.float32), np.zeros(1, statistics.STATISTICS))
            time_ms = int(columns.time_ms[0])
            event = tuple(int(c[0]) for c in (columns.type_hash, columns.item_hash, columns.category_hash, columns.session_hash))
            self._step(user, (time_ms, *event, float(columns.value[0])), columns.attributes)  # type: ignore[arg-type]
            last = int(user.stats["last_ms"][0])
            asked.append((name, (topic, partition, offset), user.hidden, user.stats.copy(), last))
            clock = max(clock, time_ms - self.lateness_ms)
            # dues that the clock had passed before this event was there are not fired any more
            user.fired = {age for age in (*self.ages_ms, self.retention_ms) if last + age <= clock}
        for name in list(users):
            self._fire_user(asked, users, name, clock)
        out.clocks[partition] = clock
        self._answer(asked, out)
        return out

    def swap(self, model: Model, out: Expected, partition: int) -> None:
        """Go over to another model between two records of a partition."""
        new_encoder = model.manifest.encoder_id != self.model.manifest.encoder_id
        self.use(model)
        if new_encoder:
            for user in out.users[partition].values():
                again = User(np.zeros((1, model.network.state_size), np.float32), np.zeros(1, statistics.STATISTICS))
                for event in user.history[-self.history_events :]:
                    self._step(again, event)
                user.hidden = again.hidden

    def next_due(self, user: User, clock: int) -> int:
        last = int(user.stats["last_ms"][0])
        return min([last + age for age in self.ages_ms if last + age > clock], default=last + self.retention_ms)

    def use(self, model: Model) -> None:
        self.model = model
        self.scorer = model.scorer()

    def _fire_user(self, asked: list, users: dict[str, User], name: str, clock: int) -> None:  # type: ignore[type-arg]
        user = users.get(name)
        if user is None:
            return
        last = int(user.stats["last_ms"][0])
        for age in self.ages_ms:
            if last + age <= clock and age not in user.fired:
                user.fired.add(age)
                asked.append((name, None, user.hidden, user.stats.copy(), last + age))
        if last + self.retention_ms <= clock:
            del users[name]

    def _step(self, user: User, event: Event, attributes: np.ndarray | None = None) -> None:
        stats = user.stats
        before = user.history[-1] if user.history else (0, 0, 0, 0, 0, 0.0)
        previous = Previous(
            np.array([stats["count"][0] > 0]),
            stats["last_ms"].copy(),
            np.array([before[1]], np.uint32),
            np.array([before[2]], np.uint32),
            np.array([before[3]], np.uint32),
            np.array([before[4]], np.uint32),
        )
        time_ms, type_hash, item_hash, category_hash, session_hash, value = event
        columns = (
            np.array([time_ms], np.int64),
            np.array([type_hash], np.uint32),
            np.array([item_hash], np.uint32),
            np.array([category_hash], np.uint32),
            np.array([session_hash], np.uint32),
            np.array([value], np.float32),
        )
        features = step_features(self.model.vocabulary, self.model.scaling, previous, *columns)
        hidden = self.model.network.step(user.hidden, features, stats).numpy()
        user.hidden = np.rint(np.clip(hidden, -1, 1) * STEP).astype(np.float32) / np.float32(STEP)
        statistics.update(stats, features.slot, columns[0], columns[5], attributes)
        user.history.append((int(stats["last_ms"][0]), type_hash, item_hash, category_hash, session_hash, value))

    def _answer(self, asked: list, out: Expected) -> None:  # type: ignore[type-arg]
        if not asked:
            return
        names, keys, hidden, stats, at_ms = zip(*asked, strict=True)
        probabilities = self.scorer(np.concatenate(hidden), np.concatenate(stats), np.array(at_ms, np.int64))
        for name, key, at, probability in zip(names, keys, at_ms, probabilities, strict=True):
            if key is None:
                out.silences[name, at] = probability
            else:
                out.events[key] = (name, probability)
