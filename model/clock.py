"""The stream's own clock: how fast time passes for users, by hour of the week (UTC).

People sleep, and shops have busy evenings: ten hours of silence say little at night and much in the daytime. Rates that rise and fall for
everybody alike are a change of clock (an operational time: Feller 1971; Daley & Vere-Jones 2003, ch. 7.4): on it they are even. The pace of
an hour is what the hour's share of activity is over an even one's, so a whole week takes a week on either clock.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

HOUR_MS = 3_600_000
HOURS = 168
WEEK_MS = HOURS * HOUR_MS
SLOWEST, FASTEST = 0.05, 20.0
"""Paces that an hour may have, about."""
SHRINKS = 100.0
"""Visits by which the pace of an hour is drawn to that of its weekday and its time of day, and these to an even one."""


class Clock:
    """pace: (168,) how fast time passes in each hour of the week, 1 in the mean, from Thursday 00:00 UTC, as the epoch begins."""

    def __init__(self, pace: NDArray[np.float64]) -> None:
        self._passed_ms = np.concatenate([[0.0], np.cumsum(pace / pace.mean())]) * HOUR_MS
        self._even = bool(np.ptp(pace) == 0)

    def elapsed_ms(self, from_ms: NDArray[np.int64], to_ms: NDArray[np.int64]) -> NDArray[np.int64]:
        """(N,) how much time passed on this clock between moments, of which the second is not before the first."""
        if self._even:
            return to_ms - from_ms
        return self._read(to_ms) - self._read(from_ms)

    def _read(self, at_ms: NDArray[np.int64]) -> NDArray[np.int64]:
        week, within_ms = np.divmod(at_ms, WEEK_MS)
        hour, rest_ms = np.divmod(within_ms, HOUR_MS)
        begin_ms = self._passed_ms[hour]
        passed_ms = begin_ms + (self._passed_ms[hour + 1] - begin_ms) * (rest_ms / HOUR_MS)
        read: NDArray[np.int64] = week * WEEK_MS + passed_ms.astype(np.int64)
        return read


EVEN = Clock(np.ones(HOURS))


def pace_of(user: NDArray[np.int64], time_ms: NDArray[np.int64]) -> NDArray[np.float64]:
    """(168,) the pace of each hour of the week, from events: of each user, an hour with events counts once, however many there were."""
    hour = time_ms // HOUR_MS
    begins = np.r_[True, (np.diff(user) != 0) | (np.diff(hour) != 0)] if len(hour) else np.zeros(0, bool)
    visits_DH = np.bincount(hour[begins] % HOURS, minlength=HOURS).reshape(7, 24).astype(np.float64)
    total = visits_DH.sum()
    of_day_D1 = _shrunk(visits_DH.sum(1, keepdims=True), total / 7)
    of_hour_1H = _shrunk(visits_DH.sum(0, keepdims=True), total / 24)
    pace = ((visits_DH + SHRINKS * of_day_D1 * of_hour_1H) / (total / HOURS + SHRINKS)).reshape(-1)
    pace = np.clip(pace, SLOWEST, FASTEST)
    even: NDArray[np.float64] = pace / pace.mean()
    return even


def _shrunk(visits: NDArray[np.float64], even: float) -> NDArray[np.float64]:
    """Visits over what an even pace would have seen, drawn to 1."""
    shrunk: NDArray[np.float64] = (visits + SHRINKS) / (even + SHRINKS)
    return shrunk
