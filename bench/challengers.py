"""Challengers whose worth is known, on shops whose law is known: here the shops and the better ones, the sabotaged ones in
`bench.sabotages`. See `bench.gate`.

A shop has one window of events and its test window. Everything is trained by the trainer's own code; the exact filter of the law then
gives each model's expected log-loss on moments of the test window, which tells better from worse without the noise of outcomes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from demo.attainable import Filter
from demo.shop import DAY_MS, Drift, Floats, shop_law, simulate
from demo.shop import History as Events
from model.artifact import ArtifactError, Model, dump, load
from trainer import evaluate
from trainer.challenger import Challenger, Split, train
from trainer.history import History, from_table
from trainer.metrics import Metrics
from trainer.refresh import refresh
from trainer.rounds import split_by_time
from trainer.settings import TrainerSettings
from trainer.stage import no_progress

START_MS = 1_760_000_000_000
NOW = datetime(2026, 1, 2, tzinfo=UTC)
DAYS = 60
DRIFT_DAY = 20
PROMOTION = 3.0
"""Factor of the planted drift."""
WORTH = {"page_view": 1.0, "search": 4.0, "product_view": 10.0, "add_to_cart": 100.0, "remove_from_cart": -100.0, "email_open": -1.0}
"""Where values matter: all these are published as `interaction`, and the value alone says which it was."""


@dataclass(frozen=True)
class Size:
    """users: in a shop; a third of them train. epochs, hidden: of a good model. states, of its cells. steps: of its belief cell."""

    users: int
    epochs: int
    hidden: int
    states: int
    steps: int


@dataclass(frozen=True)
class Bout:
    """One question to the gate. The gap is by how much the challenger's expected log-loss is worse, the mean over the targets."""

    name: str
    shop: Shop
    challenger: Challenger
    champion: Challenger

    @property
    def gap(self) -> float:
        """NaN where the challenger answers nothing."""
        return self.shop.expected_loss(self.challenger) - self.shop.expected_loss(self.champion)


def known_shop(seed: int, users: int, days: float, drift: Drift | None, *, told_by_value: bool = False) -> tuple[Events, History]:
    """A simulated shop, and its events as the trainer reads them. told_by_value: types are merged as WORTH has it, and lose nothing."""
    shop = simulate(shop_law(), users=users, start_ms=START_MS, days=days, seed=seed, drift=drift)
    types, value = list(shop.types), shop.value
    if told_by_value:
        worth = np.array([WORTH.get(name, np.nan) for name in types])[shop.type]
        types = ["interaction" if name in WORTH else name for name in types]
        value = np.where(np.isnan(worth), value, worth)
    columns = {
        "user_id": pa.array(shop.users).take(shop.user),
        "type": pa.array(types).take(shop.type),
        "timestamp": shop.time_ms,
        "item_id": pa.array([None if i < 0 else f"i{i}" for i in shop.item], pa.string()),
        "category": pa.array([None if c < 0 else f"c{c}" for c in shop.category], pa.string()),
        "value": pa.array(value, from_pandas=True),
    }
    return shop, from_table(pa.table(columns))


class Shop:
    """One simulated shop: its events as the trainer reads them, and the filter that knows its law. cell: its models have cells.

    As in a round of a large log, models are fitted on a sample of the users, and judged by all of them.
    """

    def __init__(self, seed: int, size: Size, *, cell: bool, drifts: bool = False, told_by_value: bool = False) -> None:
        drift = Drift(START_MS + DRIFT_DAY * DAY_MS, shop_law(PROMOTION)) if drifts else None
        shop, self.history = known_shop(seed, size.users, DAYS, drift, told_by_value=told_by_value)
        self.settings = TrainerSettings(
            belief_states=size.states if cell else 0,
            rhythm_classes=size.states if cell else 0,
            belief_steps=size.steps,
            hidden=size.hidden,
            head=32,
            epochs=size.epochs,
            test_share=0.3,
            seed=seed,
            log_directory=Path("unused"),
            device="cpu",
        )
        self.split = split_by_time(self.history, self.settings)
        self._filter = Filter(shop_law(), shop, drift)
        self._code = {name: i for i, name in enumerate(shop.users)}

    def fitted(
        self, history: History | None = None, split: Split | None = None, champion: Model | None = None, **changes: object
    ) -> Challenger:
        """A model by the trainer's own code, on all of the window but the test part, or on what is given instead."""
        settings = self.settings.model_copy(update=changes)
        rng = np.random.default_rng(settings.seed)
        known, window = history or self.sample, split or self.split
        return train(known, window, champion, settings, Metrics(), NOW, rng, no_progress, stopping=lambda: False)

    def refreshed(self, champion: Challenger, history: History | None = None) -> Challenger:
        """The champion with new heads, by the trainer's own refresh."""
        rng = np.random.default_rng(self.settings.seed)
        known = history or self.sample
        return refresh(known, self.split, champion.model, self.settings, Metrics(), NOW, rng, no_progress, stopping=lambda: False)

    def until(self, day: float) -> Split:
        """A window that ends at a day, its last tenth for validation."""
        end_ms = START_MS + int(day * DAY_MS)
        return Split(self.split.begin_ms, end_ms - int(day * DAY_MS / 10), end_ms, end_ms)

    def share(self, share: float) -> History:
        """The history of some of the users."""
        return self.history.of_users(np.random.default_rng(0).random(self.history.users) < share)

    @cached_property
    def sample(self) -> History:
        """What a good model is fitted on."""
        return self.share(1 / 3)

    @cached_property
    def good(self) -> Challenger:
        return self.fitted()

    @cached_property
    def yesterdays(self) -> Challenger:
        """As good as `good`, but older by two days: any fresher challenger that does no harm may replace it."""
        return self.fitted(split=self.until((self.split.test_ms - START_MS) / DAY_MS - 2))

    @cached_property
    def _truth(self) -> tuple[evaluate.Exam, list[Floats]]:
        exam = evaluate.set_exam(
            self.history, self.settings.targets, self.split.test_ms, self.split.end_ms, np.random.default_rng(9), 10_000
        )
        user = np.array([self._code[self.history.user_ids[u]] for u in exam.users])
        asked = {t.name: ("*" if t.types == ("*",) else t.types, t.outcome, t.horizon_ms) for t in exam.asked}
        said = self._filter.probabilities(user, exam.moments.at_ms, asked)
        return exam, [said[t.name][rows] for t, rows in zip(exam.asked, exam.rows, strict=True)]

    def expected_loss(self, challenger: Challenger) -> float:
        """Mean over the targets of the log-loss that the law expects of a model, nats; NaN where it answers nothing."""
        exam, truths = self._truth
        try:
            model = load(*dump(challenger.model.manifest, challenger.model.network))
            said = [np.clip(p, 1e-7, 1 - 1e-7) for p in evaluate.answers(exam, model)]
        except ArtifactError:
            return float("nan")
        losses = [-(t * np.log(p) + (1 - t) * np.log1p(-p)).mean() for t, p in zip(truths, said, strict=True)]
        return float(np.mean(losses))


def better(seed: int, size: Size, *, cell: bool) -> Iterator[Bout]:
    """Five challengers that are truly better: more users, longer training, a longer window, and a drift followed by the whole model,
    warm-started as a round does it, and by the heads alone."""
    shop = Shop(seed, size, cell=cell)
    yield Bout("more users", shop, shop.good, shop.fitted(shop.share(0.03)))
    yield Bout("longer training", shop, shop.good, shop.fitted(epochs=1, learning_rate=5e-4, belief_steps=10, rhythm_classes=1))
    yield Bout("a longer window", shop, shop.good, shop.fitted(split=shop.until(8)))
    drifted = Shop(seed + 1000, size, cell=cell, drifts=True)
    before = drifted.fitted(split=drifted.until(DRIFT_DAY))
    yield Bout("a drift followed", drifted, drifted.fitted(champion=before.model), before)
    yield Bout("a drift, heads alone", drifted, drifted.refreshed(before), before)
