"""The gate: what is better passes, what is worse, broken or miscalibrated does not, and noise decides nothing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.gate import Decision, Floats, Judged, Tolerance, decide, summary

N, USERS = 4000, 800
DAY_MS = 86_400_000


def sigmoid(x: Floats) -> Floats:
    out: Floats = 1 / (1 + np.exp(-x))
    return out


def world(seed: int = 0) -> tuple[np.ndarray, Floats, np.ndarray]:  # type: ignore[type-arg]
    """(user, true logit, label) of moments."""
    rng = np.random.default_rng(seed)
    user = rng.integers(0, USERS, N)
    logit = rng.normal(-2, 1.2, USERS)[user] + rng.normal(0, 0.3, N)
    return user, logit, rng.random(N) < sigmoid(logit)


def judge(challenger: Floats, incumbent: Floats, *, first: bool = False, tolerance: Tolerance | None = None) -> Decision:
    user, _, label = world()
    judged = Judged("purchase", 7 * DAY_MS, user, label, challenger, incumbent)
    return decide([judged], first=first, tolerance=tolerance or Tolerance(), rng=np.random.default_rng(0))


USER, LOGIT, LABEL = world()
GOOD = sigmoid(LOGIT)
WORSE = sigmoid(LOGIT + np.random.default_rng(1).normal(0, 1.5, N))
CONSTANT = np.full(N, LABEL.mean())


def test_better_is_promoted() -> None:
    decision = judge(GOOD, WORSE)
    assert decision.promote
    assert decision.reason.startswith("no worse than the champion: purchase log-loss")
    assert decision.figures["purchase"]["challenger"]["auc"] > decision.figures["purchase"]["incumbent"]["auc"]


def test_the_same_is_promoted() -> None:
    assert judge(GOOD, GOOD).promote


def test_worse_is_rejected() -> None:
    decision = judge(WORSE, GOOD)
    assert not decision.promote
    assert "log-loss is worse than that of the champion" in decision.reason
    assert "AUC is worse" in decision.reason


def test_a_first_model_must_beat_the_constant_hazard() -> None:
    assert judge(GOOD, CONSTANT, first=True).promote
    noise = sigmoid(-2 + 0.01 * np.random.default_rng(2).normal(size=N))
    assert not judge(noise, CONSTANT, first=True).promote


def test_a_constant_is_rejected() -> None:
    decision = judge(CONSTANT, CONSTANT)
    assert not decision.promote
    assert "of everybody" in decision.reason


@pytest.mark.parametrize("broken", [np.nan, np.inf, -0.1, 1.1])
def test_what_is_no_probability_is_rejected(broken: float) -> None:
    said = GOOD.copy()
    said[17] = broken
    decision = judge(said, CONSTANT)
    assert not decision.promote
    assert "no probability" in decision.reason


def test_miscalibrated_is_rejected_unless_the_champion_is_worse() -> None:
    high = sigmoid(LOGIT + 2)
    lenient = Tolerance(log_loss=10)  # the order is right, only the level is not
    assert "calibration error" in judge(high, GOOD, tolerance=lenient).reason
    assert judge(high, sigmoid(LOGIT + 3), tolerance=lenient).promote


def test_too_few_outcomes_decide_nothing() -> None:
    judged = Judged("purchase", 7 * DAY_MS, USER, np.arange(N) < 5, GOOD, WORSE)
    decision = decide([judged], first=False, tolerance=Tolerance(), rng=np.random.default_rng(0))
    assert not decision.promote
    assert "too few outcomes" in decision.reason


def test_one_bad_target_of_two_is_enough() -> None:
    good, bad = (Judged(name, DAY_MS, USER, LABEL, c, i) for name, c, i in (("purchase", GOOD, WORSE), ("churn", WORSE, GOOD)))
    decision = decide([good, bad], first=False, tolerance=Tolerance(), rng=np.random.default_rng(0))
    assert not decision.promote
    assert decision.reason.startswith("churn: ")


def test_an_empty_window_is_rejected() -> None:
    empty = np.zeros(0)
    judged = Judged("purchase", DAY_MS, empty.astype(np.int64), empty.astype(bool), empty, empty)
    assert not decide([judged], first=True, tolerance=Tolerance(), rng=np.random.default_rng(0)).promote


def test_the_same_seed_decides_the_same() -> None:
    assert judge(GOOD, WORSE) == judge(GOOD, WORSE)


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.sampled_from([0.1, 0.2, 0.5, 0.9])), min_size=2, max_size=30))
def test_auc_is_the_chance_of_the_right_order(pairs: list[tuple[bool, float]]) -> None:
    y, p = (np.array(c) for c in zip(*pairs, strict=True))
    wins = [(a > b) + 0.5 * (a == b) for a in p[y] for b in p[~y]]
    measured = summary(y, p.astype(np.float64))
    assert ("auc" in measured) == bool(wins)
    if wins:
        assert measured["auc"] == pytest.approx(np.mean(wins), abs=1e-5)
