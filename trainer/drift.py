"""Drift: how far events have moved since training, and how far a challenger's scores lie from the champion's.

Both are told as a population stability index (Siddiqi, "Credit Risk Scorecards", 2006, ch. 8): with shares e of the expected and a of the
actual sample in the same bins, PSI = sum of (a - e) ln(a / e), which is the symmetrised Kullback-Leibler divergence. His rule of thumb:
under 0.1 no change to speak of, from 0.25 a change to act on. Noise alone gives about (bins - 1)(1/N + 1/M) (Yurdakul & Naranjo,
"Statistical properties of the population stability index", 2020).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from model.hazards import DAY_MS, HOUR_MS
from trainer.history import History

BINS = 10
KINDS = 20
"""Most frequent event types or categories that have a bin of their own."""
SLIGHT, LARGE = 0.1, 0.25


def psi_of_counts(expected: NDArray[np.int64], actual: NDArray[np.int64]) -> float:
    """PSI of two samples counted in the same bins; half a count is added to each, so that an empty bin is finite. NaN without a sample."""
    if not expected.sum() or not actual.sum():
        return float("nan")
    e, a = (expected + 0.5) / (expected + 0.5).sum(), (actual + 0.5) / (actual + 0.5).sum()
    return float((a - e) @ np.log(a / e))


def psi(expected: NDArray[np.floating], actual: NDArray[np.floating]) -> float:
    """PSI of two samples of a number, in bins of equal mass of the expected one. NaN is a bin of its own."""
    known = expected[~np.isnan(expected)]
    edges = np.unique(np.quantile(known, np.linspace(0, 1, BINS + 1)[1:-1])) if len(known) else np.zeros(0)

    def counted(sample: NDArray[np.floating]) -> NDArray[np.int64]:
        missing = np.isnan(sample)
        inside = np.bincount(np.searchsorted(edges, sample[~missing], side="right"), minlength=len(edges) + 1)
        return np.append(inside, missing.sum())

    e, a = counted(expected), counted(actual)
    seen = e + a > 0
    return psi_of_counts(e[seen], a[seen])


def psi_of_kinds(expected: NDArray[np.integer], actual: NDArray[np.integer]) -> float:
    """PSI of two samples of codes, such as hashes: the KINDS most frequent of the expected one, and all others together."""
    kinds, count = np.unique(expected, return_counts=True)
    kinds = np.sort(kinds[np.argsort(-count, kind="stable")[:KINDS]])

    def counted(sample: NDArray[np.integer]) -> NDArray[np.int64]:
        if not len(kinds):
            return np.array([len(sample)])
        place = np.minimum(np.searchsorted(kinds, sample), len(kinds) - 1)
        return np.bincount(np.where(kinds[place] == sample, place, len(kinds)), minlength=len(kinds) + 1)

    e, a = counted(expected), counted(actual)
    seen = e + a > 0
    return psi_of_counts(e[seen], a[seen])


def of_features(history: History, begin_ms: int, newest_ms: int, end_ms: int) -> dict[str, float]:
    """PSI of what the encoder is told of an event, from the events in [begin, newest) to those in [newest, end).

    A window shorter than a week differs in its weekdays whatever users do.
    """
    time_ms = history.time_ms
    before, after = (time_ms >= begin_ms) & (time_ms < newest_ms), (time_ms >= newest_ms) & (time_ms < end_ms)
    gap_seconds = np.append(0, np.diff(time_ms)) / 1000
    follows = history.has_previous  # first events have no gap, and crowd at the beginning of any log
    kinds: dict[str, NDArray[np.integer]] = {
        "event type": history.type_hash,
        "category": history.category_hash,
        "weekday": time_ms // DAY_MS % 7,
    }
    numbers: dict[str, NDArray[np.floating]] = {
        "value": history.value,
        "hour of the day": time_ms // HOUR_MS % 24 + 0.5,
    }
    return {
        **{name: psi_of_kinds(column[before], column[after]) for name, column in kinds.items()},
        **{name: psi(column[before], column[after]) for name, column in numbers.items()},
        "gap to the previous event": psi(gap_seconds[before & follows], gap_seconds[after & follows]),
    }
