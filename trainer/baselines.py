"""Alternatives on hand-made features: what a careful data scientist would build from the same events. Trained on landmarks before `until`.

Extra `compare`: scikit-learn, lightgbm, scipy. Hyper-parameters are fixed in advance, as they would be by somebody who knows the field.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.events import stable_hash
from model.hazards import DAY_MS
from model.statistics import signed_log1p
from model.targets import Target
from trainer.cutoffs import Probabilities, Questions, first_of_day
from trainer.dataset import of_types
from trainer.history import History
from trainer.queries import Places

Floats = NDArray[np.float64]
WINDOWS_DAYS = (1, 3, 7, 14, 30, 60, 90, 180)
TYPES = 10
"""Event types with features of their own: those of the targets, then the most frequent."""
CATEGORIES = 10
"""The most frequent categories, with features of their own."""
GAPS = 10
NEWEST = 10
"""Events of which the marks count once more by themselves."""
FAR_DAYS = 400.0


@dataclass(slots=True)
class Case:
    """What an alternative learns from and is asked. history: of all events; learn, asked: questions before, and from, `until`.

    Nothing in `learn`, its labels included, looks at an event from `until` on.
    """

    history: History
    targets: tuple[Target, ...]
    learn: Questions
    asked: Questions
    until_ms: int
    seed: int
    _tables: tuple[NDArray[np.float32], NDArray[np.float32]] | None = field(default=None, init=False, repr=False)

    @property
    def tables(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The features of what is learnt from and of what is asked, made once for all alternatives on features."""
        if self._tables is None:
            learn, asked = (features(self.history, q, self.targets, self.until_ms) for q in (self.learn, self.asked))
            self._tables = learn, asked
        return self._tables


Alternative = Callable[[Case], Probabilities]


def features(history: History, questions: Questions, targets: Sequence[Target], until_ms: int) -> NDArray[np.float32]:
    """(N, F) recency, frequency, value, gaps, tenure, calendar and marks of each question's user, by events strictly before its moment."""
    user, at_ms, last = questions.user, questions.at_ms, questions.event
    places = Places(history)
    ends = last + 1
    first = history.first[user]
    window_begins = [np.maximum(places.before(user, at_ms - days * DAY_MS), first) for days in WINDOWS_DAYS]
    columns: list[Floats] = []

    def days(ms: NDArray[np.int64]) -> Floats:
        return ms / DAY_MS

    def counts(flag: NDArray[np.bool_]) -> None:
        seen = np.concatenate([[0], np.cumsum(flag)])
        columns.extend(np.log1p(seen[ends] - seen[begin]) for begin in window_begins)
        columns.append(np.log1p(seen[ends] - seen[first]))

    day = history.time_ms // DAY_MS
    new_day = ~history.has_previous | (np.append(day[:1], day[:-1]) != day)
    tenure = days(at_ms - history.time_ms[first])
    for members in _sets(history, targets, until_ms):
        flag = of_types(history, members)
        counts(flag)
        seen = np.concatenate([[0], np.cumsum(flag)])
        where = np.append(np.flatnonzero(flag), 0)
        newest = np.where(seen[ends] > seen[first], where[np.maximum(seen[ends] - 1, 0)], -1)
        recency = np.where(newest >= 0, days(at_ms - history.time_ms[newest]), FAR_DAYS)
        columns.append(np.log1p(recency * 24))
        columns.append((seen[ends] - seen[first]) / (tenure + 7))
        active = flag & first_of_day(history, flag)
        counts(active)
    counts(new_day)

    has_value = ~np.isnan(history.value)
    total = np.concatenate([[0.0], np.cumsum(np.where(has_value, signed_log1p(np.nan_to_num(history.value)), 0), dtype=np.float64)])
    valued = np.concatenate([[0], np.cumsum(has_value)])
    spans = (window_begins[4], window_begins[7], first)
    columns += [(total[ends] - total[begin]) / np.maximum(valued[ends] - valued[begin], 1) for begin in spans]

    visits = np.flatnonzero(new_day)
    visit_ends = np.searchsorted(visits, ends)
    visit_first = np.searchsorted(visits, first)
    gaps = []
    for k in range(GAPS):
        later, earlier = visit_ends - 1 - k, visit_ends - 2 - k
        there = earlier >= visit_first
        gap = days(history.time_ms[visits[np.maximum(later, 0)]] - history.time_ms[visits[np.maximum(earlier, 0)]])
        gaps.append(np.where(there, gap, np.nan))
    gap_NG = np.stack(gaps, axis=1)
    silent = days(at_ms - history.time_ms[last])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a user of one visit has no gaps
        mean, spread = np.nanmean(gap_NG, axis=1), np.nanstd(gap_NG, axis=1)
    mean, spread = np.nan_to_num(mean, nan=FAR_DAYS), np.nan_to_num(spread)
    columns += [np.log1p(mean), np.log1p(spread), np.minimum(silent / (mean + 0.5), 20.0), np.log1p(tenure), np.log1p(silent * 24)]
    phase_day, phase_week = (at_ms % DAY_MS) * (2 * np.pi / DAY_MS), (at_ms % (7 * DAY_MS)) * (2 * np.pi / (7 * DAY_MS))
    columns += [np.sin(phase_day), np.cos(phase_day), np.sin(phase_week), np.cos(phase_week)]
    columns += _marks(history, questions, until_ms)
    return np.stack(columns, axis=1).astype(np.float32)


def _marks(history: History, questions: Questions, until_ms: int) -> list[Floats]:
    """The last type, the last values, and which categories and items come, and come again: of all events, and of the newest."""
    last, ends, first = questions.event, questions.event + 1, history.first[questions.user]
    newest = np.maximum(ends - NEWEST, first)
    known = history.time_ms < until_ms
    value = signed_log1p(np.nan_to_num(history.value)).astype(np.float64)
    columns = [value[last]]

    def shares(of_event: Floats) -> None:
        total = np.concatenate([[0.0], np.cumsum(of_event)])
        columns.extend((total[ends] - total[begin]) / (ends - begin) for begin in (first, newest))

    shares(value)
    for of_event in (history.category_hash, history.item_hash):
        if of_event[known].any():
            again = history.has_previous & (of_event != 0) & (of_event == np.append(of_event[:1], of_event[:-1]))
            shares(again.astype(np.float64))
            columns.append(again[last].astype(np.float64))
    columns.extend((history.type_hash[last] == code).astype(np.float64) for code in list(_often(history.type_hash[known]))[:TYPES])
    for code in list(_often(history.category_hash[known & (history.category_hash != 0)]))[:CATEGORIES]:
        shares((history.category_hash == code).astype(np.float64))
    return columns


def _often(hashes: NDArray[np.uint32]) -> dict[int, int]:
    """How often each occurs, the most frequent first."""
    codes, count = np.unique(hashes, return_counts=True)
    order = np.argsort(-count, kind="stable")
    return dict(zip(codes[order].tolist(), count[order].tolist(), strict=True))


def _sets(history: History, targets: Sequence[Target], until_ms: int) -> list[tuple[str, ...]]:
    """Any event, the targets' sets, and the most frequent types before `until`."""
    often = _often(history.type_hash[history.time_ms < until_ms])
    frequent = sorted((t for t in history.types if stable_hash(t) in often), key=lambda t: (-often[stable_hash(t)], t))
    return list(dict.fromkeys([("*",), *(t.types for t in targets), *((t,) for t in frequent[:TYPES])]))


def constant(case: Case) -> Probabilities:
    """The base rate of the landmarks."""
    return np.tile(_rates(case), (len(case.asked), 1))


def _rates(case: Case) -> Floats:
    closed = case.learn.closed
    return np.asarray((case.learn.label & closed).sum(0) / np.maximum(closed.sum(0), 1), np.float64)


def recency(case: Case) -> Probabilities:
    """Logistic regression on nothing but the time since the target's last event, and since any: the rule of thumb."""

    def columns(questions: Questions) -> NDArray[np.float32]:
        parts = [np.log1p((questions.at_ms - case.history.time_ms[questions.event]) / 3_600_000)]
        for target in case.targets:
            rows = np.append(np.flatnonzero(of_types(case.history, target.types)), len(case.history))
            place = np.searchsorted(rows, questions.event, side="right") - 1
            newest = rows[np.maximum(place, 0)]
            own = (place >= 0) & (newest >= case.history.first[questions.user])
            since = questions.at_ms - np.append(case.history.time_ms, 0)[newest]
            parts.append(np.log1p(np.where(own, since / 3_600_000, FAR_DAYS * 24)))
        basis = np.stack(parts, axis=1)
        return np.concatenate([basis, basis**2], axis=1).astype(np.float32)

    return _each(case, columns(case.learn), columns(case.asked), _logistic)


def logistic(case: Case) -> Probabilities:
    return _each(case, *case.tables, _logistic)


def lightgbm(case: Case) -> Probabilities:
    def make(seed: int) -> Any:
        from lightgbm import LGBMClassifier

        return LGBMClassifier(
            n_estimators=300, learning_rate=0.03, num_leaves=15, min_child_samples=100, subsample=0.8, subsample_freq=1,
            colsample_bytree=0.5, reg_lambda=5.0, n_jobs=1, random_state=seed, deterministic=True, force_row_wise=True, verbose=-1,
        )  # fmt: skip

    return _each(case, *case.tables, make)


def mlp(case: Case) -> Probabilities:
    def make(seed: int) -> Any:
        from sklearn.neural_network import MLPClassifier
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        network = MLPClassifier(
            (64, 32), alpha=1e-3, batch_size=512, early_stopping=True, n_iter_no_change=3, max_iter=30, random_state=seed
        )
        return make_pipeline(StandardScaler(), network)

    return _each(case, *case.tables, make)


def _logistic(seed: int) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300, random_state=seed))


def _each(case: Case, learn: NDArray[np.float32], asked: NDArray[np.float32], make: Callable[[int], Any]) -> Probabilities:
    """(N, T): one classifier a target, fitted on the landmarks whose horizon has closed."""
    out = constant(case)
    for i in range(len(case.targets)):
        rows = case.learn.closed[:, i]
        label = case.learn.label[rows, i]
        if 0 < label.sum() < len(label):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of convergence and feature names
                out[:, i] = make(case.seed).fit(learn[rows], label).predict_proba(asked)[:, 1]
    return out
