"""Pareto/NBD: purchases at a rate of each customer's own, until an unseen death at a rate of each customer's own; both are gamma.

Schmittlein, Morrison & Colombo (1987); likelihood as in Fader & Hardie, "A Note on Deriving the Pareto/NBD Model" (2005), maximised by
scipy. A customer's x purchases, the last at t_x of T, have the likelihood L(x, t_x, T); no further one by T + h is the same statement
about a longer watch, so P(none in h) = L(x, t_x, T + h) / L(x, t_x, T).

A purchase here is a day with an event of the target's types; the clock of a customer starts on the first.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from model.hazards import DAY_MS
from trainer.baselines import Case, constant
from trainer.cutoffs import Probabilities, first_of_day
from trainer.dataset import of_types
from trainer.history import History

Floats = NDArray[np.float64]
AT_MOST = 3000
"""Customers of whom the four parameters are fitted."""


def pareto_nbd(case: Case) -> Probabilities:
    """(N, T): fitted on what was known at `until`; a user without a purchase has the base rate of the landmarks."""
    out = constant(case)
    found: dict[bytes, Floats] = {}  # targets that the same events fulfil share a fit
    for i, target in enumerate(case.targets):
        everybody = np.arange(case.history.users)
        then = np.full(len(everybody), case.until_ms)
        x, recency, age = summaries(case.history, target.types, everybody, then)
        known = np.flatnonzero(age > 0)
        if len(known) < 10:
            continue
        same = of_types(case.history, target.types).tobytes()
        if same not in found:
            rng = np.random.default_rng(case.seed)
            some = known if len(known) <= AT_MOST else rng.choice(known, AT_MOST, replace=False)
            found[same] = fitted(x[some], recency[some], age[some])
        parameters = found[same]
        x, recency, age = summaries(case.history, target.types, case.asked.user, case.asked.at_ms)
        rows = age > 0
        horizon = target.horizon_ms / DAY_MS
        longer = log_likelihood(parameters, x[rows], recency[rows], age[rows] + horizon)
        none = np.exp(np.minimum(longer - log_likelihood(parameters, x[rows], recency[rows], age[rows]), 0.0))
        out[rows, i] = none if target.outcome == "absent" else 1 - none
    return out


def summaries(history: History, types: tuple[str, ...], user: NDArray[np.int64], at_ms: NDArray[np.int64]) -> tuple[Floats, Floats, Floats]:
    """(repeat purchase days, time of the last one, age), in days since the first, (N,) each; an age of 0 says that there was none."""
    flag = of_types(history, types)
    rows = np.flatnonzero(flag & first_of_day(history, flag))
    times, owner = history.time_ms[rows], history.user[rows]
    begin = np.searchsorted(owner, user)
    order = np.unique(times)
    key = owner * (len(order) + 1) + np.searchsorted(order, times)
    end = np.searchsorted(key, user * (len(order) + 1) + np.searchsorted(order, at_ms))
    there = end > begin
    padded = np.append(times, 0)
    first = padded[np.where(there, begin, -1)]
    last = padded[np.where(there, end - 1, -1)]
    days = [np.where(there, value / DAY_MS, 0.0) for value in (last - first, at_ms - first)]
    return np.where(there, end - begin - 1, 0).astype(np.float64), days[0], days[1]


def fitted(x: Floats, recency: Floats, age: Floats) -> Floats:
    """(4,) r, alpha, s, beta by maximum likelihood, from a start that fits the mean rate."""
    from scipy.optimize import minimize

    rate = max(x.sum() / max(age.sum(), 1e-9), 1e-6)

    def loss(log_parameters: Floats) -> float:
        value = -float(log_likelihood(np.exp(np.clip(log_parameters, -12, 12)), x, recency, age).mean())
        return value + 1e-3 * float(log_parameters @ log_parameters) / len(x) if np.isfinite(value) else 1e6

    start = np.log([1.0, 1.0 / rate, 0.5, 10.0 / rate])
    found = minimize(loss, start, method="Nelder-Mead", options={"maxiter": 600, "xatol": 1e-3, "fatol": 1e-6})
    return np.asarray(np.exp(np.clip(found.x, -12, 12)), np.float64)


def log_likelihood(parameters: Floats, x: Floats, recency: Floats, age: Floats) -> Floats:
    """(N,) log L(x, t_x, T | r, alpha, s, beta)."""
    from scipy.special import gammaln, hyp2f1

    r, alpha, s, beta = parameters
    total = r + s + x
    larger, gap = max(alpha, beta), abs(alpha - beta)
    second = s + 1 if alpha >= beta else r + x

    def log_term(t: Floats) -> Floats:
        """log of F(total, second; total + 1; z) / (larger + t)^total; by Euler's transformation, or F overflows for the busy."""
        z = gap / (larger + t)
        with np.errstate(invalid="ignore", divide="ignore"):  # scipy fails at parameters that the search passes by
            tamed = np.log(hyp2f1(1.0, total + 1 - second, total + 1, z))
        return np.asarray(tamed + (1 - second) * np.log1p(-z) - total * np.log(larger + t))

    alive = -(r + x) * np.log(alpha + age) - s * np.log(beta + age)
    near, far = log_term(recency), log_term(age)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        dead = np.log(s / total) + near + np.log1p(-np.exp(np.minimum(far - near, 0.0)))
    head = gammaln(r + x) - gammaln(r) + r * np.log(alpha) + s * np.log(beta)
    return np.asarray(head + np.logaddexp(alive, np.where(np.isnan(dead), -np.inf, dead)), np.float64)
