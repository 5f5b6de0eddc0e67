"""The events of a window in shards of random users, of which one is in memory at a time.

A shard holds whole users, by a range of a hash of their ids and never by the length of their streams: batches mix the users of a shard,
and a landmark's batch must not depend on its user's future. So any shard is a sample of users, too, the same one in every round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

from model.events import stable_hash
from model.hazards import DAY_MS
from trainer.history import COLUMNS, History, from_table, sample_users
from trainer.reading import files_in, read
from trainer.settings import TrainerSettings


@dataclass(frozen=True, slots=True)
class Shards:
    """A window's events by shards. first_ms, last_ms: times of the first and the last event; events: how many there are, about.

    part: (i, n) to the history of the i-th of n parts of the users. of: parts that the users are dealt out to; count: shards of these that
    are looked at, all or the first ones. mine: (i, n) where this process takes the i-th of n parts of each.
    """

    part: Callable[[int, int], History]
    first_ms: int
    last_ms: int
    events: int
    of: int
    count: int
    mine: tuple[int, int] = (0, 1)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> History:
        own, processes = self.mine
        return self.part(number * processes + own, self.of * processes)

    def __iter__(self) -> Iterator[History]:
        return (self[number] for number in range(self.count))

    @property
    def extent(self) -> tuple[int, int, int, int, int]:
        """All but how a part is read."""
        return self.first_ms, self.last_ms, self.events, self.of, self.count

    def sample(self, at_most: int) -> History:
        """About so many events at most, of a share of the users."""
        return self.part(0, max(1, -(-self.events // at_most)))

    def limited(self, at_most: int) -> Shards:
        """About so many events at most: fewer shards, or where there is but one, fewer users."""
        if self.events <= at_most:
            return self
        if self.of == 1:
            return in_memory(sample_users(self[0], at_most), at_most)
        return replace(self, count=max(1, self.of * at_most // self.events))

    def fewer(self) -> Shards:
        """Shards of twice the size."""
        return replace(self, of=-(-self.of // 2), count=-(-self.count // 2))


def in_memory(history: History, shard_events: int) -> Shards:
    """A history that is in memory already: what is made of it, a hundred times as large, is made by shards."""

    @cache
    def draw_U() -> NDArray[np.uint64]:
        return np.array([stable_hash(u) for u in history.user_ids], np.uint64)

    def part(number: int, of: int) -> History:
        return history if of == 1 else history.of_users((draw_U() * np.uint64(of) >> np.uint64(32)) == number)

    of = max(1, -(-len(history) // shard_events))
    return Shards(part, history.first_ms, history.last_ms, len(history), of, of)


def of_log(settings: TrainerSettings) -> Shards | None:
    """What the log holds of the window and the margin before it, read when a shard is asked for; None where it holds nothing."""
    files = [f for f in files_in(settings.log_directory) if f.newest_ms is not None and f.oldest_ms is not None]
    if not files:
        return None
    last_ms = max(f.newest_ms for f in files if f.newest_ms is not None)
    since_ms = last_ms - int((settings.window_days + settings.log_margin_days) * DAY_MS)
    wanted = [f for f in files if f.newest_ms is not None and f.newest_ms >= since_ms]
    columns = [*COLUMNS, *(["topic"] if len(settings.event_topics) > 1 else [])]

    def part(number: int, of: int) -> History:
        return from_table(read(settings.log_directory, since_ms, columns, (number, of)))

    events = sum(f.rows for f in wanted)
    of = max(1, -(-events // settings.shard_events))
    if of == 1:
        return in_memory(part(0, 1), settings.shard_events)
    first_ms = max(since_ms, min(f.oldest_ms for f in wanted if f.oldest_ms is not None))
    return Shards(part, first_ms, last_ms, events, of, of)
