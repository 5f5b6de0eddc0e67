"""Intent that shows in what is looked at, and in nothing else: all moods view at the same rate, and there is one type beside the order.

Somebody who decides returns to one item, in fewer categories, at higher values; somebody who is bored reads the help pages and leaves.
"""

from __future__ import annotations

import numpy as np

from bench.laws.case import Floats, Ints, Law, Stream, targets
from bench.laws.markov import STEADY, Filter, Process, kept, process, simulate, stream_of

TYPES = ("view", "order")
STATES = 5
CASUAL, HUNTING, DECIDED, BORED, GONE = range(STATES)
ACTIVITY, SHARES = (0.12, 0.3, 0.6), (0.35, 0.4, 0.25)
KEEPS = np.array([0.03, 0.25, 0.7, 0.03, 0.0])
"""Probability that the item is that of the event before, by state."""
CATEGORY = np.array(
    [
        [0.30, 0.20, 0.15, 0.12, 0.09, 0.06, 0.05, 0.03],
        [0.05, 0.07, 0.10, 0.15, 0.28, 0.28, 0.05, 0.02],
        [0.03, 0.04, 0.08, 0.25, 0.30, 0.25, 0.04, 0.01],
        [0.15, 0.10, 0.06, 0.05, 0.04, 0.03, 0.22, 0.35],
        [0.125] * 8,
    ]
)
"""Probability of each category of an item newly looked at, by state."""
ITEMS = 40
"""Of a category."""
LOG_VALUE, SPREAD = np.array([2.4, 2.9, 3.3, 2.2, 2.4]), 0.6
JOIN_DAYS, DAYS = 110, 170


def _law() -> Process:
    moves, rates = np.zeros((len(ACTIVITY), STATES, STATES)), np.zeros((len(ACTIVITY), STATES, len(TYPES)))
    for c, activity in enumerate(ACTIVITY):
        moves[c, CASUAL, [HUNTING, BORED]] = 0.06, 0.02
        moves[c, HUNTING, [CASUAL, DECIDED]] = 0.1, 0.1
        moves[c, DECIDED, CASUAL] = 0.05
        moves[c, BORED, [CASUAL, GONE]] = 0.05, 0.07
        rates[c, :GONE, TYPES.index("view")] = activity
        rates[c, :GONE, TYPES.index("order")] = 0.003, 0.01, 0.18, 0.001
    leads = {("order", state): np.eye(STATES)[CASUAL] for state in (HUNTING, DECIDED, BORED)}
    return process(TYPES, SHARES, (0.7, 0.2, 0.05, 0.05, 0), moves, rates, leads)


LAW_OF_USERS = _law()


def _simulate(users: int, seed: int) -> Stream:
    rng = np.random.default_rng(seed)
    path = simulate(LAW_OF_USERS, STEADY, rng.uniform(0, JOIN_DAYS, users), DAYS, rng)
    category = (rng.random(len(path.user))[:, None] > np.cumsum(CATEGORY, 1)[path.state, :-1]).sum(1)
    item = kept(rng, path.user, KEEPS[path.state], category * ITEMS + rng.integers(0, ITEMS, len(path.user)))
    value = np.exp(LOG_VALUE[path.state] + SPREAD * rng.standard_normal(len(path.user)))
    return stream_of(LAW_OF_USERS, path, users, item, item // ITEMS, value)


def _answers(stream: Stream, user: Ints, at_ms: Ints) -> Floats:
    def likelihood(row: Ints) -> Floats:
        keeps = np.where((row == stream.first[stream.user[row]])[:, None], 0.0, KEEPS)
        same = stream.item[row] == stream.item[row - 1]
        of_item = keeps * same[:, None] + (1 - keeps) * CATEGORY[:, stream.category[row]].T / ITEMS
        distance = (np.log(stream.value[row])[:, None] - LOG_VALUE) / SPREAD
        return np.asarray((of_item * np.exp(-0.5 * distance**2))[:, None])

    return Filter(LAW_OF_USERS, STEADY, stream, likelihood).answers(user, at_ms, LAW.targets)


LAW = Law(
    "marks",
    "Intent shows in item, category and value alone: types and times of the views say nothing of it.",
    targets("order=order:occurs:7d", "churn=*:absent:30d"),
    until_day=110,
    days=DAYS,
    simulate=_simulate,
    answers=_answers,
)
