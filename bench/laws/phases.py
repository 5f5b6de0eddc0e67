"""A shop of another kind than the demo's: 18 hidden classes, phases of intent, a daily and weekly rhythm that all share.

Intent is semi-Markov, written in phases so that all is exact: dormant (short or long), browsing, considering and buying in two stages
each, support, dead. Classes: activity x propensity to purchase x hazard of death. An event's category is the one before it more often
when somebody means to buy; what a purchase costs tells the class. Rates are those of a clock that follows the hour and the weekday.
"""

from __future__ import annotations

import itertools

import numpy as np

from bench.laws.case import Floats, Ints, Law, Stream, targets
from bench.laws.markov import Clock, Filter, Process, kept, process, simulate, stream_of

TYPES = ("view", "search", "cart", "purchase", "support")
PURCHASE = TYPES.index("purchase")
STATES = 10
SHORT, LONG, BROWSE_1, BROWSE_2, CONSIDER_1, CONSIDER_2, BUY_1, BUY_2, SUPPORT, DEAD = range(STATES)
ACTIVITY, PROPENSITY, DEATH = ((0.4, 0.35), (1.0, 0.45), (2.2, 0.2)), ((0.3, 0.4), (1.0, 0.4), (2.0, 0.2)), ((0.002, 0.6), (0.015, 0.4))
"""(value, share) each; deaths a day while dormant."""
CLASSES = tuple(itertools.product(ACTIVITY, PROPENSITY, DEATH))
KEEPS = np.array([0.1, 0.1, 0.15, 0.15, 0.75, 0.75, 0.85, 0.85, 0.5, 0.0])
"""Probability that the category is that of the event before, by state."""
CATEGORIES = 8
POPULAR = (1 / np.arange(1, CATEGORIES + 1)) / (1 / np.arange(1, CATEGORIES + 1)).sum()
LOG_PRICE = np.array([2.8 + 0.4 * PROPENSITY.index(p) for _, p, _ in CLASSES])
SPREAD = 0.6
JOIN_DAYS, DAYS = 120, 180
HOURS = np.array([25, 15, 10, 8, 8, 12, 30, 60, 80, 90, 100, 110, 120, 110, 100, 100, 110, 130, 160, 200, 220, 210, 150, 70])


def _clock() -> Clock:
    """A week of it lasts a week."""
    week = np.concatenate([HOURS * (1.3 if weekday >= 5 else 1.0) for weekday in range(7)])
    hours = np.tile(week / week.mean(), 60)
    return Clock(np.arange(len(hours) + 1) / 24, np.r_[0, np.cumsum(hours) / 24])


def _law() -> Process:
    moves, rates = np.zeros((len(CLASSES), STATES, STATES)), np.zeros((len(CLASSES), STATES, len(TYPES)))
    for c, ((activity, _), (propensity, _), (death, _)) in enumerate(CLASSES):
        for dormant, mean_days in ((SHORT, 2.5), (LONG, 18.0)):
            moves[c, dormant, [BROWSE_1, CONSIDER_1]] = np.array([0.8, 0.2]) * activity / mean_days
            moves[c, dormant, DEAD] = death
        moves[c, BROWSE_1, BROWSE_2] = 2 / 0.6
        moves[c, BROWSE_2, [SHORT, LONG, CONSIDER_1]] = np.array([0.35, 0.3, 0.35]) * 2 / 0.6
        moves[c, CONSIDER_1, CONSIDER_2] = 2 / 1.2
        buys = min(0.9, 0.3 * propensity)
        rest = 1 - buys
        moves[c, CONSIDER_2, [BUY_1, BROWSE_1, SHORT, LONG]] = np.array([buys, 0.3 * rest, 0.4 * rest, 0.3 * rest]) * 2 / 1.2
        moves[c, BUY_1, BUY_2] = 2 / 0.5
        moves[c, BUY_2, [CONSIDER_1, SHORT, LONG]] = np.array([0.25, 0.35, 0.4]) * 2 / 0.5
        moves[c, SUPPORT, [SHORT, LONG, BROWSE_1, DEAD]] = np.array([0.3, 0.45, 0.12, 0.13]) / 0.7
        rates[c, [SHORT, LONG]] = [0.04, 0.01, 0.001, 0.0005, 0.002]
        rates[c, [BROWSE_1, BROWSE_2]] = [4, 2, 0.15, 0.01, 0.02]
        rates[c, [CONSIDER_1, CONSIDER_2]] = [5, 3, 0.8, 0.05, 0.05]
        rates[c, [BUY_1, BUY_2]] = [4, 0.7, 3, 1.8 * propensity**0.5, 0.05]
        rates[c, SUPPORT] = [0.8, 0.1, 0, 0, 3]
        rates[c] *= activity**0.5
    leads = {}
    for state in (CONSIDER_1, CONSIDER_2):  # a cart may turn thoughts into a purchase
        leads["cart", state] = 0.7 * np.eye(STATES)[state] + 0.3 * np.eye(STATES)[BUY_1]
    after = np.zeros(STATES)
    after[[LONG, SHORT, BROWSE_1, SUPPORT, BUY_1]] = 0.5, 0.25, 0.1, 0.1, 0.05
    leads |= {("purchase", state): after for state in range(STATES)}
    share = [a * p * d for (_, a), (_, p), (_, d) in CLASSES]
    return process(TYPES, share, np.eye(STATES)[BROWSE_1].tolist(), moves, rates, leads)


LAW_OF_USERS, CLOCK = _law(), _clock()


def _simulate(users: int, seed: int) -> Stream:
    rng = np.random.default_rng(seed)
    join = np.where(rng.random(users) < 0.2, rng.uniform(0, 7, users), rng.uniform(0, JOIN_DAYS, users))
    path = simulate(LAW_OF_USERS, CLOCK, join, DAYS, rng)
    category = kept(rng, path.user, KEEPS[path.state], rng.choice(CATEGORIES, len(path.user), p=POPULAR))
    price = np.exp(LOG_PRICE[path.of_class[path.user]] + SPREAD * rng.standard_normal(len(path.user)))
    value = np.where(path.type == PURCHASE, price, 0.0)  # the field is there with every event, as in many files
    return stream_of(LAW_OF_USERS, path, users, np.full(len(path.user), -1), category, value)


def _answers(stream: Stream, user: Ints, at_ms: Ints) -> Floats:
    def likelihood(row: Ints) -> Floats:
        same = (stream.category[row] == stream.category[row - 1]) & (stream.user[row] == stream.user[row - 1])
        of_state = KEEPS * same[:, None] + (1 - KEEPS) * POPULAR[stream.category[row], None]
        bought = stream.type[row] == PURCHASE
        distance = (np.log(np.where(bought, stream.value[row], 1.0))[:, None] - LOG_PRICE) / SPREAD
        of_class = np.where(bought[:, None], np.exp(-0.5 * distance**2), 1.0)
        first = row == stream.first[stream.user[row]]
        return np.where(first[:, None, None], 1.0, of_state[:, None] * of_class[:, :, None])

    return Filter(LAW_OF_USERS, CLOCK, stream, likelihood).answers(user, at_ms, LAW.targets)


LAW = Law(
    "phases",
    "Eighteen hidden classes and phases of intent under a daily and weekly clock; users active in the last 14 days.",
    targets("purchase=purchase:occurs:7d", "silent=*:absent:30d"),
    until_day=120,
    days=DAYS,
    simulate=_simulate,
    answers=_answers,
    most_users=8000,
    active_days=14,
)
