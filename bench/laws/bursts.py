"""Long sessions of a player: hundreds of events a user, minutes apart, then days without any."""

from __future__ import annotations

import itertools

import numpy as np

from bench.laws.case import Floats, Ints, Law, Stream, targets
from bench.laws.markov import STEADY, Filter, Process, process, simulate, stream_of

TYPES = ("play", "skip", "like", "purchase")
STATES = 4
AWAY, SKIM, DEEP, GONE = range(STATES)
VISITS, FANS = ((0.35, 0.004, 0.25), (0.12, 0.01, 0.4), (0.04, 0.02, 0.35)), ((0.4, 0.6), (2.5, 0.4))
"""(sessions a day, chance a day to leave for good, share) and (appetite to buy, share)."""
CLASSES = tuple(itertools.product(VISITS, FANS))
JOIN_DAYS, DAYS = 60, 120
ITEMS, CATEGORIES = 300, 10


def _law() -> Process:
    moves, rates = np.zeros((len(CLASSES), STATES, STATES)), np.zeros((len(CLASSES), STATES, len(TYPES)))
    for c, ((visits, leaves, _), (appetite, _)) in enumerate(CLASSES):
        moves[c, AWAY, [SKIM, GONE]] = visits, leaves
        moves[c, SKIM, [AWAY, DEEP]] = 30, 20
        moves[c, DEEP, [AWAY, SKIM]] = 8, 4
        rates[c, SKIM] = 250, 350, 5, 0.1
        rates[c, DEEP] = 400, 40, 20 + 10 * appetite, 1.5 * appetite
    share = [v * f for (_, _, v), (_, f) in CLASSES]
    return process(TYPES, share, np.eye(STATES)[SKIM].tolist(), moves, rates, {("purchase", DEEP): np.eye(STATES)[SKIM]})


LAW_OF_USERS = _law()


def _simulate(users: int, seed: int) -> Stream:
    rng = np.random.default_rng(seed)
    path = simulate(LAW_OF_USERS, STEADY, rng.uniform(0, JOIN_DAYS, users), DAYS, rng)
    item = np.minimum(rng.geometric(0.02, len(path.user)) - 1, ITEMS - 1)
    value = np.where(path.type == TYPES.index("purchase"), np.exp(rng.normal(2, 0.5, len(path.user))), np.nan)
    return stream_of(LAW_OF_USERS, path, users, item, item % CATEGORIES, value)


def _answers(stream: Stream, user: Ints, at_ms: Ints) -> Floats:
    return Filter(LAW_OF_USERS, STEADY, stream).answers(user, at_ms, LAW.targets)


LAW = Law(
    "bursts",
    "Long sessions, hundreds of events a user: what matters for the coming week is a few facts behind many events.",
    targets("purchase=purchase:occurs:7d", "away=*:absent:3d"),
    until_day=80,
    days=DAYS,
    simulate=_simulate,
    answers=_answers,
    most_users=2000,
)
