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


@dataclass
class User:
    hidden: np.ndarray
    stats: np.ndarray
    previous: tuple[int, int, int] = (0, 0, 0)
    fired: set[int] = field(default_factory=set)


@dataclass
class Expected:
    """events: by (topic, partition, offset); silences: by (user, due time); bad: (topic, partition, offset) -> reason; users: by name."""

    events: dict[tuple[str, int, int], tuple[str, np.ndarray]] = field(default_factory=dict)
    silences: dict[tuple[str, int], np.ndarray] = field(default_factory=dict)
    bad: dict[tuple[str, int, int], str] = field(default_factory=dict)
    users: dict[str, User] = field(default_factory=dict)


class Oracle:
    """One partition's pass. records: (offset, Kafka timestamp, value)."""

    def __init__(self, model: Model, ages_ms: Sequence[int], retention_ms: int, lateness_ms: int = 0) -> None:
        self.model = model
        self.scorer = model.scorer()
        self.ages_ms = list(ages_ms)
        self.retention_ms = retention_ms
        self.lateness_ms = lateness_ms
        self.decoder = EventDecoder()

    def run(self, topic: str, partition: int, records: Iterable[tuple[int, int, bytes | None]], into: Expected | None = None) -> Expected:
        out = into or Expected()
        users: dict[str, User] = {}
        clock = -(1 << 62)
        for offset, at, value in records:
            columns, bad = self.decoder.columns([value], [at])
            if bad:
                out.bad[topic, partition, offset] = bad[0].reason
                continue
            name = columns.user[0]
            self._fire_user(out, users, name, clock)
            user = users.get(name)
            if user is None:
                user = users[name] = User(np.zeros((1, self.model.network.shape.hidden), np.float32), np.zeros(1, statistics.STATISTICS))
            out.events[topic, partition, offset] = (name, self._event(user, columns))
            reached = max(clock, int(columns.time_ms[0]) - self.lateness_ms)
            last = int(user.stats["last_ms"][0])
            # dues that the clock had passed before this event was there are not fired any more
            user.fired = {age for age in (*self.ages_ms, self.retention_ms) if last + age <= reached}
            if reached > clock:
                clock = reached
        for name in list(users):
            self._fire_user(out, users, name, clock)
        out.users.update(users)
        return out

    def _fire_user(self, out: Expected, users: dict[str, User], name: str, clock: int) -> None:
        user = users.get(name)
        if user is None:
            return
        last = int(user.stats["last_ms"][0])
        for age in self.ages_ms:
            if last + age <= clock and age not in user.fired:
                user.fired.add(age)
                out.silences[name, last + age] = self.scorer(user.hidden, user.stats, np.array([last + age]))[0]
        if last + self.retention_ms <= clock:
            del users[name]

    def _event(self, user: User, columns) -> np.ndarray:  # type: ignore[no-untyped-def]
        stats = user.stats
        type_hash, item_hash, category_hash = user.previous
        previous = Previous(
            np.array([stats["count"][0] > 0]),
            stats["last_ms"].copy(),
            np.array([type_hash], np.uint32),
            np.array([item_hash], np.uint32),
            np.array([category_hash], np.uint32),
        )
        features = step_features(
            self.model.vocabulary,
            self.model.scaling,
            previous,
            columns.time_ms,
            columns.type_hash,
            columns.item_hash,
            columns.category_hash,
            columns.value,
        )
        hidden = self.model.network.step(user.hidden, features).numpy()
        user.hidden = np.rint(np.clip(hidden, -1, 1) * STEP).astype(np.float32) / np.float32(STEP)
        statistics.update(stats, features.slot, columns.time_ms, columns.value)
        user.previous = (int(columns.type_hash[0]), int(columns.item_hash[0]), int(columns.category_hash[0]))
        return self.scorer(user.hidden, stats, stats["last_ms"].copy())[0]
