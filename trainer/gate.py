"""The gate: may the challenger replace the incumbent? A pure function of what both said of the same moments, and of a seed.

Both are compared on the same moments by a paired bootstrap over users (Efron & Tibshirani, "An Introduction to the Bootstrap", 1993,
ch. 8): moments of one user go together, so that a few talkative users do not pass for evidence. The challenger is held back where
1. it says anything that is no probability, or the same of everybody,
2. a target is worse than the incumbent's, in log-loss or AUC, by more than the tolerance and beyond noise (95%),
3. it is badly calibrated, and worse so than the incumbent,
4. nothing can be judged, because too few users had an outcome.
A first model has no champion before it. Its incumbent is the constant hazard, which it must beat beyond noise in at least one target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.measures import Floats, WeightedAuc, losses, summary

RESAMPLES = 200


@dataclass(frozen=True, slots=True)
class Tolerance:
    """log_loss, auc: how much worse a target may be, beyond noise. max_ece: calibration error. min_outcomes: users of each class."""

    log_loss: float = 0.002
    auc: float = 0.002
    max_ece: float = 0.1
    min_outcomes: int = 30


@dataclass(frozen=True, slots=True)
class Judged:
    """What came of one target, and what each model had said, all (N,) on the same moments. user: who; label: what came to pass."""

    target: str
    horizon_ms: int
    user: NDArray[np.int64]
    label: NDArray[np.bool_]
    challenger: Floats
    incumbent: Floats


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether to promote, why in one sentence, and the figures behind it by target."""

    promote: bool
    reason: str
    figures: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Verdict:
    figures: dict[str, Any]
    objection: str
    better: bool
    judged: bool


def decide(judged: Sequence[Judged], *, first: bool, tolerance: Tolerance, rng: np.random.Generator) -> Decision:
    """The gate's decision. `first`: the incumbent is the constant hazard, not a champion."""
    verdicts = [_verdict(j, tolerance, rng, "the constant hazard" if first else "the champion") for j in judged]
    figures = {j.target: v.figures for j, v in zip(judged, verdicts, strict=True)}
    objections = [v.objection for v in verdicts if v.objection]
    if objections:
        return Decision(False, "; ".join(objections), figures)
    if not any(v.judged for v in verdicts):
        return Decision(
            False,
            f"too few outcomes in the test window: no target has {tolerance.min_outcomes} users with and without its outcome",
            figures,
        )
    if first and not any(v.better for v in verdicts):
        return Decision(False, "it does not beat the constant hazard beyond noise in any target", figures)
    gains = ", ".join(
        f"{j.target} log-loss {v.figures['challenger']['log_loss']:.4f} against {v.figures['incumbent']['log_loss']:.4f}"
        for j, v in zip(judged, verdicts, strict=True)
        if v.judged
    )
    return Decision(True, f"{'beats the constant hazard' if first else 'no worse than the champion'}: {gains}", figures)


def _verdict(judged: Judged, tolerance: Tolerance, rng: np.random.Generator, incumbent: str) -> _Verdict:
    y, p, q = judged.label, judged.challenger, judged.incumbent
    name = judged.target
    figures: dict[str, Any] = {"horizon_days": round(judged.horizon_ms / 86_400_000, 2), "moments": len(y), "positives": int(y.sum())}
    if not np.isfinite(p).all() or (len(p) and (p.min() < 0 or p.max() > 1)):
        return _Verdict(figures, f"{name}: it gives something that is no probability", False, True)
    figures |= {"challenger": summary(y, p), "incumbent": summary(y, q)}
    users_with, users_without = (len(np.unique(judged.user[y == outcome])) for outcome in (True, False))
    figures |= {"users_with": users_with, "users_without": users_without}
    if min(users_with, users_without) < tolerance.min_outcomes:
        return _Verdict(figures | {"judged": False}, "", False, False)
    if p.max() - p.min() < 1e-4:
        return _Verdict(figures, f"{name}: it says {p.mean():.4f} of everybody", False, True)
    worse_loss, worse_auc = _paired(judged, rng)
    figures |= {"judged": True, "worse_log_loss": _interval(worse_loss), "worse_auc": _interval(worse_auc)}
    ece, ece_before = figures["challenger"]["ece"], figures["incumbent"]["ece"]
    objections = []
    if np.quantile(worse_loss, 0.05) > tolerance.log_loss:
        objections.append(f"log-loss is worse than that of {incumbent} by {worse_loss.mean():.4f}")
    if np.quantile(worse_auc, 0.05) > tolerance.auc:
        objections.append(f"AUC is worse than that of {incumbent} by {worse_auc.mean():.4f}")
    if ece > max(tolerance.max_ece, ece_before):
        objections.append(f"its calibration error is {ece:.3f}, more than {max(tolerance.max_ece, ece_before):.3f}")
    return _Verdict(figures, f"{name}: {' and '.join(objections)}" if objections else "", bool(np.quantile(worse_loss, 0.95) < 0), True)


def _paired(judged: Judged, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """(RESAMPLES,) by how much the challenger is worse than the incumbent in log-loss and in AUC, on users drawn with replacement."""
    _, user = np.unique(judged.user, return_inverse=True)
    users = int(user.max()) + 1
    y = judged.label
    difference = losses(y, judged.challenger) - losses(y, judged.incumbent)
    aucs = [WeightedAuc(y, p) for p in (judged.challenger, judged.incumbent)]
    out = np.empty((2, RESAMPLES))
    for i in range(RESAMPLES):
        weight = np.bincount(rng.integers(0, users, users), minlength=users)[user].astype(np.float64)
        challenger, incumbent = (a(weight) for a in aucs)
        out[:, i] = difference @ weight / weight.sum(), incumbent - challenger
    return out[0], out[1]


def _interval(values: Floats) -> list[float]:
    return [round(float(v), 5) for v in (np.quantile(values, 0.05), values.mean(), np.quantile(values, 0.95))]
