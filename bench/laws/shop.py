"""The demo's shop: three segments, five intents, seven types; a purchase within 7 days, nothing within 30."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from bench.laws.case import Floats, Ints, Law, Stream, targets
from demo.attainable import Filter
from demo.shop import History, shop_law, simulate

START_MS = 1_760_000_000_000
DAYS = 138


def stream_of(shop: History) -> Stream:
    """The shop's events, sorted by user."""
    order = np.lexsort((shop.time_ms, shop.user))
    columns = (shop.user, shop.time_ms, shop.type, shop.item, shop.category)
    user, time_ms, kind, item, category = (np.asarray(c, np.int64)[order] for c in columns)
    return Stream(len(shop.users), shop.types, user, time_ms, kind, item, category, shop.value[order])


def _simulate(users: int, seed: int) -> Stream:
    return stream_of(simulate(shop_law(), users=users, start_ms=START_MS, days=DAYS, seed=seed))


def _answers(stream: Stream, user: Ints, at_ms: Ints) -> Floats:
    columns = (stream.user, stream.time_ms, stream.type, stream.item, stream.category, stream.value)
    exact = Filter(shop_law(), History(*columns, users=[], types=stream.types))
    wanted = {t.name: (t.types, t.outcome, t.horizon_ms) for t in LAW.targets}
    found = exact.probabilities(user, at_ms - 1, wanted)  # the filter takes events up to its moment, that one included
    return np.stack([found[t.name] for t in LAW.targets], axis=1)


LAW = Law(
    "shop",
    "The demo's shop: segments and a moving intent behind seven event types.",
    targets("purchase=purchase:occurs:7d", "churn=*:absent:30d"),
    until_day=90,
    days=DAYS,
    simulate=_simulate,
    answers=_answers,
    start_ms=START_MS,
)
FEW = replace(LAW, name="few", about="The demo's shop with 500 users: what a model makes of little data.", most_users=500)
