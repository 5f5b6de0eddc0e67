"""The quality benchmark is fair: hand-made features see no future, and the exact filter is the best of all answers."""

import numpy as np

from bench.quality import START_MS, TARGETS, Questions, Stream, ask, hand_made, losses
from demo.attainable import Filter, labels
from demo.shop import History, shop_law, simulate
from model.hazards import DAY_MS


def shop(users: int = 200) -> History:
    return simulate(shop_law(), users=users, start_ms=START_MS, days=70, seed=2)


def before(history: History, end_ms: int) -> History:
    keep = history.time_ms < end_ms
    columns = (getattr(history, n)[keep] for n in ("user", "time_ms", "type", "item", "category", "value"))
    return History(*columns, history.users, history.types)


def test_hand_made_features_see_no_future() -> None:
    whole = shop()
    at_ms = START_MS + 40 * DAY_MS
    known = before(whole, at_ms)
    users = np.unique(known.user).astype(np.int64)
    asked = Questions(users, np.full(len(users), at_ms - 1))
    seen, hidden = (hand_made(Stream(h), asked) for h in (whole, known))
    assert np.allclose(seen, hidden, rtol=0, atol=1e-6, equal_nan=True)
    assert len(np.unique(np.nan_to_num(seen, nan=-1), axis=0)) > len(users) / 2


def test_nobody_beats_the_exact_filter() -> None:
    history = shop()
    asked = ask(Stream(history), START_MS + 35 * DAY_MS, START_MS + 40 * DAY_MS, np.random.default_rng(0), 500)
    exact = Filter(shop_law(), history)
    for name, target in TARGETS.items():
        for q in asked.values():
            p = exact.probabilities(q.user, q.at_ms, {name: target})[name]
            truth = labels(history, q.user, q.at_ms, target)
            best = losses(p, p, truth)[0]
            assert all(losses(worse, p, truth)[0] > best for worse in (p * 0.9, np.full(len(p), p.mean()), p**1.2))
