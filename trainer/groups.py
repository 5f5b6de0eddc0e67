"""Groups of moments by what was known of the user: the number of events so far, tenure and silence; and calibration in each. Pure numpy.

A mean that is right can hide groups that are not: regulars are told to be leaving, newcomers to stay. Gate and report both look here. A
group is a tenth of the moments by one of the three; equal values share one, and moments right after an event are a group of their own.

A model is miscalibrated in a group where observed and expected outcomes differ
1. beyond noise: by more than the standard errors of all groups and targets together allow (Bonferroni), those of sums over users;
2. by much: what remains beyond noise is a factor of ODDS in the odds, and costs the group more log-loss than is tolerated on top of what
   the incumbent's own error costs it. The odds alone would convict a forecast of 0.6% where 0.3% come to pass.
A group counts only with enough users with and without an outcome.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from model.hazards import DAY_MS, HOUR_MS
from trainer.measures import EPSILON, Booleans, Floats, Interval, mass_bins

Kind = Literal["events", "tenure", "silence"]

TENTHS = 10
MOST = 3 * TENTHS + 1
"""Groups of a target."""
CONFIDENCE = 0.95
ODDS = 1.5
"""How far the odds of what came to pass may lie from what is expected, either way, beyond noise."""
_Z = 1.959964  # of a 95% interval
_MINUTE_MS = HOUR_MS // 60


@dataclass(frozen=True, slots=True)
class Past:
    """What was known of the user at each of N moments: the number of events so far, how long ago the first one was, and the last one."""

    events: NDArray[np.int64]
    tenure_ms: NDArray[np.int64]
    silent_ms: NDArray[np.int64]

    def where(self, rows: NDArray[np.int64] | NDArray[np.bool_]) -> Past:
        return Past(self.events[rows], self.tenure_ms[rows], self.silent_ms[rows])


@dataclass(frozen=True, slots=True)
class Group:
    """Some moments. least, most: what they have of the kind, in events or ms. rows: which moments."""

    kind: Kind
    least: int
    most: int
    rows: NDArray[np.int64]

    @property
    def range(self) -> str:
        """From where to where, for people: "38 to 120", "1.5 to 20 h"."""
        if self.kind == "events":
            return f"{self.least}" if self.least == self.most else f"{self.least} to {self.most}"
        if self.kind == "silence" and not self.most:
            return "right after an event"
        (low, unit), (high, other) = _duration(self.least), _duration(self.most)
        return f"{low} to {high} {other}" if unit == other else f"{low} {unit} to {high} {other}"

    @property
    def words(self) -> str:
        """Who it is, for people."""
        if self.kind == "events":
            return f"users with {self.range} event{'' if self.most == 1 else 's'}"
        if self.kind == "silence" and not self.most:
            return f"users {self.range}"
        return f"users {'known' if self.kind == 'tenure' else 'silent'} for {self.range}"


@dataclass(frozen=True, slots=True)
class Bounds:
    """errors: standard errors that are noise. users: how many a group needs with an outcome, and without. cost: nats a moment."""

    errors: float
    users: int
    cost: float


@dataclass(frozen=True, slots=True)
class Fault:
    """A group in which a model is miscalibrated. observed, expected: shares of the moments. cost: nats a moment, beyond noise."""

    group: Group
    observed: float
    expected: float
    cost: float

    @property
    def words(self) -> str:
        return f"for {self.group.words}, {self.observed:.1%} came to pass where it expects {self.expected:.1%}"


@dataclass(frozen=True, slots=True)
class Standing:
    """What came to pass in a group, with its 95% interval, and what each model expected. users: how many were asked about."""

    group: Group
    users: int
    observed: Interval
    expected: dict[str, float]

    def facts(self) -> dict[str, Any]:
        """For the report."""
        group = self.group
        who = {"kind": group.kind, "range": group.range, "moments": len(group.rows), "users": self.users}
        return {**who, "observed": self.observed, "expected": self.expected}


def groups(past: Past) -> list[Group]:
    """The groups by the number of events, by tenure and by silence, each from the least to the most."""
    out = []
    after_event = past.silent_ms == 0
    silence = np.zeros(len(after_event), np.int64)
    silence[~after_event] = 1 + _tenths(past.silent_ms[~after_event])
    kinds: tuple[tuple[Kind, NDArray[np.int64], NDArray[np.int64]], ...] = (
        ("events", past.events, _tenths(past.events)),
        ("tenure", past.tenure_ms, _tenths(past.tenure_ms)),
        ("silence", past.silent_ms, silence),
    )
    for kind, value, place in kinds:
        for number in np.unique(place):
            rows = np.flatnonzero(place == number)
            out.append(Group(kind, int(value[rows].min()), int(value[rows].max()), rows))
    return out


def standard_errors(targets: int) -> float:
    """How many standard errors are noise where so many targets are looked at, in all groups, either way."""
    return NormalDist().inv_cdf(1 - (1 - CONFIDENCE) / (2 * MOST * max(targets, 1)))


def faults(past: Past, user: NDArray[np.int64], y: Booleans, p: Floats, bounds: Bounds, incumbent: Floats | None = None) -> list[Fault]:
    """The groups in which `p` is miscalibrated, the costliest in all its moments first. incumbent: what the model in its place says."""
    out = []
    for group in groups(past):
        outcome, who = y[group.rows], user[group.rows]
        if min(len(np.unique(who[outcome])), len(np.unique(who[~outcome]))) < bounds.users:
            continue
        observed, expected = float(outcome.mean()), float(p[group.rows].mean())
        noise = bounds.errors * _error_of_mean(outcome - p[group.rows], who)
        nearest = float(np.clip(expected, observed - noise, observed + noise))
        before = 0.0 if incumbent is None else _cost(observed, float(incumbent[group.rows].mean()))
        cost = _cost(nearest, expected)
        if abs(_log_odds(nearest) - _log_odds(expected)) > np.log(ODDS) and cost > bounds.cost + before:
            out.append(Fault(group, observed, expected, cost))
    return sorted(out, key=lambda fault: -fault.cost * len(fault.group.rows))


def standings(past: Past, user: NDArray[np.int64], y: Booleans, said: Mapping[str, Floats]) -> list[Standing]:
    """Calibration in every group. said: probabilities (N,) by model."""
    out = []
    for group in groups(past):
        outcome, who = y[group.rows].astype(np.float64), user[group.rows]
        observed = float(outcome.mean())
        users = len(np.unique(who))
        interval = _interval(observed, _error_of_mean(outcome - observed, who), users)
        out.append(Standing(group, users, interval, {name: float(p[group.rows].mean()) for name, p in said.items()}))
    return out


def _tenths(value: NDArray[np.int64]) -> NDArray[np.int64]:
    return mass_bins(value.astype(np.float64), TENTHS)


def _error_of_mean(deviation: Floats, user: NDArray[np.int64]) -> float:
    """Standard error of the mean of deviations, where those of one user go together."""
    users, code = np.unique(user, return_inverse=True)
    total_U = np.bincount(code, deviation)
    return float(np.sqrt((total_U**2).sum() * len(users) / max(len(users) - 1, 1)) / len(deviation))


def _interval(share: float, error: float, users: int) -> Interval:
    """Wilson's (1927), of as many independent moments as would have this standard error; of as many as there are users, where it is 0."""
    n = share * (1 - share) / error**2 if error else float(users)
    centre = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z * float(np.sqrt(share * (1 - share) / n + _Z**2 / (4 * n * n))) / (1 + _Z**2 / n)
    return Interval(share, max(centre - half, 0.0), min(centre + half, 1.0))


def _cost(observed: float, expected: float) -> float:
    """Log-loss a moment, in nats, that a forecast of `expected` costs where `observed` is right."""
    o, e = (min(max(share, EPSILON), 1 - EPSILON) for share in (observed, expected))
    return float(o * np.log(o / e) + (1 - o) * np.log((1 - o) / (1 - e)))


def _log_odds(share: float) -> float:
    share = min(max(share, EPSILON), 1 - EPSILON)
    return float(np.log(share / (1 - share)))


def _duration(ms: int) -> tuple[str, str]:
    """Number and unit, for people."""
    for unit_ms, unit in ((DAY_MS, "days"), (HOUR_MS, "h")):
        if ms >= 1.5 * unit_ms:
            return f"{ms / unit_ms:.{0 if ms >= 10 * unit_ms else 1}f}", unit
    return f"{ms / _MINUTE_MS:.0f}", "min"
