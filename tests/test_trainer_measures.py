"""Measures against their definitions, intervals against what they promise, curves and drift against closed forms."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from trainer_support import START_MS, events_table

from model.hazards import DAY_MS
from trainer import curves, drift
from trainer.history import from_table
from trainer.measures import MEASURES, Weighted, best_threshold, measured, summary
from trainer.recency import fit_logistic

Floats = NDArray[np.float64]

samples = st.lists(st.tuples(st.booleans(), st.sampled_from((0.0, 0.1, 0.25, 0.5, 0.7, 1.0)), st.integers(0, 4)), min_size=1, max_size=30)


def by_name(values: Floats) -> dict[str, float]:
    return dict(zip(MEASURES, values, strict=True))


def by_definition(y: NDArray[np.bool_], p: Floats, threshold: float) -> dict[str, float]:
    """What a reader of a textbook would write; NaN where it is not defined."""
    flagged = p >= threshold
    pairs = [(a > b) + (a == b) / 2 for a in p[y] for b in p[~y]]
    precision_at = [(y[p >= t].mean(), y[p == t].sum() / max(y.sum(), 1)) for t in np.unique(p)]
    return {
        "accuracy": (flagged == y).mean(),
        "precision": y[flagged].mean() if flagged.any() else np.nan,
        "recall": flagged[y].mean() if y.any() else np.nan,
        "f1": 2 * (y & flagged).sum() / (y.sum() + flagged.sum()) if y.sum() + flagged.sum() else np.nan,
        "auc": float(np.mean(pairs)) if pairs else np.nan,
        "pr_auc": sum(precision * share for precision, share in precision_at) if y.any() else np.nan,
        "log_loss": np.mean([-np.log(np.clip(q if o else 1 - q, 1e-7, 1 - 1e-7)) for o, q in zip(y, p, strict=True)]),
        "brier": np.mean((y - p) ** 2),
    }


@settings(max_examples=150, deadline=None)
@given(samples, st.sampled_from((0.0, 0.2, 0.5, 0.9)))
def test_weights_count_moments(sample: list[tuple[bool, float, int]], threshold: float) -> None:
    """A weighted measure is the plain one of a sample in which each moment stands as often as its weight says."""
    y, p, times = (np.array(c) for c in zip(*sample, strict=True))
    got = by_name(Weighted(y, p, threshold)(times.astype(np.float64)))
    if not times.any():
        assert all(np.isnan(v) for v in got.values())
        return
    expected = by_definition(np.repeat(y, times), np.repeat(p, times), threshold)
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, nan_ok=True, abs=1e-6), name


def moments(n: int = 4000, users: int = 400, seed: int = 0) -> tuple[NDArray[np.int64], Floats, NDArray[np.bool_]]:
    rng = np.random.default_rng(seed)
    user = rng.integers(0, users, n)
    p = 1 / (1 + np.exp(-(rng.normal(-1.5, 1, users)[user] + rng.normal(0, 0.5, n))))
    return user, p, rng.random(n) < p


def test_the_same_as_the_gates_summary() -> None:
    _, p, y = moments()
    own = by_name(Weighted(y, p, 0.5)(np.ones(len(y))))
    for name, value in summary(y, p).items():
        assert own[name] == pytest.approx(value, abs=2e-5), name


def test_lift_is_that_of_the_top_tenth_and_a_constant_has_none() -> None:
    y = np.arange(1000) >= 950
    p = np.arange(1000) / 1000
    assert by_name(Weighted(y, p, 0.5)(np.ones(1000)))["lift"] == pytest.approx(10)
    constant = by_name(Weighted(y, np.full(1000, 0.05), 0.05)(np.ones(1000)))
    assert constant["lift"] == pytest.approx(1)
    assert constant["auc"] == pytest.approx(0.5)
    assert constant["pr_auc"] == pytest.approx(0.05)
    assert constant["ece"] == pytest.approx(0, abs=1e-9)


def test_the_best_threshold_is_the_best() -> None:
    _, p, y = moments(300)
    chosen = best_threshold(y, p)
    f1 = {t: 2 * (y & (p >= t)).sum() / (y.sum() + (p >= t).sum()) for t in np.unique(p)}
    assert f1[chosen] == pytest.approx(max(f1.values()))
    assert best_threshold(np.zeros(3, bool), np.array([0.1, 0.2, 0.3])) == 0.5


def test_intervals_hold_what_they_promise() -> None:
    """Users differ, and their moments go together: the interval must cover the truth about 19 times in 20 all the same."""
    _, p, y = moments(400_000, 40_000, seed=1)
    truth = by_name(Weighted(y, p, 0.3)(np.ones(len(y))))
    covered = dict.fromkeys(("auc", "log_loss", "brier", "recall"), 0)
    for seed in range(60):
        user, p, y = moments(1500, 150, seed=seed)
        own, _ = measured(y, user, {"model": (p, 0.3)}, np.random.default_rng(0), 100)
        for name in covered:
            covered[name] += own["model"][name].low <= truth[name] <= own["model"][name].high
    assert all(50 <= times <= 60 for times in covered.values()), covered


def test_differences_are_paired() -> None:
    user, p, y = moments()
    own, above = measured(y, user, {"model": (p, 0.3), "other": (p * 0.9, 0.3)}, np.random.default_rng(0), 100)
    difference = above["other"]["log_loss"]
    assert difference.low < difference.value < difference.high
    assert difference.high - difference.low < 0.3 * (own["model"]["log_loss"].high - own["model"]["log_loss"].low)
    assert set(above) == {"other"}


@pytest.mark.parametrize("label", [False, True])
def test_one_class_has_no_auc(label: bool) -> None:
    y = np.full(20, label)
    own, _ = measured(y, np.arange(20), {"model": (np.linspace(0.1, 0.9, 20), 0.5)}, np.random.default_rng(0), 20)
    assert np.isnan(own["model"]["auc"].value)
    assert np.isnan(own["model"]["auc"].low)
    assert own["model"]["brier"].low < own["model"]["brier"].value < own["model"]["brier"].high


def test_nothing_to_measure_is_no_figure() -> None:
    own, _ = measured(np.zeros(0, bool), np.zeros(0, np.int64), {"model": (np.zeros(0), 0.5)}, np.random.default_rng(0), 10)
    assert all(np.isnan(figure.value) for figure in own["model"].values())


def test_curves_are_short_and_integrate_to_the_areas() -> None:
    _, p, y = moments(20_000)
    own = by_name(Weighted(y, p, 0.5)(np.ones(len(y))))
    alarms, hits = curves.roc(y, p)
    assert len(alarms) <= curves.POINTS
    assert (alarms[0], hits[0], alarms[-1], hits[-1]) == (0, 0, 1, 1)
    assert np.trapezoid(hits, alarms) == pytest.approx(own["auc"], abs=2e-3)
    recall, precision = curves.precision_recall(y, p)
    assert np.trapezoid(precision, recall) == pytest.approx(own["pr_auc"], abs=0.01)
    share, caught = curves.gains(y, p)
    assert np.interp(0.1, share, caught) == pytest.approx(own["lift"] * 0.1, abs=5e-3)


def test_calibration_of_the_truth_lies_on_the_diagonal() -> None:
    _, p, y = moments(20_000)
    predicted, observed, low, high = curves.calibration(y, p)
    assert len(predicted) == curves.CALIBRATION_BINS
    assert ((low < predicted) & (predicted < high)).sum() >= 8
    assert ((low < observed) & (observed < high)).all()
    one, share, *_ = curves.calibration(y, np.full(len(y), 0.25))
    assert (list(one), list(share)) == ([0.25], [y.mean()])


def test_psi_of_a_known_shift() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, 50_000), rng.normal(0, 1, 50_000)
    assert drift.psi(a, b) < 0.002
    # Shares e, a of two bins: (a - e) ln(a / e), by hand.
    expected, actual = np.array([0.0] * 5000 + [1.0] * 5000), np.array([0.0] * 8000 + [1.0] * 2000)
    by_hand = 0.3 * np.log(0.8 / 0.5) - 0.3 * np.log(0.2 / 0.5)
    assert drift.psi(expected, actual) == pytest.approx(by_hand, rel=1e-3)
    assert drift.psi_of_kinds(expected.astype(np.int64), actual.astype(np.int64)) == pytest.approx(by_hand, rel=1e-3)
    assert drift.psi(a, a + 1) > drift.LARGE
    assert drift.psi(a, np.where(np.arange(len(a)) % 2, np.nan, a)) > drift.LARGE  # half of them missing is a change
    assert np.isnan(drift.psi(a, np.zeros(0)))
    assert np.isfinite(drift.psi(np.full(10, np.nan), a))
    assert drift.psi_of_kinds(np.array([1, 1, 2]), np.array([7, 7, 7])) > drift.LARGE


def test_feature_drift_names_what_moved() -> None:
    rng = np.random.default_rng(0)
    times = np.sort(rng.integers(0, 28 * DAY_MS, 4000)) + START_MS
    rows = [(f"u{u}", "view", int(t)) for u, t in zip(rng.integers(0, 50, 4000), times, strict=True)]
    half = START_MS + 14 * DAY_MS
    values = [float(v * (5 if t > half else 1)) for v, t in zip(rng.lognormal(3, 0.5, 4000), times, strict=True)]
    found = drift.of_features(from_table(events_table(rows, values)), START_MS, half, START_MS + 28 * DAY_MS)
    assert found.pop("value") > drift.LARGE
    assert all(value < drift.SLIGHT for value in found.values()), found


def test_logistic_regression_finds_the_weights_it_was_made_with() -> None:
    rng = np.random.default_rng(0)
    x = np.stack([np.ones(40_000), rng.normal(0, 1, 40_000), rng.normal(2, 1, 40_000)], axis=1)
    weight = np.array([-1.0, 0.8, -0.5])
    y = rng.random(40_000) < 1 / (1 + np.exp(-x @ weight))
    assert fit_logistic(x, y) == pytest.approx(weight, abs=0.05)
    assert np.isfinite(fit_logistic(x, np.zeros(40_000, bool))).all()
    assert np.isfinite(fit_logistic(x[:0], y[:0])).all()
