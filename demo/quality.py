"""How good the published scores are: their AUC beside the best attainable one, at the same users and moments.

A score counts once its horizon has closed: what it foretold has come to pass by then, or has not. The truth is the stream that was fed.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from demo.attainable import Filter, Target, auc, labels
from demo.shop import Floats, Ints
from demo.stream import Stream

ENOUGH = 30
"""Scores of each outcome that an AUC takes at least."""


@dataclass(frozen=True)
class Measure:
    """count: scores whose horizon has closed. published, attainable: AUC; None where it cannot be told."""

    count: int
    published: float | None
    attainable: float | None


class Quality:
    """The live scores so far. Holds 16 bytes and a number a target for each."""

    def __init__(self, stream: Stream, targets: dict[str, Target]) -> None:
        self.targets = targets
        self._stream = stream
        self._filter = Filter(stream.law, stream.history, stream.drift) if stream.law else None
        self._user, self._at_ms = array("i"), array("q")
        self._published = {name: array("f") for name in targets}
        self._best: dict[str, Floats] = {name: np.zeros(0) for name in targets}

    def add(self, user: int, at_ms: int, scores: dict[str, float]) -> None:
        """A score that was published; `user` is the index in the stream's users. Those of the history do not count."""
        if at_ms < self._stream.live_ms:
            return
        self._user.append(user)
        self._at_ms.append(at_ms)
        for name, published in self._published.items():
            published.append(scores[name])

    def measure(self, now_ms: int) -> dict[str, Measure]:
        """By target, of all scores whose horizon closes by `now_ms`, which must not lie after the stream's end."""
        user, at_ms = np.array(self._user, np.int64), np.array(self._at_ms, np.int64)
        self._attain(user, at_ms)
        return {name: self._measure(name, user, at_ms, now_ms) for name in self.targets}

    def excess(self, begin_ms: int, end_ms: int) -> dict[str, float]:
        """By target, the log-loss that the law expects of the scores of [begin, end) beyond the best attainable one, nats; NaN of none.

        It needs no outcomes, and knows no noise but that of who was asked about. The law must be known.
        """
        assert self._filter
        at_ms = np.array(self._at_ms, np.int64)
        self._attain(np.array(self._user, np.int64), at_ms)
        inside = np.flatnonzero((at_ms >= begin_ms) & (at_ms < end_ms))
        return {name: self._excess(name, inside) for name in self.targets}

    def _excess(self, name: str, rows: Ints) -> float:
        if not len(rows):
            return float("nan")
        t, p = (np.clip(np.asarray(said, np.float64)[rows], 1e-9, 1 - 1e-9) for said in (self._best[name], self._published[name]))
        return float((t * np.log(t / p) + (1 - t) * np.log((1 - t) / (1 - p))).mean())

    def _measure(self, name: str, user: Ints, at_ms: Ints, now_ms: int) -> Measure:
        target = self.targets[name]
        closed = at_ms + target[2] <= now_ms
        truth = labels(self._stream.history, user[closed], at_ms[closed], target)
        count = int(closed.sum())
        if min(truth.sum(), (~truth).sum()) < ENOUGH:
            return Measure(count, None, None)
        published: NDArray[np.float32] = np.array(self._published[name], np.float32)
        best = auc(truth, self._best[name][closed]) if self._filter else None
        return Measure(count, auc(truth, published[closed]), best)

    def _attain(self, user: Ints, at_ms: Ints) -> None:
        """The exact filter's answers to what was added since the last time."""
        if self._filter is None:
            return
        done = len(next(iter(self._best.values())))
        if done < len(user):
            new = self._filter.probabilities(user[done:], at_ms[done:], self.targets)
            self._best = {name: np.concatenate([self._best[name], new[name]]) for name in self.targets}
