"""Regular rhythms: a weekly shop, a monthly subscription. Each user has a period and a jitter; some skip, some leave.

An occasion is one or more lines at one moment. A third of the users come from a file that knows days only: their events are at midnight,
and the gaps between them whole days.
"""

from __future__ import annotations

import itertools

import numpy as np

from bench.laws import renewal
from bench.laws.case import Floats, Ints, Law, Stream, moment_ms, targets
from bench.laws.renewal import Habit
from model.hazards import DAY_MS

PERIODS = ((7.0, 0.35), (10.0, 0.1), (14.0, 0.15), (21.0, 0.1), (28.0, 0.1), (30.44, 0.2))
JITTERS = ((0.04, 0.5), (0.15, 0.5))
"""Standard deviation, as a share of the period."""
SKIPS = ((0.03, 0.5), (0.3, 0.5))
QUITS = ((0.01, 0.6), (0.08, 0.4))
"""(value, share) each; chances at each occasion."""
MOST_SKIPPED = 6
"""Periods in a gap."""
DAYS_ONLY = 0.33
JOIN_DAYS, DAYS = 150, 255


def _normal(x: Floats) -> Floats:
    from scipy.special import ndtr

    return np.asarray(ndtr(x))


def _habit(period: float, jitter: float, skips: float, quits: float, share: float, whole: bool) -> Habit:
    """A gap is m periods with the probability skips^(m - 1), with a normal error that grows with the root of m."""
    m = np.arange(1, MOST_SKIPPED + 1)
    weight = skips ** (m - 1.0)
    weight /= weight.sum()
    mean, deviation = m * period, jitter * period * np.sqrt(m)

    def above(x: Floats) -> Floats:
        """P(error-free time >= x) before any rounding."""
        return np.asarray((weight * _normal((mean - x[..., None]) / deviation)).sum(-1))

    def density(x: Floats) -> Floats:
        if whole:  # the chance of so many days
            return np.where(np.abs(x - np.round(x)) < 1e-6, above(x - 0.5) - above(x + 0.5), 0.0)
        z = (x[..., None] - mean) / deviation
        return np.asarray((weight * np.exp(-0.5 * z**2) / (deviation * np.sqrt(2 * np.pi))).sum(-1))

    def survival(x: Floats) -> Floats:
        return above(np.ceil(x - 1e-9) - 0.5) if whole else above(x)

    def draw(rng: np.random.Generator, n: int) -> Floats:
        i = rng.choice(len(m), n, p=weight)
        gap = mean[i] + deviation[i] * rng.standard_normal(n)
        return np.round(gap) if whole else gap

    return Habit(share, quits, density, survival, draw)


def _habits() -> list[Habit]:
    """Those with times first, then the same with days only."""
    found = []
    for whole in (False, True):
        for (p, a), (j, b), (s, c), (q, d) in itertools.product(PERIODS, JITTERS, SKIPS, QUITS):
            found.append(_habit(p, j, s, q, a * b * c * d, whole))
    return found


def _simulate(users: int, seed: int) -> Stream:
    rng, habits = np.random.default_rng(seed), _habits()
    half = len(habits) // 2
    whole = rng.random(users) < DAYS_ONLY
    of_class = rng.choice(half, users, p=[h.share for h in habits[:half]]) + half * whole
    join = rng.uniform(0, JOIN_DAYS, users)
    user, days = renewal.simulate(habits, of_class, np.where(whole, np.floor(join), join), DAYS, rng)
    lines = 1 + rng.poisson(0.6, len(user))
    user, time_ms = np.repeat(user, lines), np.repeat(moment_ms(days), lines)
    none = np.full(len(user), -1)
    category = rng.integers(0, 6, len(user))
    return Stream(users, ("order",), user, time_ms, np.zeros(len(user), np.int64), none, category, np.exp(rng.normal(2, 0.7, len(user))))


def _answers(stream: Stream, user: Ints, at_ms: Ints) -> Floats:
    habits = _habits()
    half = len(habits) // 2
    share = np.array([h.share for h in habits])
    whole = stream.time_ms[np.minimum(stream.first[:-1], len(stream) - 1)] % DAY_MS == 0
    own = (np.arange(len(habits)) >= half) == whole[:, None]
    return renewal.answers(habits, share * own, stream, user, at_ms, LAW.targets)


LAW = Law(
    "rhythm",
    "Regular rhythms: a period for each user, jitter, some skip, some leave; a third of the users have dates without times.",
    targets("order=order:occurs:7d", "churn=*:absent:45d"),
    until_day=180,
    days=DAYS,
    simulate=_simulate,
    answers=_answers,
    pareto=True,
)
