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

from model.hazards import DAY_MS
from model.rhythm import ENDS_MS, KINDS, LEVELS, Rhythm, Visits
from model.statistics import VISIT_GAP_MS
from trainer.dataset import by_rank, statistics_after
from trainer.history import History
from trainer.material import Material

ROUNDS = 40
MOST_GAPS = 200_000
"""Of a set, that it is fitted on: more are a sample of the users."""
SHARES = (0.25, 0.5, 1.0)
"""Of the classes, that are tried: users held out say how many there are."""
HELD_OUT = 5
"""One user in so many."""
SMOOTH_LEVELS = 3.0
"""Standard deviation of the kernel over neighbouring levels."""
OWN, ALL = 6.0, 3.0
"""Gaps at risk by which a level is drawn to its neighbours, and these to all classes."""
SWITCH, SWITCH_VISITS = 0.02, 50.0
"""The prior: how often a visit ends a class, and the visits that say so."""
LEAST_AT_RISK = 10.0
"""Gaps that must have lasted until a level for it to be known of."""
LEAST = 1e-9
"""Of a probability."""

Floats = NDArray[np.float64]
_WIDTH_G1 = np.diff(np.concatenate([[0], ENDS_MS, [2 * ENDS_MS[-1]]]))[:, None] / DAY_MS


@dataclass(slots=True)
class Gaps:
    """Of one event set. first: (U + 1,) where each user's begin. row: (L,) kind * LEVELS + level. last: (U,) the silence at the end."""

    first: NDArray[np.int64]
    row: NDArray[np.int64]
    last: NDArray[np.int64]

    def of(self, kept_U: NDArray[np.bool_]) -> Gaps:
        """Some users'."""
        count = np.diff(self.first)
        return Gaps(np.concatenate([[0], np.cumsum(count[kept_U])]), self.row[np.repeat(kept_U, count)], self.last[kept_U])


@dataclass(slots=True)
class Mixture:
    """hazard_XC: by kind and level. prior_C: shares of the classes. switch: chance that a visit ends a class."""

    hazard_XC: Floats
    prior_C: Floats
    switch: float

    @property
    def survival_ICG(self) -> Floats:
        """P(gap > the level's end)."""
        hazard_IGC: Floats = self.hazard_XC.reshape(KINDS, LEVELS, -1)
        return np.cumprod(1 - hazard_IGC, axis=1, dtype=np.float64).transpose(0, 2, 1)


def fit_rhythm(rhythm: Rhythm, visits: Visits, material: Material, rng: np.random.Generator) -> None:
    """Fit the cell's tables to users' streams, up to the end of what was observed of the moments."""
    history, after = material.history, statistics_after(material.history, material.steps.slot)[material.history.first[1:] - 1]
    last_UK = visits.silences(after, np.full(history.users, material.end_ms))
    for k in range(rhythm.sets):
        ends = material.gap_EK[:, k] > 0
        gaps = Gaps(np.concatenate([[0], np.cumsum(ends)])[history.first], material.gap_EK[ends, k] - 1, last_UK[:, k])
        mixture = _chosen(gaps.of(rng.random(history.users) < MOST_GAPS / max(len(gaps.row), 1)), rhythm.classes, rng)
        used = len(mixture.prior_C)
        rhythm.survival_KICG[k, :, :used] = torch.from_numpy(mixture.survival_ICG).float()
        rhythm.survival_KICG[k, 1] *= 1 - _goes_on(history, visits.member_VK[material.steps.slot, k])
        rhythm.prior_KC[k] = 0
        rhythm.prior_KC[k, :used] = torch.from_numpy(mixture.prior_C).float()
        rhythm.switch_K[k] = mixture.switch
    rhythm.refresh()


def _goes_on(history: History, member_E: NDArray[np.bool_]) -> float:
    """How often an event of a set is followed by another of the same visit. Of events at one time, the last is asked about."""
    user, time_ms = history.user[member_E], history.time_ms[member_E]
    gap_ms = np.where(np.diff(user) == 0, np.diff(time_ms), VISIT_GAP_MS + 1)
    return float(((gap_ms > 0) & (gap_ms <= VISIT_GAP_MS)).sum() / max((gap_ms > 0).sum(), 1))


def _chosen(gaps: Gaps, classes: int, rng: np.random.Generator) -> Mixture:
    """A mixture of as many classes as do best on users held out."""
    held_U = rng.permutation(len(gaps.last)) % HELD_OUT == 0
    learn, held = Streams(gaps.of(~held_U)), Streams(gaps.of(held_U))
    tried = sorted({max(1, round(share * classes)) for share in SHARES})
    said = [held.expected(_fitted(learn, count, rng))[0] for count in tried]
    return _fitted(Streams(gaps), tried[int(np.argmax(said))], rng)


def _fitted(streams: Streams, classes: int, rng: np.random.Generator) -> Mixture:
    w_LC, w_UC = streams.first_guess(classes, rng)
    mixture = Mixture(streams.hazards(w_LC, w_UC), np.full(classes, 1 / classes), SWITCH)
    for _ in range(ROUNDS):
        _, w_LC, w_UC, prior_C, switch = streams.expected(mixture)
        mixture = Mixture(streams.hazards(w_LC, w_UC), prior_C, switch)
    return mixture


class Streams:
    """Users' gaps, packed by rank: all users' first gaps, then their second, users of most gaps first."""

    def __init__(self, gaps: Gaps) -> None:
        users, begins, active = by_rank(gaps.first)
        self.bounds = np.concatenate([[0], np.cumsum(active)]).astype(np.int64)
        self.user = np.arange(self.bounds[-1]) - np.repeat(self.bounds[:-1], active)
        rank = np.repeat(np.arange(len(active)), active)
        self.row, self.last = gaps.row[begins[self.user] + rank], gaps.last[users]

    def first_guess(self, classes: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
        """(L, C), (U, C) how likely each class is: users by pace, and those of like pace by how even it is; with few gaps, all alike."""
        level, n = (self.row % LEVELS).astype(np.float64), len(self.last)
        count = np.bincount(self.user, minlength=n)
        mean = np.bincount(self.user, level, n) / np.maximum(count, 1)
        spread = np.sqrt(np.maximum(np.bincount(self.user, level**2, n) / np.maximum(count, 1) - mean**2, 0))
        told = np.flatnonzero(count >= 2)
        told = told[np.argsort(mean[told], kind="stable")]
        w_UC = 1.0 + 0.2 * rng.random((n, classes))
        for c, alike in enumerate(np.array_split(told, -(-classes // 2))):
            calm = spread[alike] <= np.median(spread[alike]) if len(alike) else np.zeros(0, bool)
            w_UC[alike[calm], 2 * c] += 2.0 * classes
            w_UC[alike[~calm], min(2 * c + 1, classes - 1)] += 2.0 * classes
        w_UC /= w_UC.sum(1, keepdims=True)
        return w_UC[self.user], w_UC

    def hazards(self, w_LC: Floats, w_UC: Floats) -> Floats:
        """(X, C) from how likely each class is in each gap: gaps that ended at a level, over those that lasted until there."""
        classes = w_LC.shape[1]

        def counted(row_N: NDArray[np.int64], w_NC: Floats) -> Floats:
            count_XC: Floats = np.stack([np.bincount(row_N, w_C, KINDS * LEVELS) for w_C in w_NC.T], 1)
            return count_XC.reshape(KINDS, LEVELS, classes)

        ended, lasting = counted(self.row, w_LC), counted(self.last, w_UC)
        risk = np.cumsum((ended + lasting)[:, ::-1], 1)[:, ::-1] - 0.5 * lasting
        # Levels are of different lengths, so neighbours are alike by their rates.
        of_all = np.stack([_rate_of_all(*of_kind) for of_kind in zip(ended.sum(2), risk.sum(2), strict=True)])[:, :, None]
        rate = (_smooth(ended) + ALL * of_all * _WIDTH_G1) / (_smooth(risk * _WIDTH_G1) + ALL * _WIDTH_G1)
        hazard: Floats = (ended - OWN * np.expm1(-rate * _WIDTH_G1)) / (risk + OWN)
        return hazard.clip(1e-7, 0.999).reshape(KINDS * LEVELS, classes)

    def expected(self, mixture: Mixture) -> tuple[float, Floats, Floats, Floats, float]:
        """Forward and backward: the mean log-likelihood of a user; (L, C) and (U, C) how likely each class is in each gap that ended, and
        in the last; the next prior and switch."""
        hazard_IGC, prior, switch = mixture.hazard_XC.reshape(KINDS, LEVELS, -1), mixture.prior_C, mixture.switch
        before = np.cumprod(np.concatenate([np.ones_like(hazard_IGC[:, :1]), 1 - hazard_IGC[:, :-1]], 1), axis=1)
        mass_LC = (before * hazard_IGC).clip(LEAST).reshape(KINDS * LEVELS, -1)[self.row]
        lasts_UC = (before * np.sqrt(1 - hazard_IGC)).clip(LEAST).reshape(KINDS * LEVELS, -1)[self.last]
        after_LC, w_UC, said = np.empty_like(mass_LC), np.tile(prior, (len(self.last), 1)), 0.0
        for a, b in pairwise(self.bounds):
            after = w_UC[: b - a] * mass_LC[a:b]
            total = after.sum(1, keepdims=True)
            said += float(np.log(total).sum())
            after_LC[a:b] = after = after / total
            w_UC[: b - a] = (1 - switch) * after + switch * prior
        end_UC = w_UC * lasts_UC
        total = end_UC.sum(1, keepdims=True)
        said += float(np.log(total).sum())
        end_UC /= total

        ahead_UC = lasts_UC / lasts_UC.max(1, keepdims=True)
        w_LC, switches, into = np.empty_like(mass_LC), 0.0, np.ones_like(prior)
        for b, a in pairwise(self.bounds[::-1]):
            ahead = ahead_UC[: b - a]
            by_prior = (ahead @ prior)[:, None]
            both = (1 - switch) * ahead + switch * by_prior
            here = after_LC[a:b] * both
            total = here.sum(1, keepdims=True)
            w_LC[a:b] = here / total
            changed = switch * by_prior / total  # the chance that the class changed after this visit
            switches += float(changed.sum())
            into += (changed * ahead * prior / by_prior).sum(0)
            ahead = mass_LC[a:b] * both
            ahead_UC[: b - a] = ahead / ahead.max(1, keepdims=True)
        begun = end_UC.copy()
        begun[: self.bounds[1] if len(self.bounds) > 1 else 0] = w_LC[: self.bounds[1] if len(self.bounds) > 1 else 0]
        into += begun.sum(0)
        switch = (switches + SWITCH * SWITCH_VISITS) / (len(self.row) + SWITCH_VISITS)
        return said / max(len(self.last), 1), w_LC, end_UC, into / into.sum(), switch


def _rate_of_all(ended_G: Floats, risk_G: Floats) -> Floats:
    """(G,) gaps that end a day, by level. Beyond what the window is long enough to show, the last known rate goes on."""
    ended_G, exposed_G, risk_G = (_smooth(x_G[None, :, None])[0, :, 0] for x_G in (ended_G, risk_G * _WIDTH_G1[:, 0], risk_G))
    rate_G: Floats = (ended_G + LEAST) / (exposed_G + 1.0)
    known = np.flatnonzero(risk_G >= LEAST_AT_RISK)
    rate_G[known[-1] + 1 if len(known) else 0 :] = rate_G[known[-1]] if len(known) else LEAST
    return rate_G


def _smooth(x_IGC: Floats) -> Floats:
    reach = int(3 * SMOOTH_LEVELS)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / SMOOTH_LEVELS) ** 2)
    padded = np.pad(x_IGC, ((0, 0), (reach, reach), (0, 0)), mode="edge")
    out: Floats = sum(k * padded[:, i : i + LEVELS] for i, k in enumerate(kernel / kernel.sum()))
    return out
