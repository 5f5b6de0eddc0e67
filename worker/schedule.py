"""When a silent user is due: for a score at each age of the schedule, and at last for deletion. Pure functions of last event and clock.

A partition has one clock, and fires everything due up to it, in order:

    stream_ms   the highest event timestamp seen, less the allowed lateness; moved on by the wall clock while the partition is idle
    fired_ms    everything due up to here has been fired; it trails stream_ms only while a leap of the clock is worked off in steps

A user is due at last event + age for each age. Which of these dues have been fired follows from `fired_ms` alone, so nothing about
timers is kept per user, and a replay or another worker arrives at the same place. `fired_ms` travels in the metadata of the committed
offset, in the transaction of the silence scores that it speaks of.

Firing does not depend on how records fall into batches: a due is fired before the user's next event if the clock had passed it
before that event, and the clock before an event is made of the events before it in the log.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NEVER_MS = -(1 << 62)


@dataclass(slots=True)
class Clock:
    """A partition's clock, in epoch milliseconds."""

    fired_ms: int = NEVER_MS
    stream_ms: int = NEVER_MS

    def encode(self) -> str:
        """As the metadata string of a committed offset."""
        return json.dumps({"fired_ms": self.fired_ms, "stream_ms": self.stream_ms})

    @classmethod
    def decode(cls, metadata: str) -> Clock:
        """Metadata of another program, or none, is a clock that has not started."""
        try:
            values = json.loads(metadata)
            return cls(int(values["fired_ms"]), int(values["stream_ms"]))
        except (ValueError, TypeError, KeyError, OverflowError):
            return cls()

    def latest(self, other: Clock) -> Clock:
        return Clock(max(self.fired_ms, other.fired_ms), max(self.stream_ms, other.stream_ms))


class Schedule:
    """ages_ms: silent ages at which a user is scored, increasing; retention_ms: the age at which a user is deleted, beyond them."""

    def __init__(self, ages_ms: tuple[int, ...], retention_ms: int) -> None:
        self.retention_ms = retention_ms
        self._ages = np.array((*ages_ms, retention_ms), np.int64)

    def next_due(self, last_ms: NDArray[np.int64], fired_ms: int | NDArray[np.int64]) -> NDArray[np.int64]:
        """(N,) when each user is due next: the first due after `fired_ms`; the deletion if even that has passed."""
        index = np.searchsorted(self._ages, fired_ms - last_ms, side="right")
        return last_ms + self._ages[np.minimum(index, len(self._ages) - 1)]

    def passed(
        self, last_ms: NDArray[np.int64], due_ms: NDArray[np.int64], upto_ms: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
        """What is to be fired for N users whose next due is `due_ms`, up to a moment of each: (user index, due time) of every score, in
        order for each user, and (N,) whether the user is deleted."""
        first = np.searchsorted(self._ages, due_ms - last_ms, side="left")
        end = np.searchsorted(self._ages, upto_ms - last_ms, side="right")
        deleted = end == len(self._ages)
        scores = np.maximum(np.minimum(end, len(self._ages) - 1) - first, 0)
        user = np.repeat(np.arange(len(last_ms)), scores)
        nth = np.arange(len(user)) - np.repeat(np.cumsum(scores) - scores, scores)
        return user, last_ms[user] + self._ages[first[user] + nth], deleted


def clock_along(time_ms: NDArray[np.int64], stream_ms: int, lateness_ms: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """((N,) the stream clock before each event of a batch, (N,) after it)."""
    reached = np.maximum(np.maximum.accumulate(time_ms - lateness_ms), stream_ms)
    return np.concatenate([[stream_ms], reached[:-1]]).astype(np.int64), reached
