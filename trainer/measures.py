"""Measures: how good probabilities are, each with a 95% interval. Pure numpy.

Intervals are percentile bootstraps over users (Efron & Tibshirani, "An Introduction to the Bootstrap", 1993, ch. 13): moments of one user
go together, and every model sees the same resamples, so that the difference between two models has an interval of its own. Predictions
are sorted once; a resample is a vector of weights. ECE is a sum of absolute values, which noise only ever adds to: its interval leans
upwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ECE_BINS = 10
EPSILON = 1e-7
TOP = 0.1
"""Share of the moments, those with the highest scores, whose lift is measured."""

MEASURES = ("accuracy", "precision", "recall", "f1", "auc", "pr_auc", "log_loss", "brier", "ece", "lift")
HIGHER_IS_BETTER = {name: name not in ("log_loss", "brier", "ece") for name in MEASURES}

Floats = NDArray[np.float64]
Booleans = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure and its 95% interval; NaN where it is not defined, such as the AUC of one class."""

    value: float
    low: float
    high: float


class Weighted:
    """All MEASURES of one set of predictions under many weightings. `threshold`: what counts as a yes is p >= threshold.

    Ties count a half in the AUC, go together in the precisions, and are cut in proportion at the edge of the top share.
    """

    def __init__(self, y: Booleans, p: Floats, threshold: float) -> None:
        self._order = np.argsort(-p, kind="stable")
        ordered = p[self._order]
        self._positive = y[self._order].astype(np.float64)
        self._starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(p) else np.zeros(0, np.int64)
        self._flagged = int((ordered[self._starts] >= threshold).sum())
        self._losses = losses(y, p)
        self._squares = (p - y) ** 2
        self._surplus = y - p
        self._bin = mass_bins(p, ECE_BINS)

    def __call__(self, weight: Floats) -> Floats:
        """(len(MEASURES),) measures of moments with these weights (N,)."""
        if not weight.any():
            return np.full(len(MEASURES), np.nan)
        ordered = weight[self._order]
        positive = np.add.reduceat(ordered * self._positive, self._starts)
        negative = np.add.reduceat(ordered, self._starts) - positive
        true, false = np.r_[0.0, np.cumsum(positive)], np.r_[0.0, np.cumsum(negative)]
        positives, negatives, total = true[-1], false[-1], true[-1] + false[-1]
        hits, misses = true[self._flagged], false[self._flagged]
        taken = true + false
        precisions = np.divide(true, taken, out=np.zeros_like(true), where=taken > 0)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.array(
                [
                    (hits + negatives - misses) / total,
                    hits / (hits + misses),
                    hits / positives,
                    2 * hits / (positives + hits + misses),
                    positive @ (negatives - false[1:] + negative / 2) / (positives * negatives),
                    positive @ precisions[1:] / positives,
                    self._losses @ weight / total,
                    self._squares @ weight / total,
                    np.abs(np.bincount(self._bin, self._surplus * weight, ECE_BINS)).sum() / total,
                    np.interp(TOP * total, taken, true) / TOP / positives,
                ]
            )


class WeightedAuc:
    """AUC of one set of predictions under many weightings: sorted once. Ties count a half."""

    def __init__(self, y: Booleans, p: Floats) -> None:
        self._order = np.argsort(p, kind="stable")
        self._positive = y[self._order].astype(np.float64)
        ordered = p[self._order]
        self._starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])

    def __call__(self, weight: Floats) -> float:
        ordered = weight[self._order]
        positive = np.add.reduceat(ordered * self._positive, self._starts)
        negative = np.add.reduceat(ordered, self._starts) - positive
        below = np.cumsum(negative) - negative / 2
        pairs = positive.sum() * negative.sum()
        return float(positive @ below / pairs) if pairs else 0.5


def measured(
    y: Booleans, user: NDArray[np.int64], said: Mapping[str, tuple[Floats, float]], rng: np.random.Generator, resamples: int
) -> tuple[dict[str, dict[str, Interval]], dict[str, dict[str, Interval]]]:
    """Measures of every model, and how far each lies above the first one, by name and measure.

    said: by model, probabilities (N,) and threshold.
    """
    models = [Weighted(y, p, threshold) for p, threshold in said.values()]
    _, user = np.unique(user, return_inverse=True)
    users = int(user.max(initial=-1)) + 1
    ones = np.ones(len(y))
    value_MN = np.array([model(ones) for model in models])
    drawn_RMN = np.full((resamples, len(models), len(MEASURES)), np.nan)
    for r in range(resamples if users else 0):
        weight = np.bincount(rng.integers(0, users, users), minlength=users)[user].astype(np.float64)
        drawn_RMN[r] = [model(weight) for model in models]
    own = {name: _intervals(value_MN[m], drawn_RMN[:, m]) for m, name in enumerate(said)}
    above = {name: _intervals(value_MN[m] - value_MN[0], drawn_RMN[:, m] - drawn_RMN[:, 0]) for m, name in enumerate(said) if m > 0}
    return own, above


def _intervals(value_N: Floats, drawn_RN: Floats) -> dict[str, Interval]:
    out = {}
    for n, name in enumerate(MEASURES):
        drawn = drawn_RN[~np.isnan(drawn_RN[:, n]), n]
        low, high = np.quantile(drawn, (0.025, 0.975)) if len(drawn) else (np.nan, np.nan)
        out[name] = Interval(float(value_N[n]), float(low), float(high))
    return out


def best_threshold(y: Booleans, p: Floats) -> float:
    """The threshold with the largest F1, among the probabilities given; 0.5 where nothing came to pass."""
    if not y.any():
        return 0.5
    order = np.argsort(-p, kind="stable")
    ordered = p[order]
    ends = np.flatnonzero(np.r_[ordered[1:] != ordered[:-1], True])
    hits = np.cumsum(y[order])[ends]
    return float(ordered[ends[np.argmax(2 * hits / (y.sum() + ends + 1))]])


def mass_bins(p: Floats, bins: int) -> NDArray[np.int64]:
    """(N,) bins of about equal mass; equal probabilities share one."""
    if not len(p):
        return np.zeros(0, np.int64)
    return np.searchsorted(np.quantile(p, np.linspace(0, 1, bins + 1)[1:-1]), p, side="right")


def losses(y: Booleans, p: Floats) -> Floats:
    """(N,) log-loss of each prediction, in nats."""
    p = np.clip(p, EPSILON, 1 - EPSILON)
    out: Floats = -np.where(y, np.log(p), np.log1p(-p))
    return out


def summary(y: Booleans, p: Floats) -> dict[str, float]:
    """AUC (where there are both outcomes), log-loss, Brier score and ECE (equal-mass bins) of some predictions; {} of none."""
    if not len(y):
        return {}
    order = np.argsort(p, kind="stable")
    bins = zip(np.array_split(p[order], ECE_BINS), np.array_split(y[order], ECE_BINS), strict=True)
    ece = sum(abs(bp.mean() - by.mean()) * len(bp) for bp, by in bins if len(bp)) / len(y)
    measures = {"log_loss": losses(y, p).mean(), "brier": np.mean((p - y) ** 2), "ece": ece}
    if 0 < y.sum() < len(y):
        measures["auc"] = WeightedAuc(y, p)(np.ones(len(y)))
    return {name: round(float(value), 5) for name, value in measures.items()}
