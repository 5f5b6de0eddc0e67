"""Renewal processes of several hidden classes of users, and their exact filter. One event type.

After each event a user of a class leaves for good with the probability `quits`; otherwise the next event comes after a gap with the
density f and the survival S of the class. So a silence of x days has the probability S*(x) = quits + (1 - quits) S(x), and a user's
history says all that it can through each class's likelihood: its share, times (1 - quits) f(gap) for each gap, times S*(silence).
No event comes within h of a silence x with the probability S*(x + h) / S*(x), averaged over the classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from bench.laws.case import Floats, Ints, Stream
from model.hazards import DAY_MS
from model.targets import Target

Gaps = Callable[[np.random.Generator, int], Floats]
TINY = 1e-300


@dataclass(frozen=True, slots=True)
class Habit:
    """A class. density(x), survival(x): of a gap of x days, the latter P(gap >= x). draw(rng, n): n gaps."""

    share: float
    quits: float
    density: Callable[[Floats], Floats]
    survival: Callable[[Floats], Floats]
    draw: Gaps

    def silent(self, days: Floats) -> Floats:
        return self.quits + (1 - self.quits) * self.survival(days)


def simulate(habits: Sequence[Habit], of_class: Ints, join: Floats, end: float, rng: np.random.Generator) -> tuple[Ints, Floats]:
    """(user, day) of all events before `end`, sorted by both. of_class, join: (U,)."""
    user, now = np.arange(len(join)), join
    found = [(user, now)]
    while len(user):
        gap = np.empty(len(user))
        for c, habit in enumerate(habits):
            own = np.flatnonzero(of_class[user] == c)
            gap[own] = np.where(rng.random(len(own)) < habit.quits, np.inf, habit.draw(rng, len(own)))
        going = now + gap < end
        user, now = user[going], (now + gap)[going]
        found.append((user, now))
    user, now = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.lexsort((now, user))
    return user[order], now[order]


def answers(habits: Sequence[Habit], shares_UC: Floats, stream: Stream, user: Ints, at_ms: Ints, targets: Sequence[Target]) -> Floats:
    """(Q, T) exact probabilities from the events strictly before each moment; several events at one moment count once.

    shares_UC: each user's prior over the classes. A target speaks of any event.
    """
    fresh = np.r_[True, (np.diff(stream.user) != 0) | (np.diff(stream.time_ms) != 0)]
    visits = stream.where(fresh)
    gap = np.r_[0, np.diff(visits.time_ms)] / DAY_MS
    later = np.r_[False, np.diff(visits.user) == 0]
    row = visits.last_before(user, at_ms)
    silence = (at_ms - visits.time_ms[row]) / DAY_MS
    posterior = np.empty((len(user), len(habits)))
    for c, habit in enumerate(habits):
        log_density = np.log(np.maximum((1 - habit.quits) * habit.density(gap), TINY))
        total = np.cumsum(np.where(later, log_density, 0.0))
        since_first = total[row] - total[visits.first[user]]
        posterior[:, c] = since_first + np.log(np.maximum(habit.silent(silence), TINY)) + np.log(np.maximum(shares_UC[user, c], TINY))
    posterior = np.exp(posterior - posterior.max(1, keepdims=True))
    posterior /= posterior.sum(1, keepdims=True)
    out = np.empty((len(user), len(targets)))
    for i, target in enumerate(targets):
        longer = silence + target.horizon_ms / DAY_MS
        lasts = np.stack([h.silent(longer) / np.maximum(h.silent(silence), TINY) for h in habits], axis=1)
        absent = (posterior * lasts).sum(1)
        out[:, i] = absent if target.outcome == "absent" else 1 - absent
    return np.clip(out, 0, 1)
