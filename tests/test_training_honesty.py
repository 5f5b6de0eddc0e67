"""Training presents a moment as a function of its past and the seed: nothing that follows shows in it, and no group is misjudged for it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from numpy.typing import NDArray
from trainer_support import NOW, START_MS, quick_settings

from model.hazards import DAY_MS
from model.targets import Target
from trainer.backtest import said_by
from trainer.batches import Carried, Packer, chunks
from trainer.challenger import Split, train
from trainer.cutoffs import ask
from trainer.dataset import Landmarks, landmarks, scheduled
from trainer.history import History, from_table
from trainer.metrics import Metrics
from trainer.stage import no_progress

KNOWN, MORE, PAIRS, SIZE = 6, 60, 40, 10
"""Events of everybody up to the moment; events that one of each pair has after it; pairs; events in a chunk."""
MOMENT_MS = START_MS + (KNOWN - 1) * DAY_MS
END_MS = START_MS + 200 * DAY_MS


def pairs() -> History:
    """Users alike up to their sixth event: the first of each pair has many more, the second none."""
    times = [START_MS + i * DAY_MS for i in range(KNOWN)]
    later = [MOMENT_MS + 30 * DAY_MS + i * DAY_MS for i in range(MORE)]
    rows = [(f"u{u}", t) for u in range(2 * PAIRS) for t in (times if u % 2 else times + later)]
    user, time_ms = zip(*rows, strict=True)
    none = pa.nulls(len(rows), pa.string())
    columns = {"user_id": pa.array(user), "type": pa.array(["view"] * len(rows)), "timestamp": np.array(time_ms, np.int64)}
    return from_table(pa.table({**columns, "item_id": none, "category": none, "value": pa.nulls(len(rows), pa.float64())}))


def presented(seed: int) -> dict[str, NDArray[np.float64]]:
    """(users,) of each user's sixth event: where its chunk begins, its place in it, the chunks of its batch, its share of a step."""
    history, rng = pairs(), np.random.default_rng(seed)
    moment = history.first[:-1] + KNOWN - 1
    packer = Packer(history.first, moment, SIZE, rng)
    out = {name: np.full(history.users, np.nan) for name in ("begins", "place", "mates", "share")}
    count = packer.count(4 * SIZE)
    for batch in packer.batches(count, rng):
        step = np.searchsorted(np.cumsum(batch.sizes), batch.place, side="right")
        user = history.user[moment[batch.landmarks]]
        out["begins"][user] = KNOWN - 1 - step
        out["place"][user] = step
        out["mates"][user] = len(batch.chunk)
        out["share"][user] = 1 / (len(moment) / count)
    return out


def test_what_is_presented_of_a_moment_does_not_tell_what_follows_it() -> None:
    draws = [presented(seed) for seed in range(60)]
    for name in draws[0]:
        of_user = np.array([draw[name] for draw in draws])
        with_more, with_none = of_user[:, ::2], of_user[:, 1::2]
        assert not np.isnan(of_user).any(), name
        for statistic in (np.mean, np.var):
            a, b = statistic(with_more), statistic(with_none)
            noise = np.sqrt(sum(np.var(statistic(side, axis=1)) / len(draws) for side in (with_more, with_none)))
            assert abs(a - b) <= 4 * noise + 1e-9, (name, statistic.__name__, a, b)
    assert len(np.unique([draw["begins"] for draw in draws])) > 3  # streams are cut, whether they become long or not


@pytest.mark.parametrize("draw", [landmarks, scheduled])
def test_moments_are_drawn_and_weighed_alike_whatever_follows(draw: Callable[..., Landmarks]) -> None:
    """Up to the day on which the one of a pair comes back, nothing tells them apart: not how many moments, nor when, nor their weight."""
    history = pairs()
    counts, ages, weights = ([[], []] for _ in range(3))  # type: ignore[var-annotated]
    for seed in range(60):
        moments = draw(history, (("*",),), START_MS, END_MS, np.random.default_rng(seed))
        early = moments.where(moments.at_ms < MOMENT_MS + 30 * DAY_MS)
        for side in (0, 1):
            mine = history.user[early.event] % 2 == side
            counts[side].append(mine.sum())
            ages[side].append((early.at_ms[mine] - START_MS).mean() / DAY_MS)
            weights[side] += early.weight[mine].tolist()
    for of_side in (counts, ages):
        a, b = (np.array(values, float) for values in of_side)
        assert abs(a.mean() - b.mean()) <= 4 * np.sqrt((a.var() + b.var()) / len(a)) + 1e-9
    assert np.unique(weights[0]).tolist() == np.unique(weights[1]).tolist()


def test_a_chunk_goes_on_from_where_the_one_before_it_ended() -> None:
    history = pairs()
    packer = Packer(history.first, np.arange(len(history)), SIZE, np.random.default_rng(0))
    begins, ends = chunks(history.first, SIZE, np.random.default_rng(0))
    carried = Carried(packer.continues, 2)
    every = np.arange(len(begins))
    assert not carried.before(every).any()
    carried.keep(every, torch.from_numpy(np.stack([ends, ends], 1)).float())  # each ends in a state that names its end
    went_on = carried.before(every)[:, 0].numpy()
    assert np.array_equal(went_on, np.where(np.isin(begins, history.first[:-1]), 0, begins))


RATE, DEATH, HORIZON_DAYS = 0.5, 0.06, 14.0
"""Visits and ends of a user a day; of the target."""


def memoryless(users: int, days: int, seed: int) -> History:
    """Users who join on any day, come at one rate, and may leave for good at any time: how many events they have had is no news."""
    rng = np.random.default_rng(seed)
    join, life = rng.uniform(0, days, users), rng.exponential(1 / DEATH, users)
    rows = []
    for u in range(users):
        at, end = join[u], min(days, join[u] + life[u])
        while at < end:
            rows.append((START_MS + int(at * DAY_MS), f"u{u}"))
            at += rng.exponential(1 / RATE)
    rows.sort()
    time_ms, user = zip(*rows, strict=True)
    none = pa.nulls(len(rows), pa.string())
    columns = {"user_id": pa.array(user), "type": pa.array(["view"] * len(rows)), "timestamp": np.array(time_ms, np.int64)}
    return from_table(pa.table({**columns, "item_id": none, "category": none, "value": pa.nulls(len(rows), pa.float64())}))


def test_where_the_number_of_events_is_no_news_every_group_is_calibrated(tmp_path: Path) -> None:
    """By number of events, tenure, recency and activity, beyond noise; asked in the training days, as a worker would step these users."""
    torch.set_num_threads(1)
    days = 80
    history = memoryless(2500, days, seed=5)
    end_ms = START_MS + days * DAY_MS
    target = Target(name="gone", types=("*",), outcome="absent", horizon_ms=int(HORIZON_DAYS * DAY_MS))
    changes = {"epochs": 8, "belief_states": 0, "chunk_events": 8, "batch_events": 512, "learning_rate": 8e-3}
    settings = quick_settings(tmp_path, targets=[target], **changes)
    split = Split(START_MS, end_ms - 8 * DAY_MS, end_ms, end_ms)
    made = train(history, split, None, settings, Metrics(), NOW, np.random.default_rng(0), no_progress, lambda: False)
    asked = ask(history, (target,), [START_MS + day * DAY_MS for day in range(20, 62, 3)], end_ms)
    p = said_by(made.model, history, asked, (target,))[:, 0]
    came_true = asked.label[:, 0]
    first = history.first[asked.user]
    events = asked.event - first + 1
    tenure = (asked.at_ms - history.time_ms[first]) / DAY_MS
    silent = (asked.at_ms - history.time_ms[asked.event]) / DAY_MS
    for name, of_moment in (("events", events), ("tenure", tenure), ("silent", silent), ("activity", events / (tenure + 1))):
        group = np.searchsorted(np.quantile(of_moment, np.linspace(0, 1, 7)[1:-1]), of_moment, side="right")
        for g in np.unique(group):
            error_U = np.bincount(asked.user[group == g], (came_true - p)[group == g])
            noise, size = np.sqrt(error_U @ error_U), (group == g).sum()
            assert abs(error_U.sum()) <= 3 * noise + 0.02 * size, (name, g, p[group == g].mean(), came_true[group == g].mean())
