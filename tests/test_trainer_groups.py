"""Groups of moments: tenths of each kind, named for people, and calibration in each with honest intervals."""

from itertools import pairwise

import numpy as np
import pytest

from model.hazards import DAY_MS, HOUR_MS
from trainer.groups import Bounds, Group, Kind, Past, faults, groups, standard_errors, standings

NO_ROWS = np.zeros(0, np.int64)
N = 2000


def past(seed: int = 0) -> Past:
    rng = np.random.default_rng(seed)
    silent_ms = np.where(rng.random(N) < 0.4, 0, rng.exponential(1, N) * DAY_MS).astype(np.int64)
    return Past(rng.geometric(0.2, N), silent_ms + rng.integers(0, 90 * DAY_MS, N), silent_ms)


def test_groups_of_a_kind_share_the_moments_out() -> None:
    found = groups(past())
    for kind, value in (("events", past().events), ("tenure", past().tenure_ms), ("silence", past().silent_ms)):
        own = [g for g in found if g.kind == kind]
        assert sorted(np.concatenate([g.rows for g in own]).tolist()) == list(range(N))
        assert all(value[g.rows].min() == g.least and value[g.rows].max() == g.most for g in own)
        assert all(a.most < b.least for a, b in pairwise(own))
    assert [len([g for g in found if g.kind == kind]) for kind in ("tenure", "silence")] == [10, 11]
    assert (past().silent_ms[next(g for g in found if g.kind == "silence").rows] == 0).all()


@pytest.mark.parametrize(
    ("kind", "least", "most", "words"),
    [
        ("events", 1, 1, "users with 1 event"),
        ("events", 38, 120, "users with 38 to 120 events"),
        ("tenure", 0, DAY_MS, "users known for 0 min to 24 h"),
        ("tenure", 3 * DAY_MS, 40 * DAY_MS, "users known for 3.0 to 40 days"),
        ("silence", 0, 0, "users right after an event"),
        ("silence", HOUR_MS // 2, HOUR_MS, "users silent for 30 to 60 min"),
        ("silence", HOUR_MS, 20 * HOUR_MS, "users silent for 60 min to 20 h"),
    ],
)
def test_groups_are_named_for_people(kind: Kind, least: int, most: int, words: str) -> None:
    assert Group(kind, least, most, NO_ROWS).words == words


def test_no_moments_no_groups() -> None:
    nothing = Past(NO_ROWS, NO_ROWS, NO_ROWS)
    assert groups(nothing) == []
    assert faults(nothing, NO_ROWS, np.zeros(0, bool), np.zeros(0), Bounds(3, 30, 0.005)) == []


def test_one_user_is_no_evidence() -> None:
    """A thousand moments of one user that came out alike say as much as one."""
    user, label, said = np.zeros(N, np.int64), np.ones(N, bool), {"this model": np.full(N, 0.5)}
    assert all(s.users == 1 and s.observed.high - s.observed.low > 0.7 for s in standings(past(), user, label, said))


def test_an_interval_covers_what_is_true() -> None:
    covered = []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        user, chance = np.repeat(np.arange(200), 10), rng.beta(1, 4, 200)
        found = standings(past(seed), user, rng.random(N) < chance[user], {"this model": np.full(N, 0.2)})
        covered += [s.observed.low <= s.expected["this model"] <= s.observed.high for s in found]
    assert 0.93 <= np.mean(covered) <= 0.97


def test_what_is_noise_grows_with_the_targets_looked_at() -> None:
    assert 3.1 < standard_errors(1) < standard_errors(2) < standard_errors(10) < 4


def test_an_error_must_be_large_in_odds_and_in_loss() -> None:
    """Of 0.6% where 0.3% come to pass, and of 56% where 50% do, neither is much; of 20% where 10% do, it is."""
    size = 50_000
    moments = Past(np.ones(size, np.int64), np.zeros(size, np.int64), np.zeros(size, np.int64))
    for observed, expected, wrong in ((0.003, 0.006, False), (0.5, 0.56, False), (0.1, 0.2, True), (0.9, 0.8, True)):
        label = np.arange(size) < observed * size
        found = faults(moments, np.arange(size), label, np.full(size, expected), Bounds(standard_errors(2), 30, 0.005))
        assert len(found) == 3 * wrong
