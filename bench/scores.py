"""How good answers are: log-loss, AUC, calibration in the mean and by group, and how much of what can be known they know.

Everything is measured on the outcomes as they fell; where the exact probabilities are known, log-loss is also taken in expectation under
them, which has no sampling noise: the excess over the exact answers is then a mean of KL divergences.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from demo.attainable import auc
from trainer.measures import mass_bins

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
EPSILON = 1e-6
ECE_BINS = 15
GROUPS = 10
NOISE = 3.5
"""Standard errors beyond which a group counts as wrong; there are up to thirty groups in a row."""
ECE_DRAWS = 20
EXCESS, ECE_MARGIN = 0.001, 0.012
"""A row passes with so much log-loss above the best baseline, and so much ECE above that of a calibrated model, at most; an ECE no larger
than that of the exact answers is noise."""
LEAST_GAP = 2e-4
"""Log-loss between LightGBM and the exact answers; a share of less than that says nothing."""


@dataclass(frozen=True, slots=True)
class Groups:
    """user: (N,). luck: (N,) codes of questions whose outcomes go together. by: (N,) values to group by, by name."""

    user: Ints
    luck: Ints
    by: Mapping[str, Floats]


def measures(y: NDArray[np.bool_], p: Floats, exact: Floats | None) -> dict[str, float]:
    """auc, log_loss, ece, and expected: the log-loss expected under the exact probabilities, where they are known."""
    p = np.clip(p, EPSILON, 1 - EPSILON)
    out = {"auc": auc(y, p), "log_loss": float(losses(y, p).mean()), "ece": ece(y, p)}
    if exact is not None:
        out["expected"] = float(losses(exact, p).mean())
    return {name: round(value, 6) for name, value in out.items()}


def losses(y: NDArray[np.bool_] | Floats, p: Floats) -> Floats:
    """(N,) log-loss in nats, expected where y is a probability."""
    p = np.clip(p, EPSILON, 1 - EPSILON)
    return np.asarray(-(y * np.log(p) + (1 - y) * np.log1p(-p)))


def ece(y: NDArray[np.bool_], p: Floats) -> float:
    """Expected calibration error in bins of equal mass."""
    return float(np.abs(np.bincount(mass_bins(p, ECE_BINS), y - p, ECE_BINS)).sum() / len(p))


def ece_bound(p: Floats, luck: Ints, rng: np.random.Generator) -> float:
    """What a calibrated model with these predictions shows in the mean, since noise only ever adds to it, and a margin.

    luck: (N,) codes. Questions of one user within a horizon are about much the same events, so their outcomes are drawn together.
    """
    draws = (rng.random(luck.max() + 1)[luck] < p for _ in range(ECE_DRAWS))
    return float(ECE_MARGIN + np.mean([ece(y, p) for y in draws]))


def clustered(value: Floats, user: Ints) -> float:
    """Standard error of the mean of `value` (N,), moments of one user going together."""
    total = np.bincount(user, value - value.mean())
    return float(np.sqrt((total**2).sum()) / len(value))


def worst_group(y: NDArray[np.bool_], p: Floats, groups: Groups) -> dict[str, Any] | None:
    """The tenth, by any of these, whose mean prediction is farthest from the share that came true, among those beyond noise.

    The noise is the larger of two: users are drawn, and outcomes are.
    """
    worst: dict[str, Any] | None = None
    for name, value in groups.by.items():
        group = np.searchsorted(np.unique(np.quantile(value, np.linspace(0, 1, GROUPS + 1)[1:-1])), value, side="right")
        for g in np.unique(group):
            rows = group == g
            off = p[rows] - y[rows]
            of_users = np.bincount(groups.user[rows], off)
            error = np.sqrt(max((of_users**2).sum(), (p[rows] * (1 - p[rows])).sum()))
            gap, z = float(off.mean()), float(off.sum() / max(error, 1e-12))
            if abs(z) > NOISE and abs(gap) > abs(worst["gap"] if worst else 0):
                low, high = float(value[rows].min()), float(value[rows].max())
                worst = {"by": name, "from": round(low, 3), "to": round(high, 3), "gap": round(gap, 5), "z": round(z, 1)}
    return worst


def row(
    y: NDArray[np.bool_],
    exact: Floats | None,
    ours: Floats,
    rivals: Mapping[str, Floats],
    groups: Groups,
    constants: Mapping[str, Mapping[str, float]],
) -> dict[str, Any]:
    """All figures of one target and kind of question. constants: figures of baselines whose answers are not here.

    excess, its standard error and the best baseline: by the expected log-loss where it is known, and else by the outcomes.
    """
    found = {name: measures(y, p, exact) for name, p in {**rivals, "ours": ours}.items()}
    if exact is not None:
        found["exact"] = measures(y, exact, exact)
    key, truth = ("log_loss", y) if exact is None else ("expected", exact)
    others = {name: found[name][key] for name in rivals} | {name: c["log_loss"] for name, c in constants.items()}
    best = min(others, key=others.__getitem__)
    excess = found["ours"][key] - others[best]
    out: dict[str, Any] = {"questions": len(y), "base_rate": round(float(y.mean()), 5), "measures": found, "best": best}
    out["constants"] = {name: dict(c) for name, c in constants.items()}
    out["excess"] = round(excess, 6)
    if best in rivals:
        out["excess_error"] = round(clustered(losses(truth, ours) - losses(truth, rivals[best]), groups.user), 6)
        out["sampled_excess"] = round(found["ours"]["log_loss"] - min(found[name]["log_loss"] for name in rivals), 6)
    if exact is not None:
        out["closed"] = {of: closed(found, of) for of in ("expected", "log_loss")}
    bound = ece_bound(ours, groups.luck, np.random.default_rng(0))
    out["ece_bound"] = round(max(bound, found["exact"]["ece"] if exact is not None else 0.0), 5)
    out["worst_group"] = worst_group(y, ours, groups)
    out["passes"] = bool(excess <= EXCESS and found["ours"]["ece"] <= out["ece_bound"])
    return out


def closed(found: Mapping[str, Mapping[str, float]], key: str) -> float | None:
    """The share of the gap between LightGBM and the exact answers that ours closes."""
    gap = found["lightgbm"][key] - found["exact"][key]
    return round((found["lightgbm"][key] - found["ours"][key]) / gap, 3) if gap > LEAST_GAP else None
