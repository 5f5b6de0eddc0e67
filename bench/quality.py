"""python -m bench quality: how much of what can be known the model knows, on a shop whose law is known.

The demo's shop is simulated. Ours and LightGBM are fitted on the events before T, and both are asked of the same users in the six days from
T on: at scheduled moments (every user who has come by then), and right after events. The exact Bayes filter of the law answers the same
questions. T lies so that every horizon ends within the simulation.

share closed = (loss of LightGBM - loss of ours) / (loss of LightGBM - loss of the filter), once by the expected loss under the filter's
probabilities (no sampling noise: a difference of KL divergences), once by the outcomes as they fell.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from demo.attainable import Filter, Target, labels
from demo.shop import History as Shop
from demo.shop import shop_law, simulate
from model.artifact import Model
from model.hazards import DAY_MS, HOUR_MS
from model.targets import ANY
from trainer.challenger import Split, train
from trainer.dataset import features, statistics_after
from trainer.history import History, from_table
from trainer.material import hidden_along
from trainer.metrics import Metrics
from trainer.settings import TrainerSettings

TARGETS: dict[str, Target] = {"purchase": (("purchase",), "occurs", 7 * DAY_MS), "churn": ((ANY,), "absent", 30 * DAY_MS)}
WINDOWS_MS = (HOUR_MS, 6 * HOUR_MS, DAY_MS, 3 * DAY_MS, 7 * DAY_MS, 14 * DAY_MS, 30 * DAY_MS, 90 * DAY_MS)
START_MS = 1_760_000_000_000
ASKED_DAYS = 6
ASKED = 40_000
"""Questions of a kind at most, of either kind."""


@dataclass(frozen=True, slots=True)
class Questions:
    """Q users (their indices in the shop) and moments."""

    user: NDArray[np.int64]
    at_ms: NDArray[np.int64]


class Stream:
    """Events of the shop sorted by (user, time), to be looked up by (user, moment)."""

    def __init__(self, shop: Shop) -> None:
        order = np.lexsort((shop.time_ms, shop.user))
        self.user, self.time_ms = shop.user[order].astype(np.int64), shop.time_ms[order]
        self.kind, self.value = shop.type[order].astype(np.int64), shop.value[order]
        self.kinds = len(shop.types)
        self._key = (self.user << 42) + self.time_ms
        begins = np.flatnonzero(np.r_[True, self.user[1:] != self.user[:-1]])
        self.begin = np.repeat(begins, np.diff(np.r_[begins, len(order)]))
        self.count = np.zeros((len(order) + 1, self.kinds))  # of each kind among the events before
        np.add.at(self.count, (np.arange(1, len(order) + 1), self.kind), 1)
        self.count = self.count.cumsum(0)
        self.money = np.r_[0, np.nan_to_num(self.value).cumsum()]
        self.priced = np.r_[0, (~np.isnan(self.value)).cumsum()]
        places = np.where(self.kind[:, None] == np.arange(self.kinds), np.arange(len(order))[:, None], -1)
        self.last = np.maximum.accumulate(places, axis=0)  # the newest event of each kind, perhaps another user's

    def upto(self, user: NDArray[np.int64], at_ms: NDArray[np.int64]) -> NDArray[np.int64]:
        """(Q,) each user's last event up to the moment."""
        return np.searchsorted(self._key, (user << 42) + at_ms, side="right") - 1


def hand_made(stream: Stream, asked: Questions) -> NDArray[np.float64]:
    """(Q, F): recency and frequency by type and window, values, gaps, tenure and the calendar, of events up to the moment."""
    row = stream.upto(asked.user, asked.at_ms)
    begin = stream.begin[row]
    assert (stream.user[row] == asked.user).all()
    last = stream.last[row]
    known = last >= begin[:, None]
    days = (asked.at_ms[:, None] - stream.time_ms[np.maximum(last, 0)]) / DAY_MS
    columns = [np.where(known, days, np.nan), stream.count[row + 1] - stream.count[begin]]
    for window_ms in WINDOWS_MS:
        low = np.maximum(stream.upto(asked.user, asked.at_ms - window_ms) + 1, begin)
        columns.append(stream.count[row + 1] - stream.count[low])
        columns.append((stream.money[row + 1] - stream.money[low])[:, None])
    silent = (asked.at_ms - stream.time_ms[row]) / DAY_MS
    tenure = (asked.at_ms - stream.time_ms[begin]) / DAY_MS
    total = row + 1 - begin
    gaps = []
    for back in (1, 2, 3, 5, 10):
        there = row - back >= begin
        gaps.append(np.where(there, (stream.time_ms[row] - stream.time_ms[np.maximum(row - back, 0)]) / DAY_MS, np.nan))
    kinds = [np.where(row - back >= begin, stream.kind[np.maximum(row - back, 0)], -1) for back in range(4)]
    priced = stream.priced[row + 1] - stream.priced[begin]
    mean = (stream.money[row + 1] - stream.money[begin]) / np.maximum(priced, 1)
    hour = asked.at_ms / HOUR_MS % 24
    weekday = asked.at_ms // DAY_MS % 7
    scalars = [silent, tenure, total, total / (tenure + 1), silent * total / (tenure + 1), mean, hour, weekday, *gaps, *kinds]
    return np.concatenate([*columns, np.stack(scalars, axis=1)], axis=1)


def ask(stream: Stream, begin_ms: int, end_ms: int, rng: np.random.Generator, at_most: int) -> dict[str, Questions]:
    """Scheduled moments (the begin, and every fifth day from there), and right after events in [begin, end)."""
    users, first = np.unique(stream.user, return_index=True)
    parts = []
    for at in range(begin_ms, end_ms, 5 * DAY_MS):
        come = users[stream.time_ms[first] <= at]
        parts.append(Questions(come, np.full(len(come), at)))
    user, at_ms = np.concatenate([p.user for p in parts]), np.concatenate([p.at_ms for p in parts])
    chosen = rng.choice(len(user), min(at_most, len(user)), replace=False)
    event = np.flatnonzero((stream.time_ms >= begin_ms) & (stream.time_ms < end_ms))
    event = rng.choice(event, min(at_most, len(event)), replace=False)
    return {"scheduled": Questions(user[chosen], at_ms[chosen]), "after an event": Questions(stream.user[event], stream.time_ms[event])}


def boosted(
    stream: Stream, shop: Shop, target: Target, split_ms: int, asked: dict[str, Questions], seed: int
) -> dict[str, NDArray[np.float64]]:
    """LightGBM's answers, fitted on moments whose horizon closed before T, of both kinds; early stopping on users held out."""
    import lightgbm

    rng = np.random.default_rng(seed)
    begin_ms = START_MS + 10 * DAY_MS
    moments = ask(stream, begin_ms, split_ms - target[2], rng, 10**6)
    taken = [Questions(q.user[i], q.at_ms[i]) for q in moments.values() for i in [rng.permutation(len(q.user))[: 3 * ASKED]]]
    train_set = Questions(np.concatenate([q.user for q in taken]), np.concatenate([q.at_ms for q in taken]))
    inputs, truth = hand_made(stream, train_set), labels(shop, train_set.user, train_set.at_ms, target)
    held = train_set.user % 8 == 0
    fit_on, stop_on = lightgbm.Dataset(inputs[~held], truth[~held]), lightgbm.Dataset(inputs[held], truth[held])
    options = {"objective": "binary", "learning_rate": 0.03, "num_leaves": 31, "min_data_in_leaf": 200, "feature_fraction": 0.5}
    more = {"bagging_fraction": 0.7, "bagging_freq": 1, "lambda_l2": 5.0, "seed": seed, "num_threads": 1, "verbosity": -1}
    model = lightgbm.train({**options, **more}, fit_on, 1500, valid_sets=[stop_on], callbacks=[lightgbm.early_stopping(40, verbose=False)])
    return {kind: np.asarray(model.predict(hand_made(stream, q))) for kind, q in asked.items()}


def table(shop: Shop, until_ms: int) -> pa.Table:
    """The shop's events before a moment as the trainer reads them."""
    keep = shop.time_ms < until_ms

    def texts(codes: NDArray[np.integer], letter: str) -> pa.Array:
        return pa.array([None if c < 0 else f"{letter}{c}" for c in codes[keep].tolist()], pa.string())

    kinds = pa.array([shop.types[k] for k in shop.type[keep].tolist()], pa.string())
    users = pa.array([shop.users[u] for u in shop.user[keep].tolist()], pa.string())
    columns = {"user_id": users, "type": kinds, "timestamp": shop.time_ms[keep]}
    marks = {"item_id": texts(shop.item, "i"), "category": texts(shop.category, "c")}
    return pa.table({**columns, **marks, "value": pa.array(shop.value[keep], from_pandas=True)})


def fitted(shop: Shop, split_ms: int, settings: TrainerSettings) -> tuple[Model, float]:
    """Our model, and seconds of its fitting. Its newest tenth before T stops it."""
    history = from_table(table(shop, split_ms))
    validation_ms = split_ms - round((split_ms - START_MS) * settings.validation_share)
    split = Split(START_MS, validation_ms, split_ms, split_ms)
    rng, now = np.random.default_rng(settings.seed), datetime(2026, 1, 1, tzinfo=UTC)
    made = train(history, split, None, settings, Metrics(), now, rng, lambda share, words: None, lambda: False)
    return made.model, made.fitted.seconds


def ours(model: Model, shop: Shop, asked: dict[str, Questions]) -> dict[str, dict[str, NDArray[np.float64]]]:
    """By target and kind of question: the model's answers, each state stepped over the user's whole stream as a worker does."""
    history: History = from_table(table(shop, 1 << 62))
    code = {name: i for i, name in enumerate(history.user_ids)}
    of_shop = np.array([code.get(name, -1) for name in shop.users], np.int64)
    key = (history.user << 42) + history.time_ms
    state_EZ = hidden_along(model.network, features(history, model.vocabulary, model.scaling), history)
    stats = statistics_after(history, model.vocabulary)
    scorer = model.scorer()
    out: dict[str, dict[str, NDArray[np.float64]]] = {t.name: {} for t in scorer.targets}
    for kind, q in asked.items():
        row = np.searchsorted(key, (of_shop[q.user] << 42) + q.at_ms, side="right") - 1
        blocks = zip(np.array_split(row, 20), np.array_split(q.at_ms, 20), strict=True)
        parts = [scorer(state_EZ[torch.from_numpy(r)], stats[r], at_ms) for r, at_ms in blocks]
        answers = np.concatenate(parts).astype(np.float64)
        for i, target in enumerate(scorer.targets):
            out[target.name][kind] = answers[:, i]
    return out


def losses(said: NDArray[np.float64], exact: NDArray[np.float64], truth: NDArray[np.bool_]) -> tuple[float, float]:
    """(expected log-loss under the exact probabilities, log-loss on the outcomes), in nats."""
    p = np.clip(said, 1e-9, 1 - 1e-9)
    yes, no = -np.log(p), -np.log1p(-p)
    return float((exact * yes + (1 - exact) * no).mean()), float(np.where(truth, yes, no).mean())


def run(users: int, days: float, seed: int, settings: TrainerSettings, as_json: bool) -> int:
    """Print the table; with `as_json`, one line of JSON after it."""
    torch.set_num_threads(1)
    law = shop_law()
    shop = simulate(law, users=users, start_ms=START_MS, days=days, seed=seed)
    stream = Stream(shop)
    end_ms = START_MS + int(days * DAY_MS)
    asked_end_ms = end_ms - max(t[2] for t in TARGETS.values())
    split_ms = asked_end_ms - ASKED_DAYS * DAY_MS
    asked = ask(stream, split_ms, asked_end_ms, np.random.default_rng(seed + 1), ASKED)
    known = int((shop.time_ms < split_ms).sum())
    print(f"{users:,} users, {len(shop.time_ms):,} events in {days:g} days; {known:,} of them before T", flush=True)
    begin = time.monotonic()
    model, seconds = fitted(shop, split_ms, settings)
    print(f"ours: fitted in {seconds:.0f} s, {time.monotonic() - begin:.0f} s in all", flush=True)
    said = ours(model, shop, asked)
    exact_filter = Filter(law, shop)
    out: dict[str, object] = {"users": users, "events": len(shop.time_ms), "fit_seconds": round(seconds, 1)}
    print(f"{'':28}{'constant':>10}{'LightGBM':>10}{'ours':>10}{'exact':>10}{'closed':>8}{'(sampled)':>11}")
    for name, target in TARGETS.items():
        trees = boosted(stream, shop, target, split_ms, asked, seed)
        for kind, q in asked.items():
            exact = exact_filter.probabilities(q.user, q.at_ms, {name: target})[name]
            truth = labels(shop, q.user, q.at_ms, target)
            constant = np.full(len(exact), truth.mean())
            rows = [losses(p, exact, truth) for p in (constant, trees[kind], said[name][kind], exact)]
            closed = [(rows[1][i] - rows[2][i]) / (rows[1][i] - rows[3][i]) for i in (0, 1)]
            print(f"{name + ', ' + kind:28}" + "".join(f"{r[0]:10.5f}" for r in rows) + f"{closed[0]:8.2f}{closed[1]:11.2f}", flush=True)
            out[f"{name}, {kind}"] = {"expected": [r[0] for r in rows], "sampled": [r[1] for r in rows], "closed": closed}
    if as_json:
        print(json.dumps(out))
    return 0
