"""Fitting the rhythm cell: expectation-maximisation over users' visits (Dempster, Laird & Rubin 1977; Yu 2010).

Each round says how likely each class is in each gap of each user, by the whole of the user's window; then each class's hazards are counted
anew: gaps that ended at a level, over those that lasted until there. Where a class has few gaps, its hazard is drawn to those of the
neighbouring levels, and these to all classes'.

Axis letters as in `model.rhythm`; U users, E events, L gaps that ended, in order of users and time.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from model.rhythm import KINDS, LEVELS, Rhythm, Visits
from trainer.dataset import by_rank, statistics_after
from trainer.material import Material

ROUNDS = 40
MOST_GAPS = 200_000
"""Of a set, that it is fitted on: more are a sample of the users."""
SMOOTH_LEVELS = 3.0
"""Standard deviation of the kernel over neighbouring levels."""
OWN, ALL = 6.0, 3.0
"""Gaps at risk by which a level is drawn to its neighbours, and these to all classes."""
SWITCH, SWITCH_VISITS = 0.02, 50.0
"""The prior: how often a visit ends a class, and the visits that say so."""

Floats = NDArray[np.float64]


@dataclass(slots=True)
class Gaps:
    """Of one event set. first: (U + 1,) where each user's begin. row: (L,) kind * LEVELS + level. last: (U,) the silence at the end."""

    first: NDArray[np.int64]
    row: NDArray[np.int64]
    last: NDArray[np.int64]


def fit_rhythm(rhythm: Rhythm, visits: Visits, material: Material, rng: np.random.Generator) -> None:
    """Fit the cell's tables to users' streams, up to the end of what was observed of the moments."""
    history, after = material.history, statistics_after(material.history, material.steps.slot)[material.history.first[1:] - 1]
    last_UK = visits.silences(after, np.full(history.users, material.end_ms))
    for k in range(rhythm.sets):
        ends = material.gap_EK[:, k] > 0
        first = np.concatenate([[0], np.cumsum(ends)])[history.first]
        survival, prior, switch = _mixture(_sampled(Gaps(first, material.gap_EK[ends, k] - 1, last_UK[:, k]), rng), rhythm.classes, rng)
        rhythm.survival_KICG[k] = torch.from_numpy(survival)
        rhythm.prior_KC[k] = torch.from_numpy(prior)
        rhythm.switch_K[k] = switch
    rhythm.refresh()


def _sampled(gaps: Gaps, rng: np.random.Generator) -> Gaps:
    count = np.diff(gaps.first)
    share = MOST_GAPS / max(len(gaps.row), 1)
    if share >= 1:
        return gaps
    kept = rng.random(len(count)) < share
    return Gaps(np.concatenate([[0], np.cumsum(count[kept])]), gaps.row[np.repeat(kept, count)], gaps.last[kept])


def _mixture(gaps: Gaps, classes: int, rng: np.random.Generator) -> tuple[Floats, Floats, float]:
    """(I, C, G) survival, (C,) prior, and the chance of a switch."""
    users, begins, active = by_rank(gaps.first)
    order = np.concatenate([begins[:n] + r for r, n in enumerate(active)]) if len(active) else np.zeros(0, np.int64)
    row, last = gaps.row[order], gaps.last[users]  # packed: by rank, then by falling count
    user = np.concatenate([np.arange(n) for n in active]) if len(active) else np.zeros(0, np.int64)
    bounds = np.concatenate([[0], np.cumsum(active)])
    w_LC, w_UC = _first_guess(row, user, last, classes, rng)
    prior, switch = w_UC.mean(0), SWITCH
    for _ in range(ROUNDS):
        hazard = _hazards(row, w_LC, last, w_UC)
        survival = np.cumprod(1 - hazard, axis=1)
        before = np.concatenate([np.ones_like(survival[:, :1]), survival[:, :-1]], 1)
        mass_XC = (before * hazard).clip(1e-9).reshape(KINDS * LEVELS, classes)
        lasts_XC = (before * np.sqrt(1 - hazard)).clip(1e-9).reshape(KINDS * LEVELS, classes)
        w_LC, w_UC, prior, switch = _expected(row, bounds, last, mass_XC, lasts_XC, prior, switch)
    survival_ICG: Floats = survival.transpose(0, 2, 1).astype(np.float64)
    return survival_ICG, prior, float(switch)


def _first_guess(
    row: NDArray[np.int64], user: NDArray[np.int64], last: NDArray[np.int64], classes: int, rng: np.random.Generator
) -> tuple[Floats, Floats]:
    """Users by pace, and of like pace by how even it is; those with few gaps are of all classes."""
    level, n = (row % LEVELS).astype(np.float64), len(last)
    count = np.bincount(user, minlength=n)
    mean = np.bincount(user, level, n) / np.maximum(count, 1)
    spread = np.sqrt(np.maximum(np.bincount(user, level**2, n) / np.maximum(count, 1) - mean**2, 0))
    told = np.flatnonzero(count >= 2)
    w_UC = np.full((n, classes), 1.0) + 0.2 * rng.random((n, classes))
    paces = max(1, classes // 2)
    if len(told) >= classes:
        by_pace = (np.argsort(np.argsort(mean[told], kind="stable"), kind="stable") * paces) // len(told)
        uneven = np.zeros(len(told), np.int64)
        for p in range(paces):
            own = by_pace == p
            uneven[own] = spread[told][own] > np.median(spread[told][own])
        w_UC[told, np.minimum(2 * by_pace + uneven, classes - 1)] += classes * 2.0
    w_UC /= w_UC.sum(1, keepdims=True)
    return w_UC[user], w_UC


def _hazards(row: NDArray[np.int64], w_LC: Floats, last: NDArray[np.int64], w_UC: Floats) -> Floats:
    """(I, G, C) of each kind, level and class, from how likely each class is in each gap."""
    classes = w_LC.shape[1]

    def counted(row_N: NDArray[np.int64], w_NC: Floats) -> Floats:
        count_XC: Floats = np.stack([np.bincount(row_N, w_C, KINDS * LEVELS) for w_C in w_NC.T], 1)
        return count_XC.reshape(KINDS, LEVELS, classes)

    ended, lasting = counted(row, w_LC), counted(last, w_UC)
    over = np.cumsum((ended + lasting)[:, ::-1], 1)[:, ::-1]  # lasted until this level, at least
    risk = over - 0.5 * lasting
    of_all = (_smooth(ended.sum(2, keepdims=True)) + 1e-3) / (_smooth(risk.sum(2, keepdims=True)) + 1)
    near = (_smooth(ended) + ALL * of_all) / (_smooth(risk) + ALL)
    hazard: Floats = (ended + OWN * near) / (risk + OWN)
    return hazard.clip(1e-7, 0.999)


def _smooth(x: Floats) -> Floats:
    reach = int(3 * SMOOTH_LEVELS)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / SMOOTH_LEVELS) ** 2)
    kernel /= kernel.sum()
    padded = np.pad(x, ((0, 0), (reach, reach), (0, 0)), mode="edge")
    out: Floats = sum(k * padded[:, i : i + LEVELS] for i, k in enumerate(kernel))
    return out


def _expected(
    row: NDArray[np.int64],
    bounds: NDArray[np.int64],
    last: NDArray[np.int64],
    mass_XC: Floats,
    lasts_XC: Floats,
    prior: Floats,
    switch: float,
) -> tuple[Floats, Floats, Floats, float]:
    """Forward and backward: ((L, C) and (U, C) how likely each class is, the next prior and switch)."""
    mass_LC, lasts_UC = mass_XC[row], lasts_XC[last]
    after_LC = np.empty_like(mass_LC)
    w_UC = np.tile(prior, (len(last), 1))
    for a, b in pairwise(bounds):
        after = w_UC[: b - a] * mass_LC[a:b]
        total = after.sum(1, keepdims=True)
        after_LC[a:b] = after = after / total
        w_UC[: b - a] = (1 - switch) * after + switch * prior
    end_UC = w_UC * lasts_UC
    total = end_UC.sum(1, keepdims=True)
    end_UC /= total
    ahead_UC = lasts_UC / lasts_UC.max(1, keepdims=True)
    w_LC, switches = np.empty_like(mass_LC), 0.0
    into = np.zeros_like(prior)
    for b, a in pairwise(bounds[::-1]):
        ahead = ahead_UC[: b - a]
        changed = switch * (ahead @ prior)[:, None]
        both = (1 - switch) * ahead + changed
        here = after_LC[a:b] * both
        total = here.sum(1, keepdims=True)
        w_LC[a:b] = here / total
        chance = changed / total  # of a change of class
        switches += float(chance.sum())
        into += (chance * (ahead * prior) / np.maximum(ahead @ prior, 1e-30)[:, None]).sum(0)
        ahead = mass_LC[a:b] * both
        ahead_UC[: b - a] = ahead / ahead.max(1, keepdims=True)
    first = end_UC.copy()
    if len(bounds) > 1:
        first[: bounds[1]] = w_LC[: bounds[1]]
    into += first.sum(0) + 1
    switch = (switches + SWITCH * SWITCH_VISITS) / (len(row) + SWITCH_VISITS)
    return w_LC, end_UC, into / into.sum(), switch
