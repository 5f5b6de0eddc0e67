"""Hazards to probabilities, and what a censored wait tells of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.hazards import DAY_MS, DEFAULT_EDGES_MS, horizon_weights, log_likelihood_terms, probabilities, target_tensors
from model.targets import Target

grids = st.lists(st.integers(1, 10**10), min_size=1, max_size=12, unique=True).map(sorted)


def ask(hazards: list[float], edges_ms: list[int], horizons_ms: list[int], absent: bool = False) -> list[float]:
    """Probabilities of one event set with the given hazards."""
    logits = torch.logit(torch.tensor(hazards, dtype=torch.float64)).float()[None, None]
    weights = torch.from_numpy(horizon_weights(edges_ms, horizons_ms))
    count = len(horizons_ms)
    found: list[float] = probabilities(logits, weights, torch.zeros(count, dtype=torch.int64), torch.full((count,), absent))[0].tolist()
    return found


@st.composite
def asked(draw: st.DrawFn) -> tuple[list[float], list[int], list[int]]:
    edges = draw(grids)
    hazards = draw(st.lists(st.floats(1e-6, 1 - 1e-6), min_size=len(edges), max_size=len(edges)))
    horizons = draw(st.lists(st.integers(1, edges[-1]), min_size=1, max_size=6).map(sorted))
    return hazards, edges, horizons


@given(asked())
def test_occurs_grows_with_the_horizon_and_absent_is_its_complement(case: tuple[list[float], list[int], list[int]]) -> None:
    hazards, edges, horizons = case
    occurs, absent = ask(hazards, edges, horizons), ask(hazards, edges, horizons, absent=True)
    assert all(0 <= p <= 1 for p in (*occurs, *absent))
    assert occurs == sorted(occurs)
    np.testing.assert_allclose(np.add(occurs, absent), 1, atol=1e-6)


@given(asked())
def test_the_closed_form(case: tuple[list[float], list[int], list[int]]) -> None:
    """At an edge, the product of survivals; within a bin, a constant rate."""
    hazards, edges, horizons = case
    expected = []
    for horizon in horizons:
        log_survival, left = 0.0, 0
        for hazard, right in zip(hazards, edges, strict=True):
            log_survival += math.log1p(-hazard) * min(max((horizon - left) / (right - left), 0), 1)
            left = right
        expected.append(-math.expm1(log_survival))
    np.testing.assert_allclose(ask(hazards, edges, horizons), expected, atol=1e-5)


def test_horizons_at_the_edges_of_the_grid() -> None:
    hazards = [0.1, 0.2, 0.5]
    assert ask(hazards, [10, 20, 40], [10, 20, 40]) == pytest.approx([0.1, 1 - 0.9 * 0.8, 1 - 0.9 * 0.8 * 0.5])
    assert ask(hazards, [10, 20, 40], [30]) == pytest.approx([1 - 0.9 * 0.8 * math.sqrt(0.5)])


def test_beyond_the_grid_the_last_rate_goes_on() -> None:
    hazards = [0.1, 0.2, 0.5]
    assert ask(hazards, [10, 20, 40], [60, 80, 30]) == pytest.approx(
        [1 - 0.9 * 0.8 * 0.5**2, 1 - 0.9 * 0.8 * 0.5**3, 1 - 0.9 * 0.8 * 0.5**0.5]
    )
    assert ask([0.3], [10], [5, 20]) == pytest.approx([1 - 0.7**0.5, 1 - 0.7**2])


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=16, max_size=16))
def test_extreme_logits_are_still_probabilities(logits: list[float]) -> None:
    weights = torch.from_numpy(horizon_weights(DEFAULT_EDGES_MS, [1, DAY_MS, 7 * DAY_MS, 90 * DAY_MS]))
    found = probabilities(torch.tensor(logits)[None, None], weights, torch.zeros(4, dtype=torch.int64), torch.tensor([False, True] * 2))
    assert ((found >= 0) & (found <= 1)).all()


def test_each_target_asks_its_own_head() -> None:
    targets = [Target.parse(t) for t in ("a=buy:occurs:1d", "b=*:absent:2d", "c=buy:absent:1d")]
    weights, sets, absent = target_tensors(targets, (("*",), ("buy",)), [DAY_MS, 2 * DAY_MS])
    assert sets.tolist() == [1, 0, 1]
    logits = torch.logit(torch.tensor([[[0.1, 0.2], [0.3, 0.4]]]))
    assert probabilities(logits, weights, sets, absent)[0].tolist() == pytest.approx([0.3, 0.9 * 0.8, 0.7])
    with pytest.raises(ValueError, match=r"no head for target d \(view\); it has: \*, buy"):
        target_tensors([Target.parse("d=view:occurs:1d")], (("*",), ("buy",)), [DAY_MS])


@given(grids, st.lists(st.tuples(st.integers(0, 2 * 10**10), st.integers(0, 2 * 10**10)), min_size=1, max_size=5))
def test_what_a_censored_wait_says(edges: list[int], waits: list[tuple[int, int]]) -> None:
    wait_ms, observed_ms = (np.array(column, np.int64) for column in zip(*waits, strict=True))
    mask, event = log_likelihood_terms(wait_ms, observed_ms, edges)
    lefts = [0, *edges[:-1]]
    for n, (wait, observed) in enumerate(waits):
        # by hand: a bin counts if all of it was observed and the event had not come before it
        assert mask[n].tolist() == [float(right <= observed and left <= wait) for left, right in zip(lefts, edges, strict=True)]
        assert event[n].tolist() == [float(right <= observed and left <= wait < right) for left, right in zip(lefts, edges, strict=True)]
        assert event[n].sum() <= 1
        assert (event[n] <= mask[n]).all()
        assert sorted(mask[n], reverse=True) == mask[n].tolist(), "bins at risk come first"
        if event[n].any():
            assert mask[n].sum() == np.flatnonzero(event[n])[0] + 1, "nothing is at risk after the event"


def test_the_likelihood_is_maximal_at_the_true_hazards() -> None:
    """Waits drawn from known hazards and censored at random: counts of events over bins at risk give the hazards back."""
    rng = np.random.default_rng(0)
    edges, hazards = [10, 20, 40], np.array([0.1, 0.3, 0.5])
    bins = np.argmax(np.concatenate([rng.random((200_000, 3)) < hazards, np.ones((200_000, 1), bool)], axis=1), axis=1)
    lefts, widths = np.array([0, 10, 20, 40]), np.array([10, 10, 20, 100])
    wait = lefts[bins] + rng.integers(0, widths[bins])
    mask, event = log_likelihood_terms(wait, rng.integers(0, 60, 200_000), edges)
    np.testing.assert_allclose(event.sum(0) / mask.sum(0), hazards, atol=0.01)
