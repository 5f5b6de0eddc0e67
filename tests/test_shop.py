"""The simulated shop and its exact filter: what the demo's scores are measured against must itself be right."""

from dataclasses import replace

import numpy as np
import pytest

from demo.attainable import Filter, Target, auc, labels, log_loss, outcome_by_state, probabilities
from demo.shop import DAY_MS, TYPES, Drift, History, Ints, Law, shop_law, simulate

START_MS = 1_760_000_000_000
DAYS = 120
TARGETS: dict[str, Target] = {"purchase": (("purchase",), "occurs", 7 * DAY_MS), "churn": (("*",), "absent", 30 * DAY_MS)}
LAW = shop_law()


@pytest.fixture(scope="module")
def history() -> History:
    return simulate(LAW, users=6000, start_ms=START_MS, days=DAYS, seed=5)


def asked(history: History) -> tuple[Ints, Ints]:
    """Users and moments, days 20 to 90: at every event, and 3 and 10 days after it, silent or not."""
    inside = (history.time_ms >= START_MS + 20 * DAY_MS) & (history.time_ms < START_MS + 80 * DAY_MS)
    user, at_ms = history.user[inside].astype(np.int64), history.time_ms[inside]
    return np.tile(user, 3), np.concatenate([at_ms, at_ms + 3 * DAY_MS, at_ms + 10 * DAY_MS])


def test_rates_balance_and_gone_is_silent() -> None:
    assert np.allclose((LAW.d0 + LAW.d.sum(0)).sum(1), 0)
    assert np.isclose(LAW.initial.sum(), 1)
    for s, name in enumerate(LAW.states):
        assert (LAW.d0[s, s] == 0) == name.endswith("gone")


def test_history_is_ordered_and_in_range(history: History) -> None:
    assert (np.diff(history.time_ms) >= 0).all()
    assert history.time_ms[0] >= START_MS
    assert history.time_ms[-1] < START_MS + DAYS * DAY_MS
    assert set(np.unique(history.user)) == set(range(len(history.users)))
    _, first = np.unique(history.user, return_index=True)
    assert (history.type[first] == history.types.index("page_view")).all()
    has_item = np.isin(history.type, [history.types.index(t) for t in ("product_view", "add_to_cart", "remove_from_cart", "purchase")])
    assert np.array_equal(has_item, history.item >= 0)
    assert np.array_equal(has_item, history.category >= 0)
    assert np.array_equal(has_item, history.value > 0)


def test_stream_stays_alive(history: History) -> None:
    by_ten_days = np.bincount((history.time_ms - START_MS) // (10 * DAY_MS))[2:]
    assert by_ten_days.min() > 0.7 * by_ten_days.max()


def test_same_seed_same_history() -> None:
    one, two, other = (simulate(LAW, users=100, start_ms=START_MS, days=30, seed=s) for s in (1, 1, 2))
    for name in ("user", "time_ms", "type", "item", "category", "value"):
        assert np.array_equal(getattr(one, name), getattr(two, name), equal_nan=name == "value")
    assert not np.array_equal(one.time_ms[:50], other.time_ms[:50])


@pytest.mark.parametrize("name", TARGETS)
def test_filter_is_calibrated(history: History, name: str) -> None:
    user, at_ms = asked(history)
    p = Filter(LAW, history).probabilities(user, at_ms, TARGETS)[name]
    y = labels(history, user, at_ms, TARGETS[name])
    for bin_p, bin_y in zip(np.array_split(p[order := np.argsort(p)], 10), np.array_split(y[order], 10), strict=True):
        assert abs(bin_p.mean() - bin_y.mean()) < 0.005 + 0.07 * bin_p.mean()


def test_filter_beats_recency_and_is_not_perfect(history: History) -> None:
    user, at_ms = asked(history)
    p = probabilities(LAW, history, user, at_ms, TARGETS)
    moved = _last_event_ms(history, user, at_ms)
    age = at_ms - moved
    for name, recency in (("purchase", -age), ("churn", age)):
        y = labels(history, user, at_ms, TARGETS[name])
        assert auc(y, recency) + 0.05 < auc(y, p[name]) < 0.95
        assert log_loss(y, p[name]) < log_loss(y, np.full(len(y), y.mean()))


@pytest.mark.parametrize("state", ["heavy/buying", "normal/considering", "light/dormant"])
def test_outcome_matches_monte_carlo(state: str) -> None:
    """Users who all start in one state: the share of them that does it is the law's probability."""
    index = LAW.states.index(state)
    sample = simulate(replace(LAW, initial=np.eye(len(LAW.initial))[index]), users=20_000, start_ms=START_MS, days=60, seed=3)
    user, first = np.unique(sample.user, return_index=True)
    at_ms = sample.time_ms[first]
    whole = at_ms < START_MS + 30 * DAY_MS
    for target in TARGETS.values():
        p = outcome_by_state(LAW, target)[index]
        share = labels(sample, user[whole], at_ms[whole], target).mean()
        assert abs(share - p) < 4 * np.sqrt(p * (1 - p) / whole.sum())


def test_belief_matches_small_steps() -> None:
    """Two states, three events: the filter against an Euler integration of the same equations."""
    d = np.array([[[2.0, 0.5], [0.0, 0.1]], [[0.0, 0.3], [0.2, 0.4]]])
    d0 = np.array([[-3.1, 0.3], [0.6, -1.3]])
    law = Law(("page_view", "purchase"), ("a", "b"), d0, d, np.array([0.7, 0.3]))
    times, kinds, at = np.array([0, 0.5, 0.75]), [0, 1, 0], 2.0
    none = np.full(3, -1)
    history = History(
        user=np.zeros(3, np.int32),
        time_ms=START_MS + (times * DAY_MS).astype(np.int64),
        type=np.array(kinds, np.int16),
        item=none.astype(np.int32),
        category=none.astype(np.int16),
        value=np.full(3, np.nan),
        users=["u0001"],
        types=law.types,
    )
    belief, step = law.initial.copy(), 1e-5
    for since, until, kind in ((0, 0.5, 1), (0.5, 0.75, 0), (0.75, at, None)):
        for _ in range(round((until - since) / step)):
            belief += belief @ d0 * step
        if kind is not None:
            belief = belief @ d[kind]
    assert np.allclose(Filter(law, history).belief([0], [START_MS + int(at * DAY_MS)])[0], belief / belief.sum(), atol=1e-4)


def test_labels_are_after_the_moment_and_up_to_the_horizon() -> None:
    sample = simulate(LAW, users=50, start_ms=START_MS, days=60, seed=8)
    mine = sample.time_ms[sample.user == 0]
    any_event: Target = (("*",), "occurs", int(mine[1] - mine[0]))
    shorter: Target = (("*",), "absent", int(mine[1] - mine[0]) - 1)
    assert labels(sample, [0], mine[:1], any_event).all()
    assert labels(sample, [0], mine[:1], shorter).all()


def test_mistakes_are_named() -> None:
    sample = simulate(LAW, users=5, start_ms=START_MS, days=10, seed=8)
    with pytest.raises(ValueError, match="no event up to"):
        Filter(LAW, sample).belief([0], [START_MS - 1])
    with pytest.raises(ValueError, match="unknown event types \\['bought'\\]"):
        labels(sample, [0], [START_MS], (("bought",), "occurs", DAY_MS))


def test_auc_counts_ties_as_a_half() -> None:
    assert auc([0, 0, 1, 1], [1, 2, 2, 3]) == (1 + 1 + 0.5 + 1) / 4
    assert np.isnan(auc([1, 1], [0.1, 0.2]))


def _last_event_ms(history: History, user: Ints, at_ms: Ints) -> Ints:
    order = np.lexsort((history.time_ms, history.user))
    key = (history.user[order].astype(np.int64) << 42) + history.time_ms[order]
    last: Ints = history.time_ms[order][np.searchsorted(key, (user << 42) + at_ms, side="right") - 1]
    return last


def test_a_drift_changes_what_follows_and_nothing_before() -> None:
    """Purchases rise from the planted day on, and the filter that knows of it foretells as many as come; the other one does not."""
    at_ms = 30 * DAY_MS
    drift = Drift(at_ms, shop_law(promotion=3))
    steady, drifted = (simulate(shop_law(), users=3000, start_ms=0, days=60, seed=5, drift=d) for d in (None, drift))
    purchase = TYPES.index("purchase")
    before, after = (int(((h.type == purchase) & (h.time_ms < at_ms)).sum()) for h in (steady, drifted))
    assert before == pytest.approx(after, rel=0.25)
    bought = [int(((h.type == purchase) & (h.time_ms >= at_ms)).sum()) for h in (steady, drifted)]
    assert bought[1] > 2 * bought[0]

    target = (("purchase",), "occurs", 7 * DAY_MS)
    known = np.unique(drifted.user[drifted.time_ms < 35 * DAY_MS]).astype(np.int64)
    asked_ms = np.full(len(known), 35 * DAY_MS)
    came = labels(drifted, known, asked_ms, target).mean()
    knowing, blind = (Filter(shop_law(), drifted, d).probabilities(known, asked_ms, {"p": target})["p"].mean() for d in (drift, None))
    assert knowing == pytest.approx(came, rel=0.35)
    assert blind < 0.6 * came
