"""Buyers with rates for life: Pareto/NBD. Orders come at a rate of each user's own until a death at a rate of each user's own.

Both rates are gamma-distributed. See `trainer.pareto`: no further order within h after x orders, the last at t_x of T, is the same
statement about a longer watch, so its probability is L(x, t_x, T + h) / L(x, t_x, T).
"""

from __future__ import annotations

import numpy as np

from bench.laws.case import Floats, Ints, Law, Stream, moment_ms, targets
from model.hazards import DAY_MS
from trainer.pareto import log_likelihood

RATE = (1.0, 12.0)
DEATH = (1.0, 80.0)
"""Shape, and days by which the gamma is scaled."""
JOIN_DAYS, DAYS = 200, 330


def _simulate(users: int, seed: int) -> Stream:
    rng = np.random.default_rng(seed)
    join = rng.uniform(0, JOIN_DAYS, users)
    rate, death = rng.gamma(RATE[0], 1 / RATE[1], users), rng.gamma(DEATH[0], 1 / DEATH[1], users)
    alive = np.minimum(rng.exponential(size=users) / death, DAYS - join)
    orders = rng.poisson(rate * alive)
    user = np.r_[np.arange(users), np.repeat(np.arange(users), orders)]
    days = np.r_[join, join[user[users:]] + alive[user[users:]] * rng.random(orders.sum())]
    order = np.lexsort((days, user))
    user, days = user[order], days[order]
    none, zero = np.full(len(user), -1), np.zeros(len(user), np.int64)
    return Stream(users, ("order",), user, moment_ms(days), zero, none, none, np.exp(rng.normal(3, 0.5, len(user))))


def _answers(stream: Stream, user: Ints, at_ms: Ints) -> Floats:
    first, row = stream.first[user], stream.last_before(user, at_ms)
    x, last, age = (row - first).astype(np.float64), stream.time_ms[row] - stream.time_ms[first], at_ms - stream.time_ms[first]
    parameters = np.array([*RATE, *DEATH])
    known = log_likelihood(parameters, x, last / DAY_MS, age / DAY_MS)
    out = np.empty((len(user), len(LAW.targets)))
    for i, target in enumerate(LAW.targets):
        longer = log_likelihood(parameters, x, last / DAY_MS, (age + target.horizon_ms) / DAY_MS)
        none = np.exp(np.minimum(longer - known, 0.0))
        out[:, i] = none if target.outcome == "absent" else 1 - none
    return out


LAW = Law(
    "lifelong",
    "Buyers with rates for life (Pareto/NBD): the number of orders, the last one and the age say all.",
    targets("order=order:occurs:14d", "churn=*:absent:60d"),
    until_day=220,
    days=DAYS,
    simulate=_simulate,
    answers=_answers,
    pareto=True,
)
