"""The recency baseline: logistic regression on a user's silent age and count of events. A model must beat it to be worth its keep."""

from __future__ import annotations

import numpy as np

from model.hazards import HOUR_MS
from trainer.evaluate import Exam
from trainer.measures import Booleans, Floats

STEPS = 30
RIDGE = 1e-3


def answers(fitted_on: Exam, asked: Exam) -> tuple[Floats, ...]:
    """For each target, what a regression on one exam's moments says of another's; both exams ask the same targets."""
    assert fitted_on.asked == asked.asked
    said = []
    for i, label in enumerate(fitted_on.labels):
        weight = fit_logistic(inputs(fitted_on)[fitted_on.rows[i]], label)
        said.append(_sigmoid(inputs(asked)[asked.rows[i]] @ weight))
    return tuple(said)


def inputs(exam: Exam) -> Floats:
    """(L, 3): one, log of the silent age in hours, log of the count of events so far."""
    event = exam.moments.event
    silent_hours = (exam.moments.at_ms - exam.history.time_ms[event]) / HOUR_MS
    return np.stack([np.ones(len(event)), np.log1p(silent_hours), np.log1p(exam.history.rank[event])], axis=1)


def fit_logistic(x_NF: Floats, y: Booleans) -> Floats:
    """(F,) weights of least penalised log-loss, by Newton's method (iteratively reweighted least squares)."""
    weight = np.zeros(x_NF.shape[1])
    for _ in range(STEPS):
        p = _sigmoid(x_NF @ weight)
        curvature = (x_NF.T * (p * (1 - p))) @ x_NF + RIDGE * np.eye(len(weight))
        step = np.linalg.solve(curvature, x_NF.T @ (y - p) - RIDGE * weight)
        weight += np.clip(step, -2, 2)  # one class alone has no finite optimum, and the first steps overshoot
        if np.abs(step).max() < 1e-8:
            break
    return weight


def _sigmoid(z: Floats) -> Floats:
    out: Floats = 1 / (1 + np.exp(-np.clip(z, -30, 30)))
    return out
