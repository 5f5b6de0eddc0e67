"""Evaluating: the same questions to every model, about moments that none of them was trained on, as a worker asks them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from model.artifact import Model
from model.hazards import DAY_MS, horizon_weights
from model.targets import Target, event_sets
from trainer.dataset import AFTER_MS, ASKS, Landmarks, landmarks, thinned
from trainer.groups import Past
from trainer.history import History
from trainer.material import Material, states_along

Probabilities = NDArray[np.float64]


@dataclass(slots=True)
class Exam:
    """Moments of the test window, L of them, and for each target which of them can be judged, and what came to pass.

    asked: targets with the horizon that the window can judge. rows: for each, the moments whose horizon ends within the window.
    labels: for each, the outcome at those rows. shortened: names of targets whose own horizon is longer than the window can judge.
    """

    history: History
    moments: Landmarks
    asked: tuple[Target, ...]
    rows: tuple[NDArray[np.int64], ...]
    labels: tuple[NDArray[np.bool_], ...]
    shortened: tuple[str, ...]

    @property
    def users(self) -> NDArray[np.int64]:
        """(L,) the user asked about."""
        return self.history.user[self.moments.event]

    @property
    def past(self) -> Past:
        """(L,) what was known of the user by then."""
        history, event, at_ms = self.history, self.moments.event, self.moments.at_ms
        first = history.first[history.user[event]]
        return Past(event - first + 1, at_ms - history.time_ms[first], at_ms - history.time_ms[event] - AFTER_MS)


def test_begin(test_ms: int, end_ms: int, champion_end_ms: int | None) -> int:
    """Where a test window that neither has seen begins, if at least half of [test, end) is left; else where it was planned."""
    unseen_ms = max(test_ms, champion_end_ms or test_ms)
    return unseen_ms if end_ms - unseen_ms >= (end_ms - test_ms) / 2 else test_ms


def set_exam(
    history: History, targets: Sequence[Target], begin_ms: int, end_ms: int, rng: np.random.Generator, at_most: int = 40_000
) -> Exam:
    """Questions about [begin, end): after events, and at silent ages."""
    sets = event_sets(tuple(targets))
    moments = thinned(landmarks(history, sets, begin_ms, end_ms, rng, draws=ASKS), rng, at_most)
    longest_ms = max((end_ms - begin_ms) // 2, 1)
    asked = tuple(t.model_copy(update={"horizon_ms": min(t.horizon_ms, longest_ms)}) for t in targets)
    rows = tuple(np.flatnonzero(moments.observed_ms >= t.horizon_ms) for t in asked)
    labels = []
    for target, row in zip(asked, rows, strict=True):
        occurs = moments.wait_ms[row, sets.index(target.types)] < target.horizon_ms
        labels.append(occurs if target.outcome == "occurs" else ~occurs)
    shortened = tuple(t.name for t, a in zip(targets, asked, strict=True) if a.horizon_ms < t.horizon_ms)
    return Exam(history, moments, asked, rows, tuple(labels), shortened)


def answers(exam: Exam, model: Model) -> tuple[Probabilities, ...]:
    """For each target, what the model says at the exam's rows. Raises ArtifactError where it has no head for a target."""
    scorer = model.scorer(exam.asked)
    hidden_EH, stats = states_along(model, exam.history)
    event = exam.moments.event
    p_LT = scorer(hidden_EH[torch.from_numpy(event)], stats[event], exam.moments.at_ms).astype(np.float64)
    return tuple(p_LT[row, i] for i, row in enumerate(exam.rows))


def constant_hazards(material: Material, edges_ms: Sequence[int]) -> NDArray[np.float64]:
    """(K, B) hazards of everybody alike: events over moments at risk. Bins never under observation go on at the last known rate."""
    weight = torch.from_numpy(material.moments.weight)
    event_KB = torch.einsum("l,lkb->kb", weight, material.event_LKB.float()).double().numpy()
    risk_KB = torch.einsum("l,lkb->kb", weight, material.mask_LKB.float()).double().numpy()
    width_B = np.diff(np.concatenate([[0], np.asarray(edges_ms, np.float64)])) / DAY_MS
    hazard_KB = (event_KB + 0.5) / (risk_KB + 1)
    for k in range(len(hazard_KB)):
        rate = 1e-3  # a day
        for b in range(len(width_B)):
            if risk_KB[k, b] > 0:
                rate = -np.log1p(-min(hazard_KB[k, b], 0.999)) / width_B[b]
            else:
                hazard_KB[k, b] = -np.expm1(-rate * width_B[b])
    out: NDArray[np.float64] = np.clip(hazard_KB, 1e-6, 0.999)
    return out


def constant_answers(
    exam: Exam, hazard_KB: NDArray[np.float64], targets: Sequence[Target], edges_ms: Sequence[int]
) -> tuple[Probabilities, ...]:
    """What the constant hazard says at the exam's rows."""
    sets = event_sets(tuple(targets))
    weights_BT = horizon_weights(edges_ms, [t.horizon_ms for t in exam.asked]).astype(np.float64)
    said = []
    for i, (target, row) in enumerate(zip(exam.asked, exam.rows, strict=True)):
        absent = float(np.exp(np.log1p(-hazard_KB[sets.index(target.types)]) @ weights_BT[:, i]))
        said.append(np.full(len(row), absent if target.outcome == "absent" else 1 - absent))
    return tuple(said)
