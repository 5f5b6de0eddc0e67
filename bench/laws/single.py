"""One event type and about three events a user: one-off buyers, regular ones, and those who come in bursts."""

from __future__ import annotations

import numpy as np

from bench.laws import renewal
from bench.laws.case import Floats, Ints, Law, Stream, moment_ms, targets
from bench.laws.renewal import Habit

JOIN_DAYS, DAYS = 110, 180


def _gamma(share: float, quits: float, shape: float, mean_days: float) -> Habit:
    from scipy.special import gammaincc, gammaln

    scale = mean_days / shape

    def density(x: Floats) -> Floats:
        x = np.maximum(x, 1e-9)
        return np.asarray(np.exp((shape - 1) * np.log(x / scale) - x / scale - gammaln(shape)) / scale)

    def survival(x: Floats) -> Floats:
        return np.asarray(gammaincc(shape, x / scale))

    return Habit(share, quits, density, survival, lambda rng, n: rng.gamma(shape, scale, n))


def _habits() -> list[Habit]:
    return [_gamma(0.4, 0.8, 1.0, 40), _gamma(0.35, 0.12, 4.0, 35), _gamma(0.25, 0.2, 0.6, 20)]


def _simulate(users: int, seed: int) -> Stream:
    rng, habits = np.random.default_rng(seed), _habits()
    of_class = rng.choice(len(habits), users, p=[h.share for h in habits])
    user, days = renewal.simulate(habits, of_class, rng.uniform(0, JOIN_DAYS, users), DAYS, rng)
    none, zero = np.full(len(user), -1), np.zeros(len(user), np.int64)
    return Stream(users, ("order",), user, moment_ms(days), zero, none, none, np.exp(rng.normal(3, 0.5, len(user))))


def _answers(stream: Stream, user: Ints, at_ms: Ints) -> Floats:
    habits = _habits()
    shares_UC = np.tile([h.share for h in habits], (stream.users, 1))
    return renewal.answers(habits, shares_UC, stream, user, at_ms, LAW.targets)


LAW = Law(
    "single",
    "One event type, about three events a user: little to learn from, and much that is silence.",
    targets("order=order:occurs:14d", "churn=*:absent:30d"),
    until_day=120,
    days=DAYS,
    simulate=_simulate,
    answers=_answers,
    pareto=True,
)
