"""The gate: what is better passes, what is worse, broken or miscalibrated does not, and noise decides nothing."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer import groups
from trainer.gate import Decision, Floats, Judged, Tolerance, Windows, decide, summary
from trainer.groups import Bounds, Past, faults, standard_errors

N, USERS = 4000, 800
DAY_MS = 86_400_000
TEST_MS = 100 * DAY_MS
FRESHER, STALE = Windows(TEST_MS, TEST_MS - DAY_MS, TEST_MS), Windows(TEST_MS - DAY_MS, TEST_MS, TEST_MS)
FIRST = Windows(TEST_MS, None, TEST_MS)


def sigmoid(x: Floats) -> Floats:
    out: Floats = 1 / (1 + np.exp(-x))
    return out


def world(seed: int = 0) -> tuple[np.ndarray, Floats, np.ndarray]:  # type: ignore[type-arg]
    """(user, true logit, label) of moments."""
    rng = np.random.default_rng(seed)
    user = rng.integers(0, USERS, N)
    logit = rng.normal(-2, 1.2, USERS)[user] + rng.normal(0, 0.3, N)
    return user, logit, rng.random(N) < sigmoid(logit)


SILENT = np.arange(N) % 2 == 0
PAST = Past(1 + np.arange(N) % 50, (np.arange(N) * 7919 % 90) * DAY_MS, SILENT * DAY_MS)
"""Nothing in it has to do with anything."""


def one(challenger: Floats, incumbent: Floats, target: str = "purchase") -> Judged:
    user, _, label = world()
    return Judged(target, 7 * DAY_MS, user, PAST, label, challenger, incumbent)


def judge(challenger: Floats, incumbent: Floats, *, windows: Windows = FRESHER, tolerance: Tolerance | None = None) -> Decision:
    return decide([one(challenger, incumbent)], windows=windows, tolerance=tolerance or Tolerance(), rng=np.random.default_rng(0))


USER, LOGIT, LABEL = world()
GOOD = sigmoid(LOGIT)
WORSE = sigmoid(LOGIT + np.random.default_rng(1).normal(0, 1.5, N))
CONSTANT = np.full(N, LABEL.mean())


def test_better_is_promoted() -> None:
    decision = judge(GOOD, WORSE)
    assert decision.promote
    assert decision.reason.startswith("better than the champion: purchase log-loss")
    assert decision.figures["purchase"]["challenger"]["auc"] > decision.figures["purchase"]["incumbent"]["auc"]


def test_the_same_is_promoted_if_it_is_fresher() -> None:
    assert judge(GOOD, GOOD).reason.startswith("fresher, and no worse than the champion")
    assert judge(GOOD, GOOD).promote
    stale = judge(GOOD, GOOD, windows=STALE)
    assert not stale.promote
    assert "nor fresher" in stale.reason


def test_better_is_promoted_though_its_window_is_older() -> None:
    assert judge(GOOD, WORSE, windows=STALE).promote


def test_whoever_has_seen_the_test_window_is_rejected() -> None:
    decision = judge(GOOD, WORSE, windows=Windows(TEST_MS + 1, TEST_MS - DAY_MS, TEST_MS))
    assert not decision.promote
    assert "reaches into the test window" in decision.reason


def test_a_small_window_does_not_let_harm_pass_as_noise() -> None:
    """A challenger that is somewhat worse: 60 users cannot prove it, but cannot exclude it either."""
    few = USER < 60
    worse = sigmoid(LOGIT + np.random.default_rng(3).normal(0, 0.5, N))
    judged = Judged("purchase", DAY_MS, USER[few], PAST.where(few), LABEL[few], worse[few], GOOD[few])
    decision = decide([judged], windows=FRESHER, tolerance=Tolerance(min_outcomes=5), rng=np.random.default_rng(0))
    assert not decision.promote
    assert "may be worse" in decision.reason


def test_good_after_events_does_not_make_up_for_ruin_in_silences() -> None:
    champion = sigmoid(LOGIT + np.random.default_rng(4).normal(0, 1, N))
    mixed = np.where(SILENT & (np.arange(N) % 8 == 0), sigmoid(LOGIT - 2.5), np.where(SILENT, champion, GOOD))
    decision = judge(mixed, champion, tolerance=Tolerance(max_ece=1))
    assert not decision.promote
    assert "in silences is worse" in decision.reason
    assert "right after events" not in decision.reason


def test_worse_is_rejected() -> None:
    decision = judge(WORSE, GOOD)
    assert not decision.promote
    assert "log-loss is worse than that of the champion" in decision.reason
    assert "AUC is worse" in decision.reason


def test_a_first_model_must_beat_the_constant_hazard() -> None:
    assert judge(GOOD, CONSTANT, windows=FIRST).promote
    noise = sigmoid(-2 + 0.01 * np.random.default_rng(2).normal(size=N))
    assert not judge(noise, CONSTANT, windows=FIRST).promote


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


def test_certainties_are_rejected() -> None:
    decision = judge(np.where(np.median(GOOD) < GOOD, GOOD, 0), CONSTANT)
    assert not decision.promote
    assert "saturated: 50%" in decision.reason


def test_miscalibrated_is_rejected_unless_the_champion_is_worse() -> None:
    lenient = Tolerance(log_loss=10)  # the order is right, only the level is not
    high = sigmoid(LOGIT + 2)
    assert "calibration error" in judge(high, GOOD, tolerance=lenient).reason
    assert judge(high, sigmoid(LOGIT + 3), tolerance=lenient).promote
    assert "came to pass where it expects" in judge(sigmoid(LOGIT - 0.8), GOOD, tolerance=lenient).reason
    assert "overconfident" in judge(sigmoid(2 * LOGIT + 1), GOOD, tolerance=lenient).reason
    assert "underconfident" in judge(sigmoid(0.5 * LOGIT - 0.9), GOOD, tolerance=lenient).reason


@pytest.mark.parametrize("seed", range(8))
def test_the_truth_is_calibrated(seed: int) -> None:
    """200 users and their noise: the true law must pass."""
    user, logit, label = world(seed)
    few = user < 200
    constant = np.full(few.sum(), label[few].mean())
    judged = Judged("purchase", DAY_MS, user[few], PAST.where(few), label[few], sigmoid(logit)[few], constant)
    assert decide([judged], windows=FIRST, tolerance=Tolerance(max_ece=0.02), rng=np.random.default_rng(0)).promote


def test_too_few_outcomes_decide_nothing() -> None:
    judged = Judged("purchase", 7 * DAY_MS, USER, PAST, np.arange(N) < 5, GOOD, WORSE)
    decision = decide([judged], windows=FRESHER, tolerance=Tolerance(), rng=np.random.default_rng(0))
    assert not decision.promote
    assert "too few outcomes" in decision.reason


def test_a_target_with_too_few_outcomes_may_not_be_ruined() -> None:
    rare = Judged("purchase", 7 * DAY_MS, USER, PAST, np.arange(N) < 5, np.full(N, 0.3) + 0.01 * GOOD, np.full(N, 0.002))
    decision = decide([one(GOOD, WORSE, "churn"), rare], windows=FRESHER, tolerance=Tolerance(), rng=np.random.default_rng(0))
    assert not decision.promote
    assert "few as the outcomes are" in decision.reason


def test_freshness_alone_does_not_excuse_a_doubt_about_a_rare_target() -> None:
    """Too few to be judged, its users may have been harmed: who is better elsewhere passes, who is merely fresher does not."""
    few = USER < 20
    worse = sigmoid(LOGIT + np.random.default_rng(3).normal(0, 0.5, N))
    rare = Judged("purchase", 7 * DAY_MS, USER[few], PAST.where(few), LABEL[few], worse[few], GOOD[few])
    same, better = (
        decide([one(GOOD, incumbent, "churn"), rare], windows=FRESHER, tolerance=Tolerance(), rng=np.random.default_rng(0))
        for incumbent in (GOOD, WORSE)
    )
    assert not same.promote
    assert "purchase: log-loss may be worse" in same.reason
    assert better.promote
    equal = Judged("purchase", 7 * DAY_MS, USER[few], PAST.where(few), LABEL[few], GOOD[few], GOOD[few])
    assert decide([one(GOOD, GOOD, "churn"), equal], windows=FRESHER, tolerance=Tolerance(), rng=np.random.default_rng(0)).promote


def test_one_bad_target_of_two_is_enough() -> None:
    good, bad = (one(c, i, name) for name, c, i in (("purchase", GOOD, WORSE), ("churn", WORSE, GOOD)))
    decision = decide([good, bad], windows=FRESHER, tolerance=Tolerance(), rng=np.random.default_rng(0))
    assert not decision.promote
    assert decision.reason.startswith("churn: ")


def test_an_empty_window_is_rejected() -> None:
    empty, none = np.zeros(0), np.zeros(0, np.int64)
    judged = Judged("purchase", DAY_MS, none, Past(none, none, none), empty.astype(bool), empty, empty)
    assert not decide([judged], windows=FIRST, tolerance=Tolerance(), rng=np.random.default_rng(0)).promote


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


def shop(seed: int, users: int) -> tuple[np.ndarray, Past, Floats, np.ndarray]:  # type: ignore[type-arg]
    """(user, past, true logit, label) of moments, in which regulars have many events, and leave seldom."""
    rng = np.random.default_rng(seed)
    count = np.ceil(rng.lognormal(1.8, 1.2, users)).astype(int).clip(1, 120)
    user = np.repeat(np.arange(users), count)
    n = len(user)
    events = np.arange(n) - np.repeat(np.cumsum(count) - count, count) + 1
    silent_ms = np.where(rng.random(n) < 0.3, 0, rng.exponential(2, n) * DAY_MS).astype(np.int64)
    past = Past(events, (events * rng.exponential(1, n) * DAY_MS).astype(np.int64) + silent_ms, silent_ms)
    logit = rng.normal(0, 1, users)[user] - 0.4 * np.log(events)
    shared = rng.random(users)[user]  # the moments of one user come out much alike
    return user, past, logit, np.where(rng.random(n) < 0.5, shared, rng.random(n)) < sigmoid(logit)


def leaky(past: Past, logit: Floats, label: np.ndarray, tilt: float) -> Floats:  # type: ignore[type-arg]
    """Regulars are said to be leaving, the others to stay, and the mean is right."""
    tilted = logit + tilt * np.tanh(2 * np.log(past.events / 20))
    levels = np.linspace(-3, 3, 601)
    return sigmoid(tilted + levels[np.searchsorted([sigmoid(tilted + level).mean() for level in levels], label.mean())])


def grouped(seed: int, users: int, challenger: str, incumbent: str, *, windows: Windows = FRESHER) -> Decision:
    user, past, logit, label = shop(seed, users)
    said = {"true": sigmoid(logit), "constant": np.full(len(user), label.mean())}
    said |= {name: leaky(past, logit, label, tilt) for name, tilt in (("leaky", 0.9), ("leakier", 0.93))}
    judged = Judged("churn", 30 * DAY_MS, user, past, label, said[challenger], said[incumbent])
    return decide([judged], windows=windows, tolerance=Tolerance(), rng=np.random.default_rng(0))


def test_a_right_mean_does_not_excuse_groups_that_are_wrong() -> None:
    decision = grouped(0, 1500, "leaky", "constant", windows=FIRST)
    assert not decision.promote
    assert decision.reason == "churn: for users with 27 to 44 events, 23.9% came to pass where it expects 43.5%"  # and nothing else
    mean = decision.figures["churn"]["calibration"]
    assert mean["expected"] == pytest.approx(mean["observed"], abs=1e-3)
    assert "for users with 27 to 44 events" in grouped(0, 1500, "leaky", "true").reason
    assert grouped(0, 1500, "true", "constant", windows=FIRST).promote


def test_a_champion_with_the_same_fault_does_not_block() -> None:
    assert grouped(0, 1500, "leaky", "leaky").promote
    assert "miscalibrated_groups" not in grouped(0, 1500, "leakier", "leaky").figures["churn"]
    assert grouped(0, 1500, "true", "leaky").promote


def test_a_small_window_says_nothing_about_groups() -> None:
    for seed in range(20):
        assert "miscalibrated_groups" not in grouped(seed, 60, "leaky", "true").figures["churn"]


def test_noise_alone_convicts_no_group() -> None:
    """Nor would it often if any error beyond noise were too much, in either target that is looked at."""
    bounds, convicted = Bounds(standard_errors(2), users=30, cost=0), 0
    for seed in range(100):
        user, past, logit, label = shop(seed, 500)
        assert not faults(past, user, label, sigmoid(logit), replace(bounds, cost=0.005))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(groups, "ODDS", 1.0)
            convicted += bool(faults(past, user, label, sigmoid(logit), bounds))
    assert convicted <= 5
