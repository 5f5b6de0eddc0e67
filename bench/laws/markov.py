"""Marked Markovian arrival processes of several hidden classes of users, and their exact filter.

A user has a class for life and a hidden state that moves. In state i, an event of type k that leads to state j comes at the rate
d[k, i, j] of the class, and a silent move to j at the rate d0[i, j]; the diagonal of d0 makes the rows of d0 + sum of d zero. Rates are
per day of a clock that may run faster at some hours and dates, alike for all users. An event may carry marks (item, category, value)
that depend on the state just before it; a law gives their likelihood.

With a (C, S) the joint distribution of class and state given all that was observed, t silent days of the clock turn each row into
a exp(d0 t), and an event of type k with marks of likelihood m into (a m) d[k]; then all is normalised. No event of a set A comes within t
with the probability a exp((d0 + sum of d[k] for k not in A) t) 1.

Axis letters: C classes, S states, K event types, N users or questions, T targets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bench.laws.case import Floats, Ints, Stream, day, moment_ms
from model.targets import ANY, Target

BLOCK_EVENTS = 60_000
"""Events whose users are filtered together."""
Likelihood = Callable[[Ints], Floats]
"""Of the marks of events, by their rows in the stream: (N, C, S), or (N, 1, S) where all classes are alike."""


@dataclass(frozen=True, slots=True)
class Process:
    """types: K names, of which the first is the type of everybody's first event. share: (C,); start: (S,) state at that event, which
    leaves it as it is. d0: (C, S, S); d: (C, K, S, S)."""

    types: tuple[str, ...]
    share: Floats
    start: Floats
    d0: Floats
    d: Floats


def process(
    types: tuple[str, ...],
    share: Sequence[float],
    start: Sequence[float],
    moves: Floats,
    rates: Floats,
    leads: Mapping[tuple[str, int], Floats],
) -> Process:
    """moves: (C, S, S) rates of silent moves. rates: (C, S, K) of events. leads: where an event of a type in a state leads to, (S,)
    probabilities; one that is not named there changes nothing."""
    states = rates.shape[1]
    d = np.einsum("csk,st->ckst", rates, np.eye(states))
    for (name, state), after in leads.items():
        kind = types.index(name)
        d[:, kind, state] = rates[:, state, kind, None] * after
    d0 = moves * (1 - np.eye(states))
    d0 = d0 - np.einsum("cs,st->cst", d0.sum(2) + rates.sum(2), np.eye(states))
    return Process(types, np.asarray(share, np.float64), np.asarray(start, np.float64), d0, d)


@dataclass(frozen=True, slots=True)
class Clock:
    """The clock's days at days of the calendar, linear between them. Both rise."""

    calendar: Floats
    shown: Floats

    def at(self, days: Floats) -> Floats:
        return np.interp(days, self.calendar, self.shown)

    def when(self, shown: Floats) -> Floats:
        return np.interp(shown, self.shown, self.calendar)


STEADY = Clock(np.array([0.0, 10_000.0]), np.array([0.0, 10_000.0]))


@dataclass(frozen=True, slots=True)
class Path:
    """E events sorted by user and time. day: of the calendar; state: just before the event; of_class: (U,)."""

    user: Ints
    day: Floats
    type: Ints
    state: Ints
    of_class: Ints


def simulate(law: Process, clock: Clock, join: Floats, end: float, rng: np.random.Generator) -> Path:
    """All users take their next jump, silent or not, together. join: (U,) days of the first events; end: the day of the last."""
    kinds, states = law.d.shape[1:3]
    of_class = rng.choice(len(law.share), len(join), p=law.share)
    silent = law.d0 * (1 - np.eye(states))
    jumps = np.concatenate([silent[:, None], law.d], axis=1).transpose(0, 2, 1, 3).reshape(len(law.share), states, -1)
    total = jumps.sum(-1)
    cumulative = np.cumsum(jumps, -1) / np.maximum(total, 1e-300)[..., None]
    user, shown = np.arange(len(join)), clock.at(join)
    state = rng.choice(states, len(join), p=law.start)
    found = [(user, shown, np.zeros(len(join), np.int64), state)]
    while len(user):
        rate = total[of_class[user], state]
        shown = shown + rng.exponential(size=len(user)) / np.maximum(rate, 1e-300)
        going = shown < clock.at(np.array(end))
        user, shown, state = user[going], shown[going], state[going]
        jump = (rng.random(len(user))[:, None] > cumulative[of_class[user], state]).sum(1)
        kind, after = np.divmod(np.minimum(jump, (kinds + 1) * states - 1), states)
        event = kind > 0
        found.append((user[event], shown[event], kind[event] - 1, state[event]))
        state = after
    user, shown, kind, state = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.lexsort((shown, user))
    return Path(user[order], clock.when(shown[order]), kind[order], state[order], of_class)


def kept(rng: np.random.Generator, user: Ints, keeps: Floats, fresh: Ints) -> Ints:
    """A mark (E,) that an event takes over from the one before it with the probability `keeps` (E,), and else is `fresh` (E,)."""
    first = np.r_[True, user[1:] != user[:-1]]
    again = (rng.random(len(user)) < keeps) & ~first
    return fresh[np.maximum.accumulate(np.where(again, -1, np.arange(len(user))))]


class Silence:
    """exp(generator * t) of each class (C, S, S), for many t at once, by eigenvectors."""

    def __init__(self, generator: Floats) -> None:
        self._values, self._vectors = np.linalg.eig(generator)
        self._inverse = np.linalg.inv(self._vectors)
        rebuilt = (self._vectors * self._values[:, None]) @ self._inverse
        assert np.allclose(rebuilt, generator, atol=1e-8 * np.abs(generator).max()), "not diagonalisable: vary a rate a little"

    def after(self, rows_CNS: Floats, days_N: Floats) -> Floats:
        spectral = (rows_CNS @ self._vectors) * np.exp(self._values[:, None] * days_N[:, None])
        rows: Floats = np.maximum((spectral @ self._inverse).real, 0)
        return rows

    def lasts(self, rows_CNS: Floats, days_N: Floats) -> Floats:
        """(N,) probability that it lasts so long."""
        spectral = (rows_CNS @ self._vectors) * np.exp(self._values[:, None] * days_N[:, None])
        chance: Floats = np.clip(np.einsum("cns,cs->n", spectral, self._inverse.sum(2)).real, 0, 1)
        return chance


class Filter:
    """The exact posterior of a stream's users at any moments."""

    def __init__(self, law: Process, clock: Clock, stream: Stream, likelihood: Likelihood | None = None) -> None:
        self._law, self._clock, self._stream, self._likelihood = law, clock, stream, likelihood
        self._silence = Silence(law.d0)
        self._shown = clock.at(day(stream.time_ms))

    def answers(self, user: Ints, at_ms: Ints, targets: Sequence[Target]) -> Floats:
        """(N, T), each from the user's events strictly before the moment."""
        row = self._stream.last_before(user, at_ms)
        assert (row >= 0).all(), "a user is asked about before the first event"
        needed = np.zeros(self._stream.users, np.int64)
        np.maximum.at(needed, user, row + 1 - self._stream.first[user])
        by_count = np.argsort(needed, kind="stable")[::-1]
        by_count = by_count[needed[by_count] > 0]
        block = np.zeros(self._stream.users, np.int64) - 1
        block[by_count] = np.cumsum(needed[by_count]) // BLOCK_EVENTS
        without = [Silence(self._law.d0 + self._law.d[:, ~_of_set(self._law.types, t)].sum(1)) for t in targets]
        shown = self._clock.at(day(at_ms))
        out = np.empty((len(user), len(targets)))
        for b in np.unique(block[user]):
            asked = np.flatnonzero(block[user] == b)
            belief_CNS = self._belief(by_count[block[by_count] == b], needed, row[asked])
            belief_CNS = _normalised(self._silence.after(belief_CNS, shown[asked] - self._shown[row[asked]]))
            for i, (target, silence) in enumerate(zip(targets, without, strict=True)):
                longer = self._clock.at(day(at_ms[asked] + target.horizon_ms)) - shown[asked]
                absent = silence.lasts(belief_CNS, longer)
                out[asked, i] = absent if target.outcome == "absent" else 1 - absent
        return out

    def _belief(self, users: Ints, needed: Ints, rows: Ints) -> Floats:
        """(C, N, S) just after each of N events. users: with the most events first."""
        law, stream = self._law, self._stream
        place = np.full(stream.users, -1)
        place[users] = np.arange(len(users))
        begin = stream.first[users]
        rank = rows - stream.first[stream.user[rows]]
        order = np.argsort(rank, kind="stable")
        bounds = np.searchsorted(rank[order], np.arange(needed[users[0]] + 1))
        out = np.empty((len(law.share), len(rows), len(law.start)))
        now_CNS = np.tile((law.share[:, None] * law.start)[:, None], (1, len(users), 1))
        for r in range(needed[users[0]]):
            going = int(np.searchsorted(-needed[users], -r))
            event, part = begin[:going] + r, now_CNS[:, :going]
            if r:
                part = self._silence.after(part, self._shown[event] - self._shown[event - 1])
            if self._likelihood is not None:
                part = part * self._likelihood(event).transpose(1, 0, 2)
            if r:
                part = self._step(part, stream.type[event])
            now_CNS[:, :going] = _normalised(part)
            due = order[bounds[r] : bounds[r + 1]]
            out[:, due] = now_CNS[:, place[stream.user[rows[due]]]]
        return out

    def _step(self, part_CNS: Floats, kind_N: Ints) -> Floats:
        out = np.empty_like(part_CNS)
        for kind in np.unique(kind_N):
            chosen = kind_N == kind
            out[:, chosen] = part_CNS[:, chosen] @ self._law.d[:, kind]
        return out


def _of_set(types: tuple[str, ...], target: Target) -> NDArray[np.bool_]:
    """(K,) the types that a target speaks of."""
    return np.array([ANY in target.types or name in target.types for name in types])


def _normalised(rows_CNS: Floats) -> Floats:
    rows: Floats = rows_CNS / rows_CNS.sum((0, 2))[None, :, None]
    return rows


def stream_of(law: Process, path: Path, users: int, item: Ints, category: Ints, value: Floats) -> Stream:
    """A path as whole milliseconds."""
    return Stream(users, law.types, path.user, moment_ms(path.day), path.type, item, category, value)
