"""Scheduled questions: all known users at fixed moments, and what came to pass. What `backtest` and `compare` judge by, and learn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.hazards import DAY_MS
from model.targets import Target
from trainer.dataset import of_types
from trainer.history import History
from trainer.measures import summary
from trainer.queries import Places, last_before

Probabilities = NDArray[np.float64]


@dataclass(slots=True)
class Questions:
    """N moments asked about users of a history, each of whom had an event before. T targets.

    user, at_ms: (N,); event: (N,) the last event strictly before the moment. label: (N, T) bool; closed: (N, T) bool, whether the
    horizon had ended when the observation did: a label counts only where it had.
    """

    user: NDArray[np.int64]
    at_ms: NDArray[np.int64]
    event: NDArray[np.int64]
    label: NDArray[np.bool_]
    closed: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.user)

    def where(self, rows: NDArray[np.int64] | NDArray[np.bool_]) -> Questions:
        return Questions(self.user[rows], self.at_ms[rows], self.event[rows], self.label[rows], self.closed[rows])


def ask(history: History, targets: Sequence[Target], moments_ms: Sequence[int], end_ms: int) -> Questions:
    """Every known user at each moment; events from `end` on are not looked at."""
    user = np.tile(np.arange(history.users), len(moments_ms))
    return ask_about(history, targets, user, np.repeat(np.asarray(moments_ms, np.int64), history.users), end_ms)


def ask_about(history: History, targets: Sequence[Target], user: NDArray[np.int64], at_ms: NDArray[np.int64], end_ms: int) -> Questions:
    """Each user at a moment of its own, those without an event before it left out; events from `end` on are not looked at."""
    event = last_before(history, user, at_ms)
    known = event >= 0
    user, at_ms, event = user[known], at_ms[known], event[known]
    label = np.empty((len(user), len(targets)), bool)
    closed = np.empty_like(label)
    for i, target in enumerate(targets):
        occurs = occurred(history, target.types, user, at_ms, target.horizon_ms)
        label[:, i] = occurs if target.outcome == "occurs" else ~occurs
        closed[:, i] = at_ms + target.horizon_ms <= end_ms
    return Questions(user, at_ms, event, label, closed)


def occurred(
    history: History, types: Sequence[str], user: NDArray[np.int64], at_ms: NDArray[np.int64], horizon_ms: int
) -> NDArray[np.bool_]:
    """(N,) whether an event of `types` fell in [at, at + horizon)."""
    seen = np.concatenate([[0], np.cumsum(of_types(history, types))])
    places = Places(history)
    happened: NDArray[np.bool_] = seen[places.before(user, at_ms + horizon_ms)] > seen[places.before(user, at_ms)]
    return happened


def first_of_day(history: History, flag: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """(E,) whether the event is the first of `flag` of its user on its day."""
    out = np.zeros(len(history), bool)
    rows = np.flatnonzero(flag)
    user, day = history.user[rows], history.time_ms[rows] // DAY_MS
    out[rows] = np.concatenate([[True], (np.diff(user) != 0) | (np.diff(day) != 0)])[: len(rows)]
    return out


def training_moments(first_ms: int, until_ms: int, longest_ms: int, at_most: int = 60) -> list[int]:
    """Moments whose longest horizon has closed before `until`, newest last, at `until`'s time of day and on every weekday.

    A step of whole weeks would put them all on one weekday, and a model would learn nonsense about the others.
    """
    last_ms = until_ms - longest_ms
    span_ms = last_ms - first_ms
    if span_ms <= 0:
        raise ValueError(
            f"the events before --until span {(until_ms - first_ms) / DAY_MS:.1f} days, "
            f"too few to learn about a horizon of {longest_ms / DAY_MS:.1f} days"
        )
    step_ms = span_ms // at_most
    if span_ms >= 14 * DAY_MS:
        days = max(1, -(-step_ms // DAY_MS))
        step_ms = (days + (days % 7 == 0)) * DAY_MS
    return [last_ms - i * max(step_ms, 1) for i in range(min(at_most, span_ms // max(step_ms, 1) + 1))][::-1]


def figures(questions: Questions, targets: Sequence[Target], said: Probabilities) -> dict[str, dict[str, float]]:
    """For each target, AUC, log-loss, Brier and ECE of what was `said` (N, T), with the number of questions and the base rate."""
    out: dict[str, dict[str, float]] = {}
    for i, target in enumerate(targets):
        rows = questions.closed[:, i]
        label, p = questions.label[rows, i], said[rows, i].astype(np.float64)
        measures = summary(label, np.clip(p, 1e-6, 1 - 1e-6))
        if measures:
            out[target.name] = {"questions": len(label), "base_rate": round(float(label.mean()), 5), **measures}
    return out
