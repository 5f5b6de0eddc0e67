"""Rates that drift and a calendar peak: fewer orders a visit as time goes on, weekends, and one sale some weeks before `until`.

A user visits at lambda v(t) and orders at lambda phi o(t), with v and o the same for all. lambda is gamma-distributed, so the answers
are exact in closed form; phi, the appetite to order, is one of three. The filter knows v and o, also after `until`.
"""

from __future__ import annotations

import numpy as np

from bench.laws.case import Floats, Ints, Law, Stream, day, moment_ms, targets
from bench.laws.markov import Clock

SHAPE, MEAN_RATE = 0.9, 0.22
APPETITE, SHARES = np.array([0.04, 0.15, 0.45]), np.array([0.4, 0.4, 0.2])
WEEK = np.array([0.8, 0.8, 0.85, 0.9, 1.1, 1.45, 1.1])
SALE_DAYS = (93, 98)
JOIN_DAYS, DAYS = 110, 180


def _clock(drift: float, sale: float) -> Clock:
    """drift: change of the rate's logarithm a day; sale: its factor in those days."""
    dates = np.arange(DAYS + 1)
    rate = WEEK[dates % 7] * np.exp(drift * dates) * np.where((dates >= SALE_DAYS[0]) & (dates < SALE_DAYS[1]), sale, 1.0)
    return Clock(np.arange(DAYS + 2.0), np.r_[0, np.cumsum(rate)])


VISITS, ORDERS = _clock(-0.002, 2.5), _clock(-0.007, 6.0)


def _simulate(users: int, seed: int) -> Stream:
    rng = np.random.default_rng(seed)
    join = rng.uniform(0, JOIN_DAYS, users)
    rate = rng.gamma(SHAPE, MEAN_RATE / SHAPE, users)
    appetite = APPETITE[rng.choice(len(APPETITE), users, p=SHARES)]
    parts = [(np.arange(users), join, np.zeros(users, np.int64))]
    for code, (clock, own) in enumerate(((VISITS, rate), (ORDERS, rate * appetite))):
        begin, end = clock.at(join), clock.at(np.array(float(DAYS)))
        count = rng.poisson(own * (end - begin))
        who = np.repeat(np.arange(users), count)
        when = clock.when(begin[who] + rng.random(len(who)) * (end - begin)[who])
        parts.append((who, when, np.full(len(who), code)))
    user, days, kind = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.lexsort((days, user))
    user, days, kind = user[order], days[order], kind[order]
    none = np.full(len(user), -1)
    value = np.where(kind == 1, np.exp(rng.normal(3, 0.5, len(user))), np.nan)
    return Stream(users, ("visit", "order"), user, moment_ms(days), kind, none, rng.integers(0, 6, len(user)), value)


def _answers(stream: Stream, user: Ints, at_ms: Ints) -> Floats:
    first, row = stream.first[user], stream.last_before(user, at_ms)
    count = np.r_[0, np.cumsum(stream.type == 1)]
    orders = count[row + 1] - count[first]
    events = row - first  # beyond the first, which comes to everybody
    begin, now = day(stream.time_ms[first]), day(at_ms)

    def exposure(start: Floats, end: Floats) -> tuple[Floats, Floats]:
        """(visits, orders) that a rate of 1 would bring, the latter (Q, 3) by appetite."""
        return VISITS.at(end) - VISITS.at(start), (ORDERS.at(end) - ORDERS.at(start))[:, None] * APPETITE

    visited, ordered = exposure(begin, now)
    shape, scale = (SHAPE + events)[:, None], SHAPE / MEAN_RATE + visited[:, None] + ordered
    log_weight = np.log(SHARES) + orders[:, None] * np.log(APPETITE) - shape * np.log(scale)
    weight = np.exp(log_weight - log_weight.max(1, keepdims=True))
    weight /= weight.sum(1, keepdims=True)
    out = np.empty((len(user), len(LAW.targets)))
    for i, target in enumerate(LAW.targets):
        visits, of_orders = exposure(now, day(at_ms + target.horizon_ms))
        watched = of_orders if target.types == ("order",) else visits[:, None] + of_orders
        absent = (weight * (scale / (scale + watched)) ** shape).sum(1)
        out[:, i] = absent if target.outcome == "absent" else 1 - absent
    return out


LAW = Law(
    "season",
    "Rates that drift, weekends and a sale: what held before `until` is not what holds after it.",
    targets("order=order:occurs:7d", "silent=*:absent:14d"),
    until_day=120,
    days=DAYS,
    simulate=_simulate,
    answers=_answers,
)
