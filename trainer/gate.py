"""The gate: may the challenger replace the incumbent? A pure function of what both said of the same moments, and of a seed.

Both are compared on the same moments by a paired bootstrap over users (Efron & Tibshirani, "An Introduction to the Bootstrap", 1993,
ch. 8): moments of one user go together, so that a few talkative users do not pass for evidence. The noise falls on the challenger: it
has to show that it does no harm (a non-inferiority test; Piaggio et al., JAMA 2012), so a window too small to tell promotes nobody.
1. Leaks: its weights must know nothing of the moments it is judged on. That is told by its window; to look too good proves nothing.
2. Sanity: probabilities only, not the same of everybody, and seldom a certainty.
3. No harm, in every target: log-loss, with 95% confidence, is worse by less than the tolerance. That all targets pass costs no
   confidence (Berger, Technometrics 1982). Nor may it be worse beyond noise in AUC, or right after events, or in silences, or in a
   target that has too few outcomes to be judged: such a one cannot clear anybody, but it can convict.
4. Calibration, in every target, beyond noise: the mean error over bins (ECE), expected against observed outcomes, and the slope of a
   logistic recalibration (Cox, Biometrika 1958). A bound is stretched to what the champion itself reaches, for drift moves levels.
5. Calibration by group, in every target, beyond noise: by number of events, tenure and silence (`trainer.groups`). The bound is stretched
   by the champion's own error in the same group. A first model's is not: the constant hazard tells no group from another.
6. A reason: better beyond noise in some target (Bonferroni over the targets), or no worse and fresher. Where freshness is all there is,
   a target of few outcomes has to show no harm, too: heads fitted on shuffled events look no worse where churn alone can be judged.
A first model has no champion before it. Its incumbent is the constant hazard, which it must beat beyond noise in at least one target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.groups import Bounds, Past, faults, standard_errors
from trainer.measures import ECE_BINS, EPSILON, Floats, WeightedAuc, losses, summary

RESAMPLES = 200
CONFIDENCE = 0.95
ONE_SIDED = 1.645
"""Standard errors to the 95% quantile of a normal distribution."""
CERTAIN = 1e-6
MOST_CERTAIN = 0.2
"""Share of answers that may lie within CERTAIN of 0 or of 1."""
FACTOR = 1.5
"""How far observed over expected outcomes, and the slope of recalibration, may lie from 1, either way."""


@dataclass(frozen=True, slots=True)
class Tolerance:
    """log_loss: how much worse a target may be, noise included; auc: the same, beyond noise. max_ece: calibration error, beyond noise.

    min_outcomes: users of each class that a target needs to be judged.
    """

    log_loss: float = 0.005
    auc: float = 0.002
    max_ece: float = 0.05
    min_outcomes: int = 30


@dataclass(frozen=True, slots=True)
class Windows:
    """challenger_end_ms, champion_end_ms: where the events end that each was fitted on; None: no champion. test_ms: the first judged.

    judges_end_ms: where those end that the challenger was fitted on of the users who are judged; None: at challenger_end_ms, too.
    """

    challenger_end_ms: int
    champion_end_ms: int | None
    test_ms: int
    judges_end_ms: int | None = None


@dataclass(frozen=True, slots=True)
class Judged:
    """What came of one target, and what each model had said, all (N,) on the same moments.

    user: who. past: what was known of the user. label: what came to pass.
    """

    target: str
    horizon_ms: int
    user: NDArray[np.int64]
    past: Past
    label: NDArray[np.bool_]
    challenger: Floats
    incumbent: Floats

    @property
    def silent(self) -> NDArray[np.bool_]:
        """Asked in a silence, not right after an event."""
        return self.past.silent_ms > 0


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether to promote, why in one sentence, and the figures behind it by target."""

    promote: bool
    reason: str
    figures: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Verdict:
    """objections: what speaks against it. doubt: what few outcomes leave open, "" for nothing."""

    figures: dict[str, Any]
    objections: tuple[str, ...]
    better: bool
    judged: bool
    doubt: str = ""


def decide(judged: Sequence[Judged], *, windows: Windows, tolerance: Tolerance, rng: np.random.Generator) -> Decision:
    """The gate's decision."""
    first = windows.champion_end_ms is None
    incumbent = "the constant hazard" if first else "the champion"
    verdicts = [_verdict(j, tolerance, rng, first, len(judged)) for j in judged]
    figures = {j.target: v.figures for j, v in zip(judged, verdicts, strict=True)}
    if (windows.challenger_end_ms if windows.judges_end_ms is None else windows.judges_end_ms) > windows.test_ms:
        return Decision(False, "its training window reaches into the test window, so nothing it says there proves anything", figures)
    if any(v.objections for v in verdicts):
        objections = (f"{j.target}: {' and '.join(v.objections)}" for j, v in zip(judged, verdicts, strict=True) if v.objections)
        return Decision(False, "; ".join(objections), figures)
    if not any(v.judged for v in verdicts):
        return Decision(
            False,
            f"too few outcomes in the test window: no target has {tolerance.min_outcomes} users with and without its outcome",
            figures,
        )
    better = any(v.better for v in verdicts)
    if first and not better:
        return Decision(False, "it does not beat the constant hazard beyond noise in any target", figures)
    if windows.champion_end_ms is not None and not better and windows.challenger_end_ms <= windows.champion_end_ms:
        return Decision(False, "neither better than the champion beyond noise in any target, nor fresher", figures)
    doubts = [f"{j.target}: {v.doubt}" for j, v in zip(judged, verdicts, strict=True) if v.doubt]
    if doubts and not better:
        return Decision(False, f"fresher, but not better beyond noise in any target; {'; '.join(doubts)}", figures)
    gains = ", ".join(
        f"{j.target} log-loss {v.figures['challenger']['log_loss']:.4f} against {v.figures['incumbent']['log_loss']:.4f}"
        for j, v in zip(judged, verdicts, strict=True)
        if v.judged
    )
    word = "beats" if first else "better than" if better else "fresher, and no worse than"
    return Decision(True, f"{word} {incumbent}: {gains}", figures)


def _verdict(judged: Judged, tolerance: Tolerance, rng: np.random.Generator, first: bool, targets: int) -> _Verdict:
    y, p, q = judged.label, judged.challenger, judged.incumbent
    incumbent = "the constant hazard" if first else "the champion"
    figures: dict[str, Any] = {"horizon_days": round(judged.horizon_ms / 86_400_000, 2), "moments": len(y), "positives": int(y.sum())}
    if not np.isfinite(p).all() or (len(p) and (p.min() < 0 or p.max() > 1)):
        return _Verdict(figures, ("it gives something that is no probability",), False, True)
    figures |= {"challenger": summary(y, p), "incumbent": summary(y, q)}
    if len(p) and p.max() - p.min() < 1e-4:
        return _Verdict(figures, (f"it says {p.mean():.4f} of everybody",), False, True)
    certain = float(np.mean(np.minimum(p, 1 - p) < CERTAIN)) if len(p) else 0.0
    if certain > MOST_CERTAIN:
        return _Verdict(figures, (f"it is saturated: {certain:.0%} of its answers are certainties",), False, True)
    users_with, users_without = (len(np.unique(judged.user[y == outcome])) for outcome in (True, False))
    figures |= {"users_with": users_with, "users_without": users_without}
    if min(users_with, users_without) < tolerance.min_outcomes:
        figures["judged"] = False
        if first or not len(y):
            return _Verdict(figures, (), False, False)
        loss = _paired(judged, rng)["log_loss"]
        least, most = (float(np.quantile(loss, q)) for q in (1 - CONFIDENCE, CONFIDENCE))
        harm = f"log-loss is worse than that of {incumbent} by {loss.mean():.4f}, few as the outcomes are"
        doubt = f"log-loss may be worse than that of {incumbent} by {most:.4f}, and there are too few outcomes to tell"
        objections = [harm] if least > tolerance.log_loss else []
        return _Verdict(figures, tuple(objections), False, False, doubt if most > tolerance.log_loss else "")
    worse = _paired(judged, rng)
    figures |= {"judged": True} | {f"worse_{name}": _interval(values) for name, values in worse.items()}
    loss = worse["log_loss"]
    objections = []
    if (most := float(np.quantile(loss, CONFIDENCE))) > tolerance.log_loss:
        if np.quantile(loss, 1 - CONFIDENCE) > 0:
            objections.append(f"log-loss is worse than that of {incumbent} by {loss.mean():.4f}")
        else:
            objections.append(f"log-loss may be worse than that of {incumbent} by {most:.4f}, as far as this window tells")
    if np.quantile(worse["auc"], 1 - CONFIDENCE) > tolerance.auc:
        objections.append(f"AUC is worse than that of {incumbent} by {worse['auc'].mean():.4f}")
    for name, where in (("after_events", "right after events"), ("in_silences", "in silences")):
        if np.quantile(worse[name], 1 - CONFIDENCE) > tolerance.log_loss:
            objections.append(f"log-loss {where} is worse than that of {incumbent} by {worse[name].mean():.4f}")
    own, before = _calibration(judged, p), _calibration(judged, q)
    figures |= {"calibration": own.figures(), "incumbent_calibration": before.figures()}
    bound = max(tolerance.max_ece, before.ece)
    if own.ece > bound:
        objections.append(f"its calibration error is {own.ece:.3f} beyond noise, more than {bound:.3f}")
    if own.level > max(np.log(FACTOR), before.level):
        objections.append(f"{own.observed:.1%} came to pass where it expects {own.expected:.1%}")
    if own.steepness > max(np.log(FACTOR), before.steepness):
        objections.append(f"it is {'over' if own.slope < 1 else 'under'}confident: its log-odds have to be multiplied by {own.slope:.2f}")
    bounds = Bounds(standard_errors(targets), tolerance.min_outcomes, tolerance.log_loss)
    if wrong := faults(judged.past, judged.user, y, p, bounds, None if first else q):
        figures["miscalibrated_groups"] = [fault.words for fault in wrong]
        more = len(wrong) - 1
        objections.append(wrong[0].words + (f", and {more} more group{' is' if more == 1 else 's are'} off" if more else ""))
    better = np.quantile(loss, 1 - (1 - CONFIDENCE) / targets) < 0
    return _Verdict(figures, tuple(objections), bool(better), True)


def _paired(judged: Judged, rng: np.random.Generator) -> dict[str, Floats]:
    """(RESAMPLES,) by how much the challenger is worse than the incumbent on users drawn with replacement: log-loss everywhere,
    right after events and in silences (0 where there is no such moment), and AUC."""
    _, user = np.unique(judged.user, return_inverse=True)
    users = int(user.max()) + 1
    y = judged.label
    difference = losses(y, judged.challenger) - losses(y, judged.incumbent)
    aucs = [WeightedAuc(y, p) for p in (judged.challenger, judged.incumbent)]
    parts = {"log_loss": np.ones(len(y), bool), "after_events": ~judged.silent, "in_silences": judged.silent}
    sums = {n: (np.bincount(user, difference * part, users), np.bincount(user, part, users)) for n, part in parts.items()}
    out = {name: np.empty(RESAMPLES) for name in (*parts, "auc")}
    for i in range(RESAMPLES):
        drawn_U = np.bincount(rng.integers(0, users, users), minlength=users).astype(np.float64)
        for name, (total_U, count_U) in sums.items():
            out[name][i] = float(drawn_U @ total_U) / max(float(drawn_U @ count_U), 1.0)
        challenger, incumbent = (a(drawn_U[user]) for a in aucs)
        out["auc"][i] = incumbent - challenger
    return out


@dataclass(frozen=True, slots=True)
class _Calibration:
    """ece: mean error of the bins beyond noise. level, steepness: |log| of observed over expected outcomes and of the slope, beyond noise.

    expected, observed: shares of the rarer outcome. slope: what the log-odds would have to be multiplied by.
    """

    ece: float
    level: float
    steepness: float
    expected: float
    observed: float
    slope: float

    def figures(self) -> dict[str, float]:
        return {name: round(float(getattr(self, name)), 5) for name in ("ece", "expected", "observed", "slope")}


def _calibration(judged: Judged, p: Floats) -> _Calibration:
    """All standard errors are those of sums over users: the moments of one user are not independent."""
    _, user = np.unique(judged.user, return_inverse=True)
    users = int(user.max()) + 1
    y = judged.label.astype(np.float64)
    error = y - p
    size = len(y)

    place = np.empty(size, np.int64)
    place[np.argsort(p, kind="stable")] = np.arange(size) * ECE_BINS // size
    error_BU = np.bincount(place * users + user, error, ECE_BINS * users).reshape(ECE_BINS, users)
    ece = np.maximum(np.abs(error_BU.sum(1)) - ONE_SIDED * np.sqrt((error_BU**2).sum(1)), 0).sum() / size

    rarer = y.mean() <= 0.5
    expected, observed = (float(x.mean() if rarer else 1 - x.mean()) for x in (p, y))
    noise = ONE_SIDED * float(np.sqrt((error_BU.sum(0) ** 2).sum())) / size
    level = max(np.log(max(observed - noise, EPSILON) / max(expected, EPSILON)), np.log(max(expected, EPSILON) / (observed + noise)), 0)

    slope, slope_noise = _slope(y, p, user, users)
    least, most = slope - slope_noise, slope + slope_noise
    steepness = max(np.log(max(least, EPSILON)), -np.log(max(most, EPSILON)), 0)
    return _Calibration(float(ece), float(level), float(steepness), expected, observed, slope)


def _slope(y: Floats, p: Floats, user: NDArray[np.int64], users: int) -> tuple[float, float]:
    """b of the logistic regression y ~ a + b logit(p), by Newton's method, and its noise (White's sandwich, by users)."""
    p = np.clip(p, EPSILON, 1 - EPSILON)
    design_N2 = np.stack([np.ones(len(p)), np.log(p / (1 - p))], 1)
    beta_2 = np.array([np.log((y.mean() + EPSILON) / (1 - y.mean() + EPSILON)), 0.0])
    for _ in range(25):
        fitted = 1 / (1 + np.exp(-np.clip(design_N2 @ beta_2, -30, 30)))
        curvature_22 = (design_N2 * (fitted * (1 - fitted))[:, None]).T @ design_N2 + 1e-6 * np.eye(2)
        step_2 = np.linalg.solve(curvature_22, design_N2.T @ (y - fitted))
        beta_2 += np.clip(step_2, -2, 2)
        if np.abs(step_2).max() < 1e-6:
            break
    score_U2 = np.stack([np.bincount(user, (y - fitted) * column, users) for column in design_N2.T], 1)
    bread_22 = np.linalg.inv(curvature_22)
    variance_22 = bread_22 @ score_U2.T @ score_U2 @ bread_22
    return float(beta_2[1]), ONE_SIDED * float(np.sqrt(variance_22[1, 1]))


def _interval(values: Floats) -> list[float]:
    return [round(float(v), 5) for v in (np.quantile(values, 0.05), values.mean(), np.quantile(values, 0.95))]
