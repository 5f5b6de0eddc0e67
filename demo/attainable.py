"""The best scores that anyone can give on the simulated shop: exact Bayes filtering of its law.

With a the distribution of the hidden state of a user given all that was observed, t silent days turn it into a exp(D0 t), and an event
of type k into a D_k, each time normalised. No event of a set A comes within H with the probability a exp((D0 + sum of D_k not in A) H) 1.

Axis letters: S states, E events, Q queries.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from demo.shop import DAY_MS, Drift, Floats, History, Ints, Law

NEVER_MS = 1 << 61

Target = tuple[Sequence[str], Literal["occurs", "absent"], int]
"""Event types (or "*" for any), the outcome, and the horizon in milliseconds."""


class Propagator:
    """Row vectors times exp(generator * t), for many t at once, by the eigenvectors of the generator (S, S), per day."""

    def __init__(self, generator: Floats) -> None:
        self._values, self._vectors = np.linalg.eig(generator)
        self._inverse = np.linalg.inv(self._vectors)
        assert np.allclose((self._vectors * self._values) @ self._inverse, generator, atol=1e-9), "not diagonalisable: vary a rate a little"

    def __call__(self, rows_QS: Floats, days_Q: Floats) -> Floats:
        spectral = (rows_QS @ self._vectors) * np.exp(self._values * days_Q[:, None])
        rows: Floats = np.maximum((spectral @ self._inverse).real, 0)
        return rows


class Filter:
    """The exact posterior of every user, kept after each event; probabilities at any later moment. `history` begins at each arrival.

    With a drift, it knows the new law from its first moment on, and not a moment earlier.
    """

    def __init__(self, law: Law, history: History, drift: Drift | None = None) -> None:
        self._law = law
        self._drift = drift or Drift(NEVER_MS, law)
        self._silences = Propagator(law.d0), Propagator(self._drift.law.d0)
        order = np.lexsort((history.time_ms, history.user))
        self._user, self._time_ms, kind = history.user[order], history.time_ms[order], history.type[order]
        self._key = _key(self._user, self._time_ms)
        first = np.flatnonzero(np.r_[True, self._user[1:] != self._user[:-1]])
        rank = np.arange(len(order)) - np.repeat(first, np.diff(np.r_[first, len(order)]))
        self._after_ES = np.empty((len(order), len(law.initial)))
        self._after_ES[first] = law.initial
        # Round r steps the r-th event of every user that has one, all users at once; row - 1 is the same user's event before it.
        by_rank = np.argsort(rank, kind="stable")
        for rows in np.split(by_rank, np.cumsum(np.bincount(rank)))[1:-1]:
            before = self._silent(self._after_ES[rows - 1], self._time_ms[rows - 1], self._time_ms[rows])
            late = self._time_ms[rows] >= self._drift.at_ms
            step = np.where(late[:, None, None], self._drift.law.d[kind[rows]], law.d[kind[rows]])
            self._after_ES[rows] = _normalised(np.einsum("qs,qst->qt", before, step))

    def _silent(self, rows_QS: Floats, from_Q: Ints, to_Q: Ints) -> Floats:
        """The distributions (not normalised) after silences."""
        turn_Q = np.clip(self._drift.at_ms, from_Q, to_Q)
        rows_QS = self._silences[0](rows_QS, (turn_Q - from_Q) / DAY_MS)
        return self._silences[1](rows_QS, (to_Q - turn_Q) / DAY_MS) if (turn_Q < to_Q).any() else rows_QS

    def belief(self, user: ArrayLike, at_ms: ArrayLike) -> Floats:
        """(Q, S): the hidden state's distribution given the user's events with time <= at, and none since."""
        user_Q, at_Q = np.asarray(user, np.int64), np.asarray(at_ms, np.int64)
        row = np.searchsorted(self._key, _key(user_Q, at_Q), side="right") - 1
        early = (row < 0) | (self._user[row] != user_Q)
        if early.any():
            bad = int(np.flatnonzero(early)[0])
            raise ValueError(f"query {bad}: user {user_Q[bad]} has no event up to {at_Q[bad]} ms; ask at or after the first event")
        return _normalised(self._silent(self._after_ES[row], self._time_ms[row], at_Q))

    def probabilities(self, user: ArrayLike, at_ms: ArrayLike, targets: Mapping[str, Target]) -> dict[str, Floats]:
        """P (Q,) of each target at each (user index, moment in epoch ms), from the user's events with time <= at."""
        belief_QS = self.belief(user, at_ms)
        late_Q = np.asarray(at_ms, np.int64) >= self._drift.at_ms
        return {
            name: np.where(late_Q, belief_QS @ outcome_by_state(self._drift.law, t), belief_QS @ outcome_by_state(self._law, t))
            for name, t in targets.items()
        }


def probabilities(law: Law, history: History, user: ArrayLike, at_ms: ArrayLike, targets: Mapping[str, Target]) -> dict[str, Floats]:
    """The best attainable P (Q,) of each target at each (user index, moment in epoch ms), from the user's events with time <= at."""
    return Filter(law, history).probabilities(user, at_ms, targets)


def outcome_by_state(law: Law, target: Target) -> Floats:
    """(S,): P(target) for a user known to be in state s at the moment asked."""
    _, outcome, horizon_ms = target
    others = ~_in_set(law.types, target)
    size = len(law.initial)
    within = Propagator(law.d0 + law.d[others].sum(0))
    absent: Floats = np.minimum(within(np.eye(size), np.full(size, horizon_ms / DAY_MS)).sum(1), 1)
    return absent if outcome == "absent" else 1 - absent


def labels(history: History, user: ArrayLike, at_ms: ArrayLike, target: Target) -> NDArray[np.bool_]:
    """What came to pass (Q,): an event of the set in (at, at + horizon], or none. The caller keeps at + horizon within the history."""
    _, outcome, horizon_ms = target
    chosen = _in_set(history.types, target)[history.type]
    key = np.sort(_key(history.user[chosen], history.time_ms[chosen]))
    user_Q, at_Q = np.asarray(user, np.int64), np.asarray(at_ms, np.int64)
    upto = [np.searchsorted(key, _key(user_Q, moment), side="right") for moment in (at_Q, at_Q + horizon_ms)]
    occurs: NDArray[np.bool_] = upto[1] > upto[0]
    return occurs if outcome == "occurs" else ~occurs


def auc(y: ArrayLike, p: ArrayLike) -> float:
    """The chance that a positive is scored above a negative; ties count a half (Mann-Whitney). NaN with one class only."""
    y_Q = np.asarray(y, bool)
    _, group, size = np.unique(np.asarray(p), return_inverse=True, return_counts=True)
    rank = (np.cumsum(size) - (size - 1) / 2)[group]
    positive = int(y_Q.sum())
    pairs = positive * (len(y_Q) - positive)
    return float((rank[y_Q].sum() - positive * (positive + 1) / 2) / pairs) if pairs else float("nan")


def log_loss(y: ArrayLike, p: ArrayLike) -> float:
    """Mean negative log-likelihood, in nats."""
    y_Q, p_Q = np.asarray(y, bool), np.clip(np.asarray(p, np.float64), 1e-9, 1 - 1e-9)
    return float(-np.where(y_Q, np.log(p_Q), np.log1p(-p_Q)).mean())


def _key(user: NDArray[np.integer[Any]], time_ms: Ints) -> Ints:
    """One sortable integer a (user, time); 42 bits hold epoch milliseconds up to the year 2109."""
    return (user.astype(np.int64) << 42) + time_ms


def _in_set(types: tuple[str, ...], target: Target) -> NDArray[np.bool_]:
    """(K,): the types that a target speaks of."""
    unknown = set(target[0]) - {"*", *types}
    if unknown:
        raise ValueError(f"unknown event types {sorted(unknown)}; known are {', '.join(types)}")
    return np.array(["*" in target[0] or name in target[0] for name in types])


def _normalised(rows_QS: Floats) -> Floats:
    total: Floats = rows_QS.sum(1, keepdims=True)
    return rows_QS / total
