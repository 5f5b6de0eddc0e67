"""A rare target, an upgrade of one user in a hundred within a week, beside a common one; about eight events a user."""

from __future__ import annotations

import numpy as np

from bench.laws.case import Floats, Ints, Law, Stream, targets
from bench.laws.markov import STEADY, Filter, Process, process, simulate, stream_of

TYPES = ("open", "read", "trial", "ticket", "upgrade")
STATES = 4
IDLE, KEEN, STUCK, GONE = range(STATES)
ACTIVITY, SHARES = (0.4, 1.0, 2.2), (0.4, 0.4, 0.2)
JOIN_DAYS, DAYS = 110, 160


def _law() -> Process:
    moves, rates = np.zeros((len(ACTIVITY), STATES, STATES)), np.zeros((len(ACTIVITY), STATES, len(TYPES)))
    for c, activity in enumerate(ACTIVITY):
        moves[c, IDLE, [KEEN, STUCK, GONE]] = 0.012 * activity, 0.004, 0.012 / activity
        moves[c, KEEN, [IDLE, STUCK]] = 0.15, 0.03
        moves[c, STUCK, [IDLE, GONE]] = 0.1, 0.08
        rates[c, IDLE] = 0.08, 0.01, 0.001, 0.002, 0.0002
        rates[c, KEEN] = 0.25, 0.25, 0.1, 0.01, 0.04
        rates[c, STUCK] = 0.1, 0.02, 0, 0.3, 0.0005
        rates[c] *= activity
    leads = {("upgrade", state): np.eye(STATES)[IDLE] for state in (IDLE, KEEN, STUCK)}
    leads["trial", KEEN] = np.array([0.3, 0.6, 0.1, 0])
    return process(TYPES, SHARES, (0.6, 0.35, 0.05, 0), moves, rates, leads)


LAW_OF_USERS = _law()


def _simulate(users: int, seed: int) -> Stream:
    rng = np.random.default_rng(seed)
    path = simulate(LAW_OF_USERS, STEADY, rng.uniform(0, JOIN_DAYS, users), DAYS, rng)
    none = np.full(len(path.user), -1)
    return stream_of(LAW_OF_USERS, path, users, none, rng.integers(0, 5, len(path.user)), np.full(len(path.user), np.nan))


def _answers(stream: Stream, user: Ints, at_ms: Ints) -> Floats:
    return Filter(LAW_OF_USERS, STEADY, stream).answers(user, at_ms, LAW.targets)


LAW = Law(
    "rare",
    "A rare target of about 1% beside a common one; about eight events a user.",
    targets("upgrade=upgrade:occurs:7d", "back=*:occurs:7d"),
    until_day=110,
    days=DAYS,
    simulate=_simulate,
    answers=_answers,
)
