"""Curves of predictions against outcomes: what the report draws. Pure numpy; every curve has at most POINTS points.

Each takes labels (N,) and probabilities (N,) with both outcomes among them. Equal probabilities are one step.
"""

from __future__ import annotations

import numpy as np

from trainer.measures import Booleans, Floats, mass_bins

POINTS = 200
CALIBRATION_BINS = 10
_Z = 1.959964  # of a 95% interval


def _counts(y: Booleans, p: Floats) -> tuple[Floats, Floats]:
    """Hits and false alarms when everything from some probability up is a yes, from nothing to all."""
    order = np.argsort(-p, kind="stable")
    ordered = p[order]
    ends = np.flatnonzero(np.r_[ordered[1:] != ordered[:-1], True])
    hits = np.cumsum(y[order])[ends]
    return np.r_[0.0, hits], np.r_[0.0, ends + 1.0 - hits]


def _thinned(*columns: Floats) -> tuple[Floats, ...]:
    """Evenly along the curve, and finely at its beginning, where one moment more makes a difference."""
    last = len(columns[0]) - 1
    even, fine = np.linspace(0, last, POINTS // 2), np.geomspace(1, last + 1, POINTS // 2) - 1
    kept = np.unique(np.concatenate([even, fine]).round().astype(np.int64))
    return tuple(c[kept] for c in columns)


def roc(y: Booleans, p: Floats) -> tuple[Floats, ...]:
    """(false positive rate, true positive rate), rising."""
    hits, alarms = _counts(y, p)
    return _thinned(alarms / alarms[-1], hits / hits[-1])


def precision_recall(y: Booleans, p: Floats) -> tuple[Floats, ...]:
    """(recall, precision), recall rising."""
    hits, alarms = _counts(y, p)
    return _thinned(hits[1:] / hits[-1], hits[1:] / (hits[1:] + alarms[1:]))


def gains(y: Booleans, p: Floats) -> tuple[Floats, ...]:
    """(share of the moments, highest scores first; share of the outcomes among them)."""
    hits, alarms = _counts(y, p)
    return _thinned((hits + alarms) / len(y), hits / hits[-1])


def calibration(y: Booleans, p: Floats) -> tuple[Floats, ...]:
    """(mean prediction, observed share, low, high) of bins of equal mass. The interval is Wilson's (1927), as of independent moments."""
    where = mass_bins(p, CALIBRATION_BINS)
    count = np.bincount(where, minlength=CALIBRATION_BINS)
    filled = count > 0
    n = count[filled].astype(np.float64)
    predicted = np.bincount(where, p, CALIBRATION_BINS)[filled] / n
    observed = np.bincount(where, y, CALIBRATION_BINS)[filled] / n
    centre = (observed + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z * np.sqrt(observed * (1 - observed) / n + _Z**2 / (4 * n * n)) / (1 + _Z**2 / n)
    return predicted, observed, np.maximum(centre - half, 0), np.minimum(centre + half, 1)
