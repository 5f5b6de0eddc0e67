"""What a law gives: a stream of events drawn from a seed, the questions asked of it, and the exact answer to each.

A question is a user and a moment `at`. It is answered from the user's events strictly before `at`, and asks what happens in
[at, at + horizon). Scheduled questions are asked of all known users every sixth day from `until` on, so on several weekdays; the others
are asked one millisecond after an event, which is then known. Whatever is fitted sees events before `until` alone, and every horizon
ends within the simulation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from model.hazards import DAY_MS
from model.targets import Target

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
MONDAY_MS = 1_736_121_600_000
"""2025-01-06T00:00:00Z, day 0 of most laws."""
SCHEDULED, AFTER = "scheduled", "after an event"
KINDS = (SCHEDULED, AFTER)
STEP_DAYS = 6
ASKED = 40_000
"""Questions of a kind at most."""


@dataclass(frozen=True, slots=True)
class Stream:
    """E events of U users, sorted by user and time.

    user: (E,) codes below `users`; type: (E,) index into `types`; item, category: (E,), -1 where there is none; value: (E,), NaN where
    there is none.
    """

    users: int
    types: tuple[str, ...]
    user: Ints
    time_ms: Ints
    type: Ints
    item: Ints
    category: Ints
    value: Floats

    def __len__(self) -> int:
        return len(self.user)

    @property
    def first(self) -> Ints:
        """(U + 1,) where each user's events begin, and the end."""
        return np.searchsorted(self.user, np.arange(self.users + 1))

    def where(self, keep: NDArray[np.bool_]) -> Stream:
        """The same users, and some of their events."""
        columns = {name: getattr(self, name)[keep] for name in ("user", "time_ms", "type", "item", "category", "value")}
        return replace(self, **columns)

    def last_before(self, user: Ints, at_ms: Ints) -> Ints:
        """(Q,) each user's last event strictly before the moment; -1 where there is none."""
        key = (self.user << 42) + self.time_ms  # 42 bits hold epoch milliseconds up to the year 2109
        row = np.searchsorted(key, (user << 42) + at_ms) - 1
        return np.where((row >= 0) & (self.user[row] == user), row, -1)

    def table(self) -> pa.Table:
        """As the trainer reads events: in order of time."""
        order = np.argsort(self.time_ms, kind="stable")

        def texts(codes: Ints, names: list[str]) -> pa.Array:
            indices = pa.array(codes[order].astype(np.int32), mask=codes[order] < 0)
            return pa.DictionaryArray.from_arrays(indices, pa.array(names, pa.string())).cast(pa.string())

        def marks(codes: Ints, letter: str) -> pa.Array:
            return texts(codes, [f"{letter}{i}" for i in range(codes.max(initial=-1) + 1)])

        return pa.table(
            {
                "user_id": texts(self.user, user_names(self.users)),
                "type": texts(self.type, list(self.types)),
                "timestamp": self.time_ms[order],
                "item_id": marks(self.item, "i"),
                "category": marks(self.category, "c"),
                "value": pa.array(self.value[order], from_pandas=True),
            }
        )


def user_names(users: int) -> list[str]:
    return [f"u{i}" for i in range(users)]


@dataclass(frozen=True, slots=True)
class Asked:
    """Q questions of one kind. exact: (Q, T) probability of each target given the events before `at` and the law; None if unknown."""

    user_id: list[str]
    at_ms: Ints
    exact: Floats | None

    def __len__(self) -> int:
        return len(self.user_id)


@dataclass(frozen=True, slots=True)
class Case:
    """What is learnt from (events of `table` before `until`) and what is asked, by kind.

    active_days: scheduled questions are asked of users with an event in these last days alone; None: of all known users.
    pareto: whether each event is a purchase of some kind, as Pareto/NBD has it.
    constants: by target, log-loss and other figures of baselines that somebody else fitted.
    """

    name: str
    table: pa.Table
    until_ms: int
    targets: tuple[Target, ...]
    asked: dict[str, Asked]
    active_days: int | None = None
    pareto: bool = False
    constants: dict[str, dict[str, dict[str, float]]] | None = None


@dataclass(frozen=True, slots=True)
class Law:
    """A law of events whose exact filter is known.

    about: one sentence. targets: as the trainer writes them. until_day, days: the moment that splits what is learnt from what is asked,
    and the end, in days from `start_ms`. simulate: (users, seed) to a stream. answers: (stream, user, at) to (Q, T) exact probabilities
    from the events strictly before each moment. most_users: where a user has many events, or few users are the point.
    """

    name: str
    about: str
    targets: tuple[Target, ...]
    until_day: int
    days: int
    simulate: Callable[[int, int], Stream]
    answers: Callable[[Stream, Ints, Ints], Floats]
    start_ms: int = MONDAY_MS
    most_users: int = 1_000_000
    active_days: int | None = None
    pareto: bool = False

    @property
    def until_ms(self) -> int:
        return self.start_ms + self.until_day * DAY_MS

    def draw(self, users: int, seed: int) -> Case:
        """A fresh sample: the same seed gives the same."""
        users = min(users, self.most_users)
        stream = self.simulate(users, seed)
        rng, names = np.random.default_rng([seed, 1]), np.array(user_names(users))
        asked = {}
        for kind, (user, at_ms) in self.questions(stream).items():
            chosen = np.sort(rng.permutation(len(user))[:ASKED])
            user, at_ms = user[chosen], at_ms[chosen]
            asked[kind] = Asked(names[user].tolist(), at_ms, self.answers(stream, user, at_ms))
        return Case(self.name, stream.table(), self.until_ms, self.targets, asked, self.active_days, self.pareto)

    def questions(self, stream: Stream) -> dict[str, tuple[Ints, Ints]]:
        """By kind, (user, at) of all questions that could be asked."""
        last_ms = self.start_ms + self.days * DAY_MS - max(t.horizon_ms for t in self.targets)
        moments = np.arange(self.until_ms, last_ms + 1, STEP_DAYS * DAY_MS)
        user, at_ms = np.tile(np.arange(stream.users), len(moments)), np.repeat(moments, stream.users)
        row = stream.last_before(user, at_ms)
        known = row >= 0
        if self.active_days is not None:
            known &= at_ms - stream.time_ms[row] <= self.active_days * DAY_MS
        after = (stream.time_ms >= self.until_ms) & (stream.time_ms < last_ms)
        after_user, after_ms = np.unique(np.stack([stream.user, stream.time_ms + 1])[:, after], axis=1)
        return {SCHEDULED: (user[known], at_ms[known]), AFTER: (after_user, after_ms)}


def targets(*texts: str) -> tuple[Target, ...]:
    return tuple(Target.parse(text) for text in texts)


def day(time_ms: Ints) -> Floats:
    """Days since MONDAY_MS."""
    return (time_ms - MONDAY_MS) / DAY_MS


def moment_ms(days: Floats) -> Ints:
    return MONDAY_MS + np.round(days * DAY_MS).astype(np.int64)
